"""More drafts while most are accepted: `Adaptive`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from patchkit.speculation.controllers import Bounds, Controller, ControllerSession, checked_bounds
from patchkit.speculation.statistics import StepRecord


@dataclass(frozen=True)
class Adaptive(Controller, name="adaptive"):
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
        self.new_weights()

    def new_weights(self) -> None:
        options = self.options
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
