"""The table of all ops in Markdown, from the first paragraphs of their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from patchkit.kernels.op import Op, available_ops


def summary(function: Callable[..., Any]) -> str:
    """First paragraph of a docstring as one line, with single backticks; "" without a docstring."""
    first = (inspect.getdoc(function) or "").partition("\n\n")[0]
    return re.sub(r"`+", "`", " ".join(first.split())).removesuffix(".")


def backends(found: Op) -> str:
    """Names of an op's backends with their summaries; backends that run the same function are named together."""
    named: dict[Callable[..., Any], list[str]] = {}
    for name, backend in found.backends.items():
        named.setdefault(backend.run, []).append(f"`{name}`")
    return "; ".join(f"{', '.join(names)}: {summary(run)}" for run, names in named.items())


def markdown() -> str:
    """Table with a row for each registered op: name, summary of the reference, backends."""
    rows = ["| op | result | backends |", "|---|---|---|"]
    for name, found in available_ops().items():
        research = " (research)" if ".research." in found.reference.__module__ else ""
        cells = f"`{name}`{research}", summary(found.reference), backends(found)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
