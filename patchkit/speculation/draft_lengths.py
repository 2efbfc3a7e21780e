"""Controllers: how many tokens to draft in each round. Fixed and adaptive ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import Any

from patchkit.speculation.statistics import StepRecord

Bounds = tuple[int, int]


class ControllerSession(ABC):
    """A controller at work; lives as long as the patch."""

    @abstractmethod
    def choose(self) -> int:
        """K for the next round; 0 is a plain step."""

    def observe(self, record: StepRecord) -> None:  # noqa: B027
        """After a round."""

    def new_text(self, tokens: int) -> None:  # noqa: B027
        """Before the first round of another text, whose prompt has so many tokens."""

    def predicted_speedup(self) -> float | None:
        """Plain over speculative time per token at the K that would be chosen now; None if that is not known."""
        return None

    def why_plain(self) -> str | None:
        """Why `choose` may have given 0 again and again; None if that is what was asked for."""
        return "no number of drafts is expected to pay"


class Controller(ABC):
    """Options of a way to choose K: a frozen dataclass, validated in `__post_init__`, without run-time state."""

    @abstractmethod
    def begin(self) -> ControllerSession:
        """A fresh session."""


@dataclass(frozen=True)
class Fixed(Controller):
    """Always K.

    Attributes:
        k: drafts per round; 0 is plain decoding.
    """

    k: int

    def __post_init__(self) -> None:
        _check_count("k", self.k)

    def begin(self) -> ControllerSession:
        return _FixedSession(self.k)


@dataclass
class _FixedSession(ControllerSession):
    k: int

    def choose(self) -> int:
        return self.k

    def why_plain(self) -> str | None:
        return None


@dataclass(frozen=True)
class Adaptive(Controller):
    """More drafts while most are accepted, fewer while not. Knows no costs, hence never stops drafting if bounds start above 0.

    Attributes:
        target: acceptance rate, over the last `window` rounds, above which K goes up and below which it goes down.
        window: rounds.
        step: by how much K goes up or down.
        bounds: smallest and largest K; a session starts half-way.
    """

    target: float = 0.7
    window: int = 16
    step: int = 1
    bounds: Bounds = (1, 8)

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target is {self.target}: give an acceptance rate between 0 and 1, such as 0.7")
        for name in ("window", "step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        object.__setattr__(self, "bounds", checked_bounds(self.bounds, smallest=1))

    def begin(self) -> ControllerSession:
        return _AdaptiveSession(self)


class _AdaptiveSession(ControllerSession):
    def __init__(self, options: Adaptive) -> None:
        self.options = options
        self.k = (options.bounds[0] + options.bounds[1] + 1) // 2
        self.rounds: deque[tuple[int, int]] = deque(maxlen=options.window)

    def choose(self) -> int:
        return self.k

    def observe(self, record: StepRecord) -> None:
        if record.longest == 0:
            return
        self.rounds.append((sum(record.proposed), sum(record.accepted)))
        proposed, accepted = (sum(column) for column in zip(*self.rounds, strict=True))
        rate = accepted / proposed
        if rate != self.options.target:
            step = self.options.step if rate > self.options.target else -self.options.step
            self.k = min(max(self.k + step, self.options.bounds[0]), self.options.bounds[1])


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give a whole number, 0 (plain decoding) or more")
    if value < 0:
        raise ValueError(f"{name} is {value}: give 0 (plain decoding) or more drafts per round")


def checked_bounds(bounds: Any, smallest: int) -> Bounds:
    remedy = f"give two whole numbers, {smallest} or more, the smaller first, such as ({smallest}, 8)"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(type(bound) is int for bound in bounds):
        raise ValueError(f"bounds is {bounds!r}: {remedy}")
    if not smallest <= bounds[0] <= bounds[1]:
        raise ValueError(f"bounds is {tuple(bounds)}: {remedy}")
    return bounds[0], bounds[1]
