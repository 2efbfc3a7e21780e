"""Controllers: how many tokens to draft in each round. One file per controller.

A controller is options; `begin` gives the session that holds what was measured. Keep one session for the life of a patch, and tell it of
every `new_text`: costs and acceptance are worth remembering, and an unsuitable drafter need not be measured again for every text.
"""

from __future__ import annotations

import ast
from abc import ABC, abstractmethod
from typing import Any

from patchkit.errors import SpecError
from patchkit.registered import Registered
from patchkit.speculation.statistics import StepRecord
from patchkit.spelled import parse_object

Bounds = tuple[int, int]


class ControllerSession(ABC):
    """A controller at work; lives as long as the patch."""

    @abstractmethod
    def choose(self) -> int:
        """K for the next round; 0 is a plain step."""

    def observe(self, record: StepRecord) -> None:  # noqa: B027
        """Learn from a round that has ended."""

    def new_text(self, tokens: int) -> None:  # noqa: B027
        """Prepare for another text, whose prompt has ``tokens`` tokens, before its first round."""

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


def controller(value: int | str | Controller) -> Controller:
    """Return the controller that a number (`Fixed`) or text such as "fixed(4)", "adaptive(target=0.8)" or "cost_model" stands for.

    Raises:
        SpecError: (a ValueError) an unknown name or option, a missing one, or a value that is refused.
        TypeError: value is none of the three.
    """
    from patchkit.speculation.controllers.fixed import Fixed

    if isinstance(value, Controller):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(value)
    if not isinstance(value, str):
        raise TypeError(f"k is {value!r}: give a number of drafts, a Controller, or one of {', '.join(Controller.available())}")
    number = _number(value)
    if number is None:
        return parse_object(value, "k", Controller.available)
    try:
        return Fixed(number)
    except ValueError as error:
        raise SpecError(str(error)) from error


def _number(text: str) -> Any:
    """The number that ``text`` is, in quotes in a spec string; None for other text."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, int | float) else None


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
