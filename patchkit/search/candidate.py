"""Candidates of a search, and the interface of what measures them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from patchkit.measure.paired import Interval, median_ratio
from patchkit.patch import NO_PATCH, Patch

Kind = Literal["slower", "beyond the bound", "refused", "conflict", "error", "no time", "beaten"]

# Documents that a confidence interval needs.
LEAST_DOCUMENTS = 4


@dataclass(frozen=True)
class Lost:
    """Reason why a candidate was not chosen: one of `Kind`, and an explanation."""

    kind: Kind
    why: str


@dataclass
class Candidate:
    """A combination of patches and its measurements so far.

    Attributes:
        patches: empty for the unpatched model.
        unpatched_ms, patched_ms: milliseconds per token, one entry per round; entries of one round belong together.
        increase: its perplexity / the reference's, minus 1.
        documents: number of documents that `increase` was measured on.
        idle: its patches that never acted at this length.
        lost: why it was not chosen; None for the chosen candidate, and before the choice.
    """

    patches: tuple[Patch, ...]
    unpatched_ms: list[float] = field(default_factory=list)
    patched_ms: list[float] = field(default_factory=list)
    increase: Interval | None = None
    documents: int = 0
    idle: list[str] = field(default_factory=list)
    lost: Lost | None = None

    @property
    def spec(self) -> str:
        """Its spec string, "none" for no patch."""
        return " + ".join(patch.spec for patch in self.patches) or NO_PATCH

    @property
    def speedup(self) -> Interval | None:
        """Unpatched / patched, the median over rounds; None before it was timed."""
        if not self.patches:
            return Interval(1.0, 1.0, 1.0)
        return median_ratio(self.unpatched_ms, self.patched_ms) if self.patched_ms else None

    @property
    def speed(self) -> float:
        """The speed-up without its interval, 0 before it was timed."""
        if not self.patches:
            return 1.0
        ratios = [plain / own for plain, own in zip(self.unpatched_ms, self.patched_ms, strict=True)]
        return statistics.median(ratios) if ratios else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "spec": self.spec,
            "speedup": self.speedup and vars(self.speedup),
            "ms_per_token": statistics.median(self.patched_ms) if self.patched_ms else None,
            "unpatched_ms_per_token": statistics.median(self.unpatched_ms) if self.unpatched_ms else None,
            "rounds": len(self.patched_ms),
            "ppl_increase": self.increase and vars(self.increase),
            "documents": self.documents,
            "idle": self.idle,
            "lost": self.lost and vars(self.lost),
        }


class Measurer(Protocol):
    """Interface through which the search measures a candidate. Methods may raise anything; `OutOfTime` ends that measurement."""

    documents: int
    rounds: int

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        """Return milliseconds per token, unpatched and patched, of each round: at most ``rounds``, in about ``seconds``."""

    def increase(self, patches: tuple[Patch, ...], documents: int) -> Interval:
        """Return perplexity / the reference's, minus 1, on the first ``documents`` documents."""

    def idle(self, patches: tuple[Patch, ...]) -> list[str]:
        """Return the names of patches that have not acted so far."""

    def drop(self, patches: tuple[Patch, ...]) -> None:
        """Free the memory that is held for a candidate that will not be measured again."""


def specs_of(patches: Sequence[Patch]) -> tuple[str, ...]:
    """Specs of a combination, as a key: not every option can be hashed."""
    return tuple(patch.spec for patch in patches)


def percent(increase: Interval | None) -> str:
    """Format an increase: +0.30 % [-0.10, +0.70]."""
    if increase is None:
        return "-"
    return f"{100 * increase.value:+.2f} % [{100 * increase.low:+.2f}, {100 * increase.high:+.2f}]"
