"""Logits processors of OpenAI's API. Each depends on a row's tokens only, so that `speculative` serves it in batches and with drafts."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import LogitsProcessor


class OpenAIPenalties(LogitsProcessor):
    """Presence and frequency penalty over the new tokens, as OpenAI defines them:
    ``logit[j] -= c[j] * frequency + (c[j] > 0) * presence``, with c[j] the count of token j.

    Args:
        prompt: number of tokens of the prompt, which do not count.
    """

    by_row = True

    def __init__(self, prompt: int, presence: float, frequency: float) -> None:
        self.prompt, self.presence, self.frequency = prompt, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V] after input_ids [B, T]."""
        new = input_ids[:, self.prompt :]
        counts = torch.zeros_like(scores).scatter_add_(1, new, torch.ones(new.shape, dtype=scores.dtype, device=scores.device))
        return scores - counts * self.frequency - (counts > 0) * self.presence


class LogitBias(LogitsProcessor):
    """Numbers that are added to the logits of single tokens.

    Args:
        bias: token id -> number.
    """

    by_row = True

    def __init__(self, bias: Mapping[int, float]) -> None:
        self.tokens = torch.tensor(list(bias), dtype=torch.int64)
        self.values = torch.tensor(list(bias.values()), dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores [B, V]."""
        values = self.values.to(scores.device, scores.dtype).expand(len(scores), -1)
        return scores.scatter_add(1, self.tokens.to(scores.device).expand(len(scores), -1), values)
