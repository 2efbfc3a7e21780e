"""The tables of documents that registries fill: patches, their options, and the objects that options take."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from patchkit.cli.common import UsageError
from patchkit.spelled import is_required, options_of, spell

_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Markdown tables by name: `patches`, `options`, `drafters`, `controllers` and `acceptances`; a row for each registered class."""
    from patchkit.patch import available_patches
    from patchkit.speculation import Acceptance, Controller, Drafter

    patches = available_patches()
    return {
        "patches": _table(
            ("I want", "patch", "exact?", "costs and limits", "source"),
            (_facts(cls) for cls in patches.values()),
        ),
        "options": _objects("patch", patches),
        "drafters": _objects("drafter", Drafter.available()),
        "controllers": _objects("controller", Controller.available()),
        "acceptances": _objects("acceptance", Acceptance.available()),
    }


def fill(page: Path) -> bool:
    """Rewrite the tables of a page, between ``<!-- table: NAME -->`` and ``<!-- end of table -->``; return whether it changed.

    Raises:
        UsageError: the page cannot be read, has no such place, or one for a table that does not exist.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{page} cannot be read ({error}): give a Markdown page") from error
    filled = filled_in(text)
    if filled is None:
        raise UsageError(f"{page} has no place for a table: write <!-- table: patches --> and <!-- end of table --> on lines of their own")
    page.write_text(filled, encoding="utf-8")
    return filled != text


def filled_in(text: str) -> str | None:
    """``text`` with its tables as they are today; None where it has no place for one.

    Raises:
        UsageError: a place names a table that does not exist.
    """
    known = tables()

    def table(place: re.Match[str]) -> str:
        begin, name, end = place.groups()
        if name not in known:
            raise UsageError(f"there is no table {name!r}: name one of {', '.join(known)}")
        return f"{begin}\n{known[name]}\n{end}"  # Python-Markdown wants empty lines around a table

    return _TABLE.sub(table, text) if _TABLE.search(text) else None


def signature(cls: type[Any]) -> str:
    """The class as a spec string with all options and their defaults; an option without a default has its name alone."""
    options = (name if is_required(field) else f"{name}={spell(default_of(field))}" for name, field in options_of(cls).items())
    written = ", ".join(options)
    return f"{cls.name}({written})" if written else str(cls.name)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of an option that has one."""
    return field.default_factory() if callable(field.default_factory) else field.default


def summary(cls: type[Any]) -> str:
    """The first line of the class's documentation as Markdown, without its full stop."""
    return (cls.__doc__ or "").strip().partition("\n")[0].removesuffix(".").replace("``", "`")


def _facts(cls: type[Any]) -> tuple[str, ...]:
    facts = cls.facts
    return facts.goal or summary(cls), f"`{cls.name}`", facts.exact or ("yes" if cls.exact else "no"), facts.cost, facts.source


def _objects(kind: str, classes: Mapping[str, type[Any]]) -> str:
    return _table((kind, "what it does"), ((f"`{signature(cls)}`", summary(cls)) for cls in classes.values()))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = tuple(head)
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
