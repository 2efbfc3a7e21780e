"""Rows of a search, and whoever measures them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from patchkit.measure.paired import Interval, median_ratio
from patchkit.patch import NO_PATCH, Patch

Kind = Literal["slower", "beyond the bound", "refused", "conflict", "error", "no time", "beaten"]

# Documents that an interval needs.
LEAST_DOCUMENTS = 4


class OutOfTime(BaseException):
    """The time for a measurement is over; the message says which.

    Like KeyboardInterrupt, it is no Exception, so that no library takes it for one of its own.
    """


@dataclass(frozen=True)
class Lost:
    """Why a candidate was not chosen, in one of `Kind` and in words."""

    kind: Kind
    why: str


@dataclass
class Candidate:
    """A candidate and what is known of it.

    Attributes:
        patches: none of them for the unpatched model.
        unpatched_ms, patched_ms: milliseconds per token, one entry per round; entries of one round belong together.
        increase: its perplexity over the reference's, minus 1.
        documents: how many the increase is of.
        idle: its patches that never acted at this length.
        lost: None for what was chosen.
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
    """What the search asks about a candidate. Both methods may raise anything; `OutOfTime` ends the candidate's turn."""

    documents: int
    rounds: int

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        """Milliseconds per token unpatched and patched, by round: at most so many rounds, in about so many seconds."""

    def increase(self, patches: tuple[Patch, ...], documents: int) -> Interval:
        """Perplexity over the reference's, minus 1, on the first so many documents."""

    def idle(self, patches: tuple[Patch, ...]) -> list[str]:
        """The patches that have not acted so far."""

    def drop(self, patches: tuple[Patch, ...]) -> None:
        """Free what is held for a candidate that will not be measured again."""


def specs_of(patches: Sequence[Patch]) -> tuple[str, ...]:
    """What a combination is known by: not every option can be hashed."""
    return tuple(patch.spec for patch in patches)


def percent(increase: Interval | None) -> str:
    """An increase as text: +0.3 % [-0.1, +0.7]."""
    if increase is None:
        return "-"
    return f"{100 * increase.value:+.2f} % [{100 * increase.low:+.2f}, {100 * increase.high:+.2f}]"
