"""Controllers: how many tokens to draft in each round. One file per controller.

A controller is options; `begin` gives the session that holds what was measured. Keep one session for the life of a patch, and tell it of
every `new_text`: costs and acceptance are worth remembering, and an unsuitable drafter need not be measured again for every text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from patchkit.registered import Registered
from patchkit.speculation.statistics import StepRecord

Bounds = tuple[int, int]


class ControllerSession(ABC):
    """A controller at work; lives as long as the patch."""

    @abstractmethod
    def choose(self) -> int:
        """K for the next round; 0 is a plain step."""

    def most(self) -> int:
        """The largest K worth asking a drafter for whose proposals come with chances; `worth` then cuts the proposal."""
        return self.choose()

    def worth(self, chances: Sequence[Sequence[float]]) -> int:
        """Number of drafts per row to verify, given each row's chances of acceptance; by default all."""
        return max(map(len, chances))

    def observe(self, record: StepRecord) -> None:  # noqa: B027
        """Learn from a round that has ended."""

    def new_text(self, tokens: int) -> None:  # noqa: B027
        """Prepare for another text, whose prompt has ``tokens`` tokens, before its first round."""

    def new_weights(self) -> None:  # noqa: B027
        """Forget what was measured of acceptance: the model's weights have changed."""

    def predicted_speedup(self) -> float | None:
        """Plain over speculative time per token at the K that would be chosen now; None if that is not known."""
        return None

    def why_plain(self) -> str | None:
        """Why `choose` may have given 0 again and again; None if that is what was asked for."""
        return "no number of drafts is expected to pay"


class Controller(Registered, ABC, kind="controller", folder="patchkit.speculation.controllers"):
    """Options of one rule for choosing K: a frozen dataclass, validated in `__post_init__`, without run-time state.

    A subclass with ``name="name"`` is known to spec strings: `speculative(k=name)`.
    """

    @abstractmethod
    def begin(self) -> ControllerSession:
        """A fresh session."""


def checked_bounds(bounds: Any, smallest: int) -> Bounds:
    """The smallest and the largest K as a tuple.

    Raises:
        ValueError: they are not two whole numbers, ``smallest`` or more, the smaller first.
    """
    remedy = f"give two whole numbers, {smallest} or more, the smaller first, such as ({smallest}, 8)"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(type(bound) is int for bound in bounds):
        raise ValueError(f"bounds is {bounds!r}: {remedy}")
    if not smallest <= bounds[0] <= bounds[1]:
        raise ValueError(f"bounds is {tuple(bounds)}: {remedy}")
    return bounds[0], bounds[1]
