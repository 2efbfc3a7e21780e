"""Lossless acceptance: `Exact`."""

from __future__ import annotations

from dataclasses import dataclass

from patchkit.speculation.acceptance import Acceptance


@dataclass(frozen=True)
class Exact(Acceptance, name="exact"):
    """The output of plain decoding, or its distribution.

    Greedy runs accept a draft if it is the target's most likely token. Sampled runs accept a deterministic draft if it is the token that
    the target draws, and a drawn one by rejection sampling (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192, algorithm 1; Chen
    et al. 2023, https://arxiv.org/abs/2302.01318), which leaves the target's distribution.
    """

    lossless = True
