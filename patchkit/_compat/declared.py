"""The names that the modules of this folder declare next to the code that uses them, and whether the installed libraries have them.

A module declares in ``RELIED_ON`` what the first `patch_model` checks; in ``RELIED_ON_WHEN_USED`` what `check_when_used` checks, because
the library is optional or slow to import; and in ``MAY_BE_MISSING`` the private names that it can do without, each with the reason.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from importlib.metadata import version
from typing import Any

from patchkit.errors import PatchError

_HERE = __name__.rpartition(".")[0]

# "module:name.name" and what patchkit needs of it: None, it exists; a tuple, its first arguments, where patchkit passes or overrides them
# by position; a set, arguments that can be given by name. "Class()" is an instance made without arguments.
Names = dict[str, tuple[str, ...] | frozenset[str] | None]


def relied_on() -> Names:
    """Every name that a module of this folder declares in ``RELIED_ON``."""
    found: Names = {}
    for each in pkgutil.iter_modules(importlib.import_module(_HERE).__path__, f"{_HERE}."):
        found |= getattr(importlib.import_module(each.name), "RELIED_ON", {})
    return found


def changed_names(names: Names | None = None) -> list[str]:
    """Each of ``names`` (of `relied_on()`) that is missing or takes other arguments than patchkit was written for.

    Arguments that were added behind those are no change: patchkit hands on what it does not know.
    """
    return [problem for path, wanted in (relied_on() if names is None else names).items() if (problem := _problem(path, wanted))]


@functools.cache
def check_when_used(module: str, library: str, remedy: str) -> None:
    """Check the ``RELIED_ON_WHEN_USED`` of one module of this folder, once.

    Args:
        module: name of the module, such as "compiler".
        library: name of the distribution that has the names, for its version in the message.
        remedy: last sentence of the message.

    Raises:
        PatchError: a name is missing or has changed.
    """
    changed = changed_names(importlib.import_module(f"{_HERE}.{module}").RELIED_ON_WHEN_USED)
    if changed:
        raise PatchError(f"{library} {version(library)} differs from what patchkit relies on: {'; '.join(changed)}. {remedy}")


def _problem(path: str, wanted: tuple[str, ...] | frozenset[str] | None) -> str | None:
    module, _, name = path.partition(":")
    try:
        found: Any = functools.reduce(_part, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, TypeError):  # an instance may need arguments
        return f"{module}.{name} is missing"
    if wanted is None:
        return None
    parameters = inspect.signature(found).parameters
    actual = tuple(parameters)
    if isinstance(wanted, frozenset):
        missing = sorted(wanted - {*actual})
        return f"{module}.{name}({missing[0]}=) is missing" if missing else None
    needs_more = any(parameters[each].default is inspect.Parameter.empty for each in _named(parameters, len(wanted)))
    if actual[: len(wanted)] != wanted or needs_more:
        return f"{module}.{name} takes ({', '.join(actual)}), expected ({', '.join(wanted)})"
    return None


def _part(holder: Any, name: str) -> Any:
    """``holder.name``; a field that a class only annotates exists too, on its instances."""
    if name.endswith("()"):
        return getattr(holder, name.removesuffix("()"))()
    if isinstance(holder, type) and name in getattr(holder, "__annotations__", {}):
        return getattr(holder, name, None)
    return getattr(holder, name)


def _named(parameters: Any, start: int) -> list[str]:
    """The parameters from number ``start`` on that a caller can name."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in list(parameters.items())[start:] if parameter.kind not in variadic]
