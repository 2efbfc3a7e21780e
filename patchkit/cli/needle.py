"""`patchkit needle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PatchesOption,
    UsageError,
    app,
    emit,
    load,
    parse,
    progress,
    stderr,
)


@app.command()
def needle(
    model: ModelArgument,
    patches: PatchesOption = "",
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="LIST", help="Tokens of prompt, such as 1k,2k,4k,8k (1k is 1024); default up to the model's limit."
        ),
    ] = None,
    distances: Annotated[
        str,
        typer.Option(
            "--distances", metavar="LIST", help="Tokens between a key and its answer; distances that do not fit a length are skipped."
        ),
    ] = "200,400,800,1600,3200,6400",
    trials: Annotated[
        int, typer.Option("--trials", min=1, metavar="N", help="Keys, each in a separate text, for every length and distance.")
    ] = 3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Of the keys.")] = 0,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write to.", file_okay=False)] = Path("patchkit-needle"),
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Hide a key in long English texts and ask for it: recall by length and distance, unpatched and patched."""
    chosen = parse(patches)
    sizes = None if lengths is None else _token_list(lengths, "--lengths")
    far = _token_list(distances, "--distances")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.measure import needle as quality
    from patchkit.measure import needle_prompt, needle_report, needle_text
    from patchkit.measure.environment import environment

    loaded, tokenizer = load(model, dtype, device)
    asking = needle_prompt.Asking.of(tokenizer)
    cases = needle_text.possible(sizes or needle_text.lengths_for(loaded), far, trials, asking)
    haystack = quality.Haystack.of(asking, cases, seed)
    models, remarks = 2 if chosen else 1, stderr()
    minutes = quality.estimated_seconds(loaded, haystack, cases, models) / 60
    remarks.print(
        f"{len(cases)} keys, {models * haystack.work(cases):,} tokens to read: about {max(1, round(minutes))} min on this machine",
        highlight=False,
        soft_wrap=True,
    )
    with progress() as bar:
        task = bar.add_task("", total=models * haystack.work(cases))
        grid = quality.run_needle(
            loaded, haystack, cases, chosen, model, advance=lambda what, count: bar.update(task, advance=count, description=what)
        )
        bar.update(task, completed=bar.tasks[0].total, description="done")
    machine = environment()
    try:
        needle_report.write(grid, out, environment=machine)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        emit({**grid.to_dict(), "environment": machine, "out": str(out)})
        return
    console = Console()
    console.width = max(console.width, 130)
    console.print(needle_report.table(grid))
    for line in (*grid.lines(), f"{', '.join(needle_report.FILES)} in {out}"):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _token_list(text: str, option: str) -> list[int]:
    """Ascending numbers of tokens, from a list such as 500,1k,2k."""
    numbers = []
    for word in text.split(","):
        digits, thousands = word.strip().lower(), 1
        if digits.endswith("k"):
            digits, thousands = digits[:-1], 1024
        if not digits.isdecimal() or int(digits) == 0:
            raise typer.BadParameter(f"{text!r} is not a list of numbers of tokens such as 500,1k,2k", param_hint=option)
        numbers.append(int(digits) * thousands)
    return sorted(set(numbers))
