"""The option `k` of `Speculative`: what a user may give, and the controller that it names."""

from __future__ import annotations

import ast
from typing import Any

from patchkit.errors import SpecError
from patchkit.speculation.controllers import Controller
from patchkit.speculation.controllers.fixed import Fixed
from patchkit.spelled import parse_object


def read_controller(value: int | str | Controller) -> Controller:
    """Return the controller that ``value`` names: a number (`Fixed`), or text such as "fixed(4)", "adaptive(target=0.8)" or "cost_model".

    Raises:
        SpecError: (a ValueError) an unknown name or option, a missing one, or a value that is refused.
        TypeError: value is none of the three.
    """
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
