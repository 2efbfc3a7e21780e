"""Calibration: how often drafts of a kind were accepted, as the estimate for the next ones."""

from __future__ import annotations

from collections.abc import Hashable

# Each outcome counts this much less per later outcome of its kind: some 100 are remembered.
_DECAY = 0.99
# Outcomes that the estimate before any outcome counts as.
_PRIOR_WEIGHT = 3.0


class Calibration:
    """Exponentially decaying acceptance rates by kind of draft."""

    def __init__(self) -> None:
        self._outcomes: dict[Hashable, tuple[float, float]] = {}

    def chance(self, kind: Hashable, prior: float) -> float:
        """Estimated probability that a draft of this kind is accepted; ``prior`` is the estimate before any outcome."""
        accepted, total = self._outcomes.get(kind, (0.0, 0.0))
        return (accepted + _PRIOR_WEIGHT * prior) / (total + _PRIOR_WEIGHT)

    def add(self, kind: Hashable, accepted: bool) -> None:
        """Learn from one draft that was reached: accepted, or the first that was rejected."""
        hits, total = self._outcomes.get(kind, (0.0, 0.0))
        self._outcomes[kind] = (_DECAY * hits + accepted, _DECAY * total + 1)
