"""`patchkit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patchkit.cli.common import (
    MODEL_HELP,
    JsonOption,
    UsageError,
    app,
    emit,
    load,
    number_list,
    progress,
)


@app.command()
def demo(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} Default 'bundled'.")] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="The same, as an option.")] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=2, metavar="N", help="Tokens of text to stream; default 16384, or one and a half times a limit above 2048."),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="StreamingLLM windows in tokens; default 508,252,124, or shares of a limit above 2048."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.", dir_okay=False)] = Path("patchkit-demo.png"),
    as_json: JsonOption = False,
) -> None:
    """Stream real text through a model, unpatched and with StreamingLLM: perplexity, time and memory by position.

    Models made for more than 2048 positions read English, within and beyond their limit, and are asked for keys; others library code.
    """
    if name is not None and model is not None and name != model:
        raise typer.BadParameter(f"{name!r} and --model {model!r} are two models: give one", param_hint="MODEL")
    chosen = name or model or "bundled"
    sizes = None if windows is None else number_list(windows, "--windows", smallest=1)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.measure import demo as show
    from patchkit.measure import demo_report

    loaded, tokenizer = load(chosen)
    with progress() as bar:
        task = bar.add_task("", total=show.plan_for(loaded, tokens, sizes).work())
        result = show.run_demo(
            loaded, tokenizer, tokens, sizes, advance=lambda what, count: bar.update(task, advance=count, description=what)
        )
        bar.update(task, completed=bar.tasks[0].total, description="done")
    try:
        demo_report.draw(result, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        from patchkit.measure.environment import environment

        emit({"model": chosen, **result.to_dict(), "picture": str(out), "environment": environment()})
        return
    console = Console()
    # A pipe counts as 80 columns, and a table that is cut off is worth nothing.
    console.width = max(console.width, 110)
    console.print(demo_report.table(result))
    keys = demo_report.keys_table(result)
    if keys is not None:
        console.print(keys)
    console.print(f"curves: {out}", highlight=False, soft_wrap=True)
    for line in (*result.ratio_lines(), *result.recall_lines()):
        console.print(line, highlight=False, soft_wrap=True)
