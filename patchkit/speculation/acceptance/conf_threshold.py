"""Acceptance by a threshold on the target's probability: `ConfThreshold`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchkit.speculation.acceptance import Acceptance, require_share


@dataclass(frozen=True)
class ConfThreshold(Acceptance, name="conf_threshold"):
    """Lossy: accepts a draft to which the target gives a probability of at least ``tau``."""

    example = "conf_threshold(0.3)"

    tau: float

    def __post_init__(self) -> None:
        require_share(self.name, "tau", self.tau)

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        return float(scores.softmax(-1)[token]) >= self.tau
