"""How many tokens to draft: `Fixed`, `Adaptive`, and `CostModel`, which measures and may decide not to draft at all.

A controller is options; `begin` gives the session that holds what was measured. Keep one session for the life of a patch, and tell it of
every `new_text`: costs and acceptance are worth remembering, and an unsuitable drafter need not be found out again and again.

CostModel maximises, over K, expected tokens per millisecond of a whole round:

    (1 + a_1 + a_1 a_2 + ... + a_1...a_K) / (draft(K) + verify(K) + overhead(K))

with the terms of Leviathan et al. 2023 (arXiv 2211.17192, section 3.3). Differs from the paper in that acceptance is estimated by
position, costs are measured while generating, and K = 0, a plain step, competes with the rest.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from patchkit.errors import SpecError
from patchkit.speculation.cost_model import CostModel
from patchkit.speculation.draft_lengths import Adaptive, Controller, Fixed

CONTROLLERS: dict[str, type[Controller]] = {"fixed": Fixed, "adaptive": Adaptive, "cost_model": CostModel}


def controller(value: int | str | Controller) -> Controller:
    """The controller that a number (`Fixed`) or a text such as "fixed(4)", "adaptive(target=0.8)" or "cost_model" stands for.

    Raises:
        SpecError: (a ValueError) an unknown name or option, a missing one, or a value that is refused.
        TypeError: value is none of the three.
    """
    if isinstance(value, Controller):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(value)
    if isinstance(value, str):
        result: Controller = parse_call(value, CONTROLLERS, "k")
        return result
    raise TypeError(f"k is {value!r}: give a number of drafts, a Controller, or one of {', '.join(CONTROLLERS)}")


def parse_call(text: str, classes: Mapping[str, type[Any]], what: str) -> Any:
    """An object from `name` or `name(value, option=value)`, with Python literals as values.

    Args:
        classes: dataclasses by name.
        what: the option that is being read, for messages.

    Raises:
        SpecError: bad syntax, an unknown name or option, a missing option, or a value that the class refuses.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"cannot read {what}={text!r}: write it like '{next(iter(classes))}' or 'name(option=value)'") from error
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if isinstance(node, ast.Constant | ast.UnaryOp):  # a bare number, which belongs to the first class
        call = ast.Call(ast.Name(next(iter(classes))), [node], [])
    name = call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    if name not in classes:
        nearest = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        guess = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise SpecError(f"unknown {what} {name!r}: {guess}available: {', '.join(classes)}")
    fields = [field for field in dataclasses.fields(classes[name]) if field.init]
    options = ", ".join(field.name for field in fields)
    try:
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (ValueError, TypeError, SyntaxError) as error:
        raise SpecError(f"{text}: values must be literals such as 4, 0.5 or (0, 8)") from error
    if len(values) > len(fields) or not named.keys() <= {field.name for field in fields[len(values) :]}:
        raise SpecError(f"{text}: {name} takes {options}, each at most once")
    given = dict(zip((field.name for field in fields), values, strict=False)) | named
    for field in fields:
        if field.name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpecError(f"{text}: {name} needs {field.name}: write {name}({field.name}=...)")
    try:
        return classes[name](**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{text}: {error}") from error
