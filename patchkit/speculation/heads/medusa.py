"""Medusa heads.

Shapes: R rows, T positions, N heads, D hidden size, E embedding size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchkit.speculation.heads.base import Heads, Init
from patchkit.trained_for import TrainedFor


class MedusaHeads(Heads):
    """Medusa (Cai et al. 2024, https://arxiv.org/abs/2401.10774): N heads predict the N tokens after the next one, independently.

    Head i is one residual block, ``h + silu(W_i h + b_i)``, under the model's own LM head.

    Args:
        hidden_size: D.
        n_heads: N.
        vocabulary: V, if every head has its own LM head, which `MedusaHeads.start` initialises; 0 if all use the model's.
    """

    kind = "medusa"

    def __init__(self, hidden_size: int, n_heads: int = 4, vocabulary: int = 0):
        super().__init__({"hidden_size": hidden_size, "n_heads": n_heads, "vocabulary": vocabulary})
        self.blocks = nn.Linear(hidden_size, n_heads * hidden_size)
        self.lm_heads = nn.Parameter(torch.empty(n_heads, vocabulary, hidden_size)) if vocabulary else None

    @classmethod
    def start(cls, model: Any, n_heads: int = 4, init: Init = "tie", seed: int = 0) -> MedusaHeads:
        """Make untrained heads for ``model``.

        Args:
            n_heads: N.
            init: "tie" predicts as the model's LM head does, with its weight shared; "copy" predicts the same, with a copy of the weight
                for each head; "random" has random blocks under the shared weight.
            seed: of the random blocks.
        """
        facts = TrainedFor.of(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            heads = cls(facts.hidden_size, n_heads, facts.vocabulary if init == "copy" else 0)
        if init != "random":
            nn.init.zeros_(heads.blocks.weight)
            nn.init.zeros_(heads.blocks.bias)
        weight = model.get_output_embeddings().weight
        if heads.lm_heads is not None:
            heads.lm_heads.data.copy_(weight.detach().expand_as(heads.lm_heads))
        return heads.to(weight.device, weight.dtype).eval().requires_grad_(False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the input [..., N, D] of each head's LM head, from hidden states [..., D]."""
        return hidden.unsqueeze(-2) + F.silu(self.blocks(hidden)).unflatten(-1, (-1, hidden.shape[-1]))

    def logits(self, hidden: torch.Tensor, lm_head: nn.Module) -> torch.Tensor:
        """Logits [..., N, V] for hidden states [..., D]; head i predicts the token i + 2 positions after that of ``hidden``."""
        blocks = self(hidden)
        if self.lm_heads is None:
            return lm_head(blocks)
        return torch.einsum("...nd,nvd->...nv", blocks, self.lm_heads)
