"""What a check costs, counted rather than timed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Forwards of a few tokens, which wait for the weights, and tokens in forwards of many."""

    steps: float
    tokens: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.steps + other.steps, self.tokens + other.tokens)
