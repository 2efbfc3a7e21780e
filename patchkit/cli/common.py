"""Shared parts of the commands: the application, options, loading and patching, and printing of results."""

from __future__ import annotations

import json
import sys
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patchkit.errors import PatchError
from patchkit.measure.jsonable import jsonable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patchkit.patch import Patch
    from patchkit.record import Report

# torch and transformers take seconds to import, so each command imports what it needs.


class UsageError(PatchError):
    """The command is well-formed, but its arguments cannot be used."""


class _Commands(typer.core.TyperGroup):
    """Turns a PatchError of any command into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PatchError as error:
            stderr().print(f"error: {' '.join(str(error).split())}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Change how a Hugging Face causal language model runs: in one line, reversibly, with evidence.",
)


class Dtype(str, Enum):
    """Precision of the weights; `auto` is the one that the checkpoint was saved in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    auto = "auto"


_SHORT_DTYPES = {"fp32": Dtype.float32, "bf16": Dtype.bfloat16, "fp16": Dtype.float16}


def _dtype(text: str) -> Dtype:
    try:
        return _SHORT_DTYPES.get(text) or Dtype(text)
    except ValueError:
        known = ", ".join([*(dtype.value for dtype in Dtype), *_SHORT_DTYPES])
        raise typer.BadParameter(f"{text!r} is not one of {known}") from None


MODEL_HELP = "'bundled', 'smollm2', a model directory, a GGUF file, or a hub id."

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
PatchesOption = Annotated[
    str, typer.Option("--patches", metavar="SPEC", help="Patches, such as 'streaming(sinks=4, window=508)', or @FILE; default none.")
]
DtypeOption = Annotated[
    Dtype,
    typer.Option(
        "--dtype",
        parser=_dtype,
        metavar=f"[{'|'.join(dtype.value for dtype in Dtype)}]",
        help="Precision of the weights; fp32, bf16 and fp16 for short, auto for the checkpoint's own.",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs, such as 'cpu' or 'cuda'.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def load(model: str, dtype: Dtype = Dtype.float32, device: str = "cpu") -> tuple[Any, PreTrainedTokenizerBase]:
    from patchkit.models import find, load_model

    find(model)  # a wrong name fails before anything large is imported
    import transformers

    # patchkit reports what goes wrong; transformers' other remarks would hide it.
    transformers.logging.set_verbosity_error()
    loaded: Any
    loaded, tokenizer = load_model(model, dtype=dtype.value)
    try:
        return loaded.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot go to device {device!r} ({str(error).splitlines()[0]}): use --device cpu") from error


def parse(spec: str) -> list[Patch]:
    """The patches of a spec, before anything large is loaded. An empty spec means none."""
    from patchkit.spec import check_spelling, parse_spec

    if not spec.strip():
        return []
    check_spelling(spec)  # importing the patches takes seconds
    return parse_spec(spec)


def patch(model: PreTrainedModel, chosen: list[Patch]) -> None:
    from patchkit.api import patch_model

    if chosen:
        patch_model(model, *chosen, verbose=False)


def report(model: PreTrainedModel, chosen: list[Patch]) -> Report:
    """Report of the patches, with their counters so far; empty for an unpatched model."""
    from patchkit.api import report
    from patchkit.record import Report

    return report(model) if chosen else Report([])


def number_list(text: str, option: str, smallest: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 2,4,8", param_hint=option) from None
    if min(numbers) < smallest:
        raise typer.BadParameter(f"{min(numbers)} is too small: give at least {smallest}", param_hint=option)
    return list(dict.fromkeys(numbers))


def stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text ({error.reason} at byte {error.start}): pipe text in") from error


def stderr() -> Console:
    return Console(stderr=True)


def progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=stderr())


def emit(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(jsonable(result), allow_nan=False))


def print_table(console: Console, title: str | None, headings: list[str], rows: list[list[str]], right: bool = False) -> None:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if right and index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def word(value: Any) -> str:
    return "-" if value is None else str(value)
