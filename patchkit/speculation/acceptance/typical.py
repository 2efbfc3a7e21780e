"""Typical acceptance: `Typical`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from patchkit.speculation.acceptance import Acceptance, require_share


@dataclass(frozen=True)
class Typical(Acceptance, name="typical"):
    """Lossy: typical acceptance (Cai et al. 2024, https://arxiv.org/abs/2401.10774, section 2.3.2).

    Accepts a draft x if p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats; epsilon is ``p`` and delta its square root.
    """

    example = "typical(0.09)"

    p: float

    def __post_init__(self) -> None:
        require_share(self.name, "p", self.p)

    def accepts(self, scores: torch.Tensor, token: int) -> bool:
        probabilities = scores.softmax(-1)
        entropy = torch.special.entr(probabilities).sum()
        return float(probabilities[token]) > min(self.p, self.p**0.5 * float(torch.exp(-entropy)))
