"""`patchkit demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    pass


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)] = "bundled",
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of text to stream.")] = 16384,
    windows: Annotated[str, typer.Option(help="StreamingLLM windows in tokens, separated by commas.")] = "508,252,124",
    out: Annotated[Path, typer.Option(help="The picture to write.", dir_okay=False)] = Path("patchkit-demo.png"),
    as_json: JsonOption = False,
) -> None:
    """Stream real text through a model, unpatched and with StreamingLLM: perplexity, time and memory by position."""
    sizes = _window_list(windows)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.quality import demo as show

    loaded, tokenizer = load(model)
    with progress() as bar:
        task = bar.add_task("", total=show.work(tokens, sizes))
        result = show.run_demo(
            loaded, tokenizer, tokens, sizes, advance=lambda what, count: bar.update(task, advance=count, description=what)
        )
        bar.update(task, completed=bar.tasks[0].total, description="done")
    try:
        show.draw(result, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        from patchkit.quality.environment import environment

        emit({"model": model, **result.to_dict(), "picture": str(out), "environment": environment()})
        return
    console = Console()
    # A pipe counts as 80 columns, and a table that is cut off is worth nothing.
    console.width = max(console.width, 110)
    console.print(show.table(result))
    console.print(f"curves: {out}", highlight=False, soft_wrap=True)
    console.print(result.ratio_line(), highlight=False, soft_wrap=True)


def _window_list(text: str) -> list[int]:
    return number_list(text, "--windows", smallest=1)
