"""`patchkit tune`."""

from __future__ import annotations

import logging
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    UsageError,
    app,
    emit,
    load,
    parse,
    print_table,
    progress,
    stderr,
)

if TYPE_CHECKING:
    from patchkit.search.tune import Tuning


class Objective(str, Enum):
    """Timed work: single steps, or whole calls of generate."""

    decode = "decode"
    generate = "generate"


@app.command()
def tune(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", metavar="FILE|stdlib", help="What perplexity is measured on, and prompts.")] = "stdlib",
    max_ppl_increase: Annotated[
        str, typer.Option("--max-ppl-increase", metavar="X%", help="The most that perplexity may increase.")
    ] = "1%",
    minutes: Annotated[float, typer.Option(min=0.01, help="The most that the search may take.")] = 10.0,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens before the timed ones. Default: half the model's positions, at most 1024.")
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="What is timed: steps of one token, or whole calls of generate for 64 tokens.")
    ] = Objective.generate,
    also: Annotated[list[str] | None, typer.Option("--also", metavar="SPEC", help="A patch to try as well; may be repeated.")] = None,
    without: Annotated[list[str] | None, typer.Option("--without", metavar="NAME", help="A patch to leave out; may be repeated.")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the spec is written.", dir_okay=False)] = Path("tuned.spec"),
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Find the fastest spec for a model on this machine that keeps its perplexity; --patches @FILE reads it."""
    bound = _share(max_ppl_increase)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or write elsewhere")
    extra = [patch for spec in also or [] for patch in parse(spec)]
    from patchkit.search import tune as search

    loaded, tokenizer = load(model, dtype, device)
    # Patches log their refusals and warnings while they are tried; the table holds them.
    logging.getLogger("patchkit").setLevel(logging.ERROR)
    started = time.monotonic()
    try:
        with progress() as bar:
            task = bar.add_task("", total=60 * minutes)

            def advance(spec: str) -> None:
                bar.update(task, description=spec, completed=time.monotonic() - started)

            found = search.tune(
                loaded, tokenizer, text, bound, minutes, context, objective.value, extra, without or [], model, advance
            )  # fmt: skip
            bar.update(task, description="done", completed=60 * minutes)
    except KeyboardInterrupt:
        stderr().print("stopped before anything was measured: no spec was written")
        raise typer.Exit(130) from None
    try:
        found.write(out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out. The spec is: {found.best.spec}") from error
    if as_json:
        emit({**found.to_dict(), "out": str(out)})
    else:
        _show(found, out)


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 10:
        raise typer.BadParameter(f"{text!r} is not a share such as 1% or 0.01", param_hint="--max-ppl-increase")
    return share


def _show(found: Tuning, out: Path) -> None:
    """Print a table of the timed candidates, the reasons why others were not timed, and the choice."""
    from patchkit.search.candidate import percent

    console = Console()
    console.width = max(console.width, 150)
    rows = []
    for each in found.candidates:
        if each.speedup is None:
            continue
        ms = f"{each.to_dict()['ms_per_token']:.2f}" if each.patched_ms else ""
        verdict = "chosen" if each is found.best else each.lost.kind if each.lost else ""
        rows.append([each.spec, ms, str(each.speedup), percent(each.increase), str(each.documents), verdict])
    settings = found.settings
    title = (
        f"{settings['model']}: {settings['objective']} at context {settings['context']}; perplexity over that of {settings['reference']}"
    )
    headings = ["spec", "ms per token", "speed-up", "perplexity increase", "documents", ""]
    print_table(console, title, headings, rows)
    left: dict[tuple[str, str], list[str]] = {}
    for each in found.candidates:
        if each.speedup is None and each.lost:
            left.setdefault((each.lost.kind, each.lost.why), []).append(each.spec)
    for (kind, why), specs in left.items():
        console.print(f"{kind}: {', '.join(specs)}: {' '.join(why.split())}", markup=False, highlight=False, soft_wrap=True)
    for name, why in found.untried.items():
        console.print(f"not tried: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    stopped = ", stopped early" if found.stopped else ""
    console.print(f"{found.summary}\nwritten to {out} after {found.seconds:.0f} s{stopped}", markup=False, highlight=False, soft_wrap=True)
