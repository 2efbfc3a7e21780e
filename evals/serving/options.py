"""What the command was asked for, as the sections see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """Sizes of a run.

    Attributes:
        rounds: of each comparison.
        minutes: of the sections that run for a time; None for each one's own.
        clients: that ask at the same time.
        tokens: new tokens of each answer.
        prompt: tokens of the long prompt.
        work: folder for saved models and logs.
        tell: prints a line.
    """

    rounds: int
    minutes: float | None
    clients: int
    tokens: int
    prompt: int
    work: Path
    tell: Callable[[str], object]
