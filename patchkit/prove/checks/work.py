"""Cost of a check in forwards and tokens."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Cost: number of forwards of a few tokens, which are bound by reading the weights, and of tokens in long forwards."""

    steps: float
    tokens: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.steps + other.steps, self.tokens + other.tokens)
