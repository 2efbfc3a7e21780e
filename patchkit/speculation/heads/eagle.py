"""The EAGLE head.

Shapes: R rows, T positions, N heads, D hidden size, E embedding size, V vocabulary. H attention heads of size d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchkit.speculation.heads.base import Heads

_ROPE_BASE = 10000.0


class KeyValues:
    """Keys and values of an `EagleHead`: growing buffers [R, room, H, d], in which a slot is overwritten when drafts were rejected."""

    def __init__(self, head: EagleHead, rows: int):
        weight = head.qkv.weight
        self.keys = weight.new_zeros(rows, 0, head.n_heads, head.head_size)  # zeros, because masked keys must be finite too
        self.values = self.keys.clone()
        self.angles = head.angles(torch.arange(0, device=weight.device))
        self.head = head

    def reserve(self, room: int) -> None:
        """Grow the buffers to at least ``room`` slots."""
        if room > self.keys.shape[1]:
            room = max(room, 2 * self.keys.shape[1], 256)
            more = (0, 0, 0, 0, 0, room - self.keys.shape[1])
            self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
            self.angles = self.head.angles(torch.arange(room, device=self.keys.device))

    def join(self, other: KeyValues) -> None:
        """Append the rows of another, and their keys and values."""
        self.reserve(other.keys.shape[1])
        more = (0, 0, 0, 0, 0, self.keys.shape[1] - other.keys.shape[1])
        self.keys = torch.cat([self.keys, F.pad(other.keys, more)])
        self.values = torch.cat([self.values, F.pad(other.values, more)])

    def select_rows(self, rows: list[int]) -> None:
        """Keep only these rows."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class EagleHead(Heads):
    """EAGLE (Li et al. 2024, https://arxiv.org/abs/2401.15077): one decoder layer that continues the last hidden states.

    From the hidden state at a position and the embedding of the next token, it computes the hidden state at that token. It uses
    LayerNorm, which torch runs as one operation where RMSNorm takes several; on a CPU the number of operations sets the time of a step.

    Args:
        hidden_size, embedding_size: D and E.
        n_heads: attention heads; default one for every 64 dimensions.
        intermediate_size: of the gated MLP; default 8/3 D, rounded up to a multiple of 32.
        layers: indices of decoder layers whose outputs, joined by a linear map, are the features in place of the last hidden states: the
            features of EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840); None for the last hidden states.
    """

    kind = "eagle"

    def __init__(
        self,
        hidden_size: int,
        embedding_size: int,
        n_heads: int | None = None,
        intermediate_size: int | None = None,
        layers: Sequence[int] | None = None,
    ):
        n_heads = n_heads or next(n for n in range(max(1, hidden_size // 64), 0, -1) if hidden_size % (2 * n) == 0)
        intermediate_size = intermediate_size or -(-8 * hidden_size // 96) * 32
        super().__init__({
            "hidden_size": hidden_size, "embedding_size": embedding_size, "n_heads": n_heads, "intermediate_size": intermediate_size,
            **({"layers": list(layers)} if layers else {}),
        })  # fmt: skip
        self.layers = tuple(layers or ())
        if self.layers:
            self.norm_layers = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in self.layers)
            self.fuse = nn.Linear(len(self.layers) * hidden_size, hidden_size, bias=False)
        self.n_heads, self.head_size = n_heads, hidden_size // n_heads
        self.norm_embedding = nn.LayerNorm(embedding_size)
        self.norm_feature = nn.LayerNorm(hidden_size)
        self.joined = nn.Linear(embedding_size + hidden_size, hidden_size, bias=False)
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attended = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self.gate_up = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.norm_out = nn.LayerNorm(hidden_size)
        nn.init.zeros_(self.attended.weight)
        nn.init.zeros_(self.down.weight)

    def features(self, hidden: torch.Tensor) -> torch.Tensor:
        """Features [..., D] that the head continues.

        Args:
            hidden: [..., D], the last hidden states; with `layers`, [..., (1 + len(layers)) D], these and the layers' outputs.
        """
        size = self.options["hidden_size"]
        if not self.layers:
            return hidden[..., :size]
        outputs = hidden[..., size:].split(size, -1)
        return self.fuse(torch.cat([norm(output) for norm, output in zip(self.norm_layers, outputs, strict=True)], -1))

    def angles(self, positions: torch.Tensor) -> torch.Tensor:
        """Rotations [..., 1, d/2] complex64 of queries and keys by positions [...]."""
        frequencies = _ROPE_BASE ** -(torch.arange(0, self.head_size, 2, device=positions.device) / self.head_size)
        angle = (positions[..., None, None] * frequencies).float()
        return torch.polar(torch.ones_like(angle), angle)

    def layer_input(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Input [R, T, D] of the layer, from the next tokens' embeddings [R, T, E] and hidden states [R, T, D]."""
        return self.joined(torch.cat((self.norm_embedding(embedded), self.norm_feature(features)), -1))

    def project(self, x: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries and keys, and values, each [R, T, H, d], of the layer's input [R, T, D]."""
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3 * self.n_heads, self.head_size))
        queries_keys, values = qkv.split((2 * self.n_heads, self.n_heads), -2)
        rotated = torch.view_as_complex(queries_keys.float().unflatten(-1, (-1, 2))) * angles
        queries, keys = torch.view_as_real(rotated).flatten(-2).to(x.dtype).chunk(2, -2)
        return queries, keys, values

    def layer_output(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Next hidden states [R, T, D], from the layer's input [R, T, D] and the attention heads' outputs [R, T, H, d]."""
        x = x + self.attended(attended.flatten(-2))
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return self.norm_out(x + self.down(F.silu(gate) * up))

    def forward(
        self,
        embedded: torch.Tensor,
        features: torch.Tensor,
        memory: KeyValues,
        slots: slice | torch.Tensor,
        positions: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the next hidden states [R, T, D].

        Args:
            embedded: [R, T, E], the embedding of the token after each position.
            features: [R, T, D], the hidden state at each position.
            memory: keys and values with room for every slot; written at ``slots``.
            slots: slots of the T positions, a slice if R = 1, otherwise [R, T] int64. A position sees the slots up to its own.
            positions: [R, T] int64, where they are not the slots: in trees.
            visible: [R, T, S] bool, which of the first S slots each position sees, its own included; None for those up to its own.
        """
        x = self.layer_input(embedded, features)
        queries, keys, values = self.project(x, memory.angles[slots if positions is None else positions])
        rows, steps = x.shape[:2]
        if isinstance(slots, slice):
            at: Any = (slice(None), slots)
            seen = slots.stop
            mask = None if steps == 1 else torch.arange(seen, device=x.device) <= torch.arange(slots.start, seen, device=x.device)[:, None]
        else:
            at = (torch.arange(rows, device=x.device)[:, None], slots)
            seen = int(slots.max()) + 1 if visible is None else visible.shape[-1]
            mask = (torch.arange(seen, device=x.device) <= slots[..., None] if visible is None else visible)[:, None]
        memory.keys[at], memory.values[at] = keys, values
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2),
            memory.keys[:, :seen].transpose(1, 2),
            memory.values[:, :seen].transpose(1, 2),
            attn_mask=mask,
        )
        return self.layer_output(x, attended.transpose(1, 2))

    def unrolled(self, embedded: torch.Tensor, features: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """Hidden states of drafts of 1 ... ``steps`` tokens that end at each position, for training.

        The head sees its own outputs of up to ``steps - 1`` positions, in features and in keys and values, as when it drafts: the
        training-time test of EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840).

        Args:
            embedded: [R, T, E], the embedding of the token after each position of a whole sequence.
            features: [R, T, D], the hidden state at each position.

        Returns:
            ``steps`` tensors [R, T, D]; the first ``j`` positions of the tensor of index ``j`` are meaningless.
        """
        length = features.shape[1]
        positions = torch.arange(length, device=features.device)
        angles = self.angles(positions)
        outputs: list[torch.Tensor] = []
        drafted: list[tuple[torch.Tensor, torch.Tensor]] = []
        for j in range(steps):
            x = self.layer_input(embedded, features)
            queries, keys, values = self.project(x, angles)
            if j == 0:
                true_keys, true_values = keys, values
                attended = F.scaled_dot_product_attention(
                    queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), is_causal=True
                )
                outputs.append(self.layer_output(x, attended.transpose(1, 2)))
                features = outputs[-1].roll(1, 1)
                continue
            drafted.append((keys, values))
            # A draft that ends here began j positions earlier: before that it saw true features, after that its own.
            scores = torch.einsum("rqhd,rkhd->rhqk", queries, true_keys)
            scores = scores.masked_fill(positions > (positions[:, None] - j).clamp(min=0), float("-inf"))
            own = [(queries * k.roll(j - i, 1)).sum(-1).transpose(1, 2)[..., None] for i, (k, _) in enumerate(drafted, 1)]
            weights = (torch.cat([scores, *own], -1) * self.head_size**-0.5).softmax(-1)
            attended = torch.einsum("rhqk,rkhd->rqhd", weights[..., :length], true_values)
            for i, (_, v) in enumerate(drafted, 1):
                attended = attended + weights[..., length + i - 1].transpose(1, 2)[..., None] * v.roll(j - i, 1)
            outputs.append(self.layer_output(x, attended))
            features = outputs[-1].roll(1, 1)
        return outputs
