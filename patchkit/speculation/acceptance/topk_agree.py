"""Acceptance of the k most likely tokens: `TopKAgree`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchkit.speculation.acceptance import Acceptance


@dataclass(frozen=True)
class TopKAgree(Acceptance, name="topk_agree"):
    """Lossy: accepts a draft that is among the target's ``k`` most likely tokens."""

    example = "topk_agree(2)"

    k: int

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or isinstance(self.k, bool) or self.k < 1:
            raise ValueError(f"topk_agree(k={self.k!r}): give a whole number, at least 1")

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return bool(scores[token] > -torch.inf) and int((scores > scores[token]).sum()) < self.k
