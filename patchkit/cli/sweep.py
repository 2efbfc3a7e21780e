"""`patchkit sweep`."""

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
    UsageError,
    app,
    emit,
    load,
    number_list,
    progress,
    stderr,
)


@app.command()
def sweep(
    model: ModelArgument,
    windows: Annotated[str, typer.Option("--windows", help="Windows in tokens, separated by commas.")] = "2048,1024,512,256,128",
    sinks: Annotated[str, typer.Option("--sinks", help="Numbers of sinks, separated by commas.")] = "0,1,4,8",
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            "--refresh",
            metavar="none|SPEC",
            help="'reencode(every=64)', 'dynamic_sinks(n=16, every=64)', 'tail_insert(...)' (a control) or 'none'; may be repeated.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None, typer.Option("--text", metavar="FILE", help="A document; may be repeated. Default: held-out library files.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to score of each document.")] = 2048,
    n_documents: Annotated[int, typer.Option("--documents", min=1, help="How many library files, without --text.")] = 8,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward when scoring.")] = 512,
    block: Annotated[int, typer.Option(min=1, help="Tokens after which the unpatched model in blocks restarts.")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Timed steps per configuration, at least.")] = 15,
    out: Annotated[Path, typer.Option(help="The folder to write to, and to resume from.", file_okay=False)] = Path("patchkit-sweep"),
    restart: Annotated[bool, typer.Option("--restart", help="Drop the sweep that is in the folder.")] = False,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Sweep StreamingLLM over windows, sinks and refreshes: perplexity, time per token and bytes, compared with the unpatched model."""
    sizes, counts = number_list(windows, "--windows", smallest=1), number_list(sinks, "--sinks", smallest=0)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or write elsewhere")
    from patchkit.search import sweep as search
    from patchkit.search import sweep_files, sweep_report

    patches = search.grid(sizes, counts, [search.parse_refresh(each) for each in refresh or ["none"]])
    loaded, tokenizer = load(model, dtype, device)
    texts = search.documents(tokenizer, text or [], tokens, n_documents)
    try:
        with progress() as bar:
            task = bar.add_task("", total=search.work(patches, texts))

            def advance(what: str, count: int) -> None:
                bar.update(task, advance=count, description=what)

            result = search.run_sweep(loaded, texts, patches, out, model, chunk, block, rounds, restart, advance)
            bar.update(task, description="done", completed=search.work(patches, texts))
    except KeyboardInterrupt:
        stderr().print(f"stopped; the same command resumes from {out}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        emit({**result.to_dict(), "out": str(out)})
        return
    console = Console()
    console.width = max(console.width, 150)
    console.print(sweep_report.table(result))
    refused: dict[str, list[str]] = {}
    for row in result.rows:
        if row.refused:
            refused.setdefault(row.refused, []).append(row.name)
    for reason, names in refused.items():
        console.print(f"refused: {', '.join(names)}: {reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{', '.join(sweep_files.FILES)} in {out}", markup=False, highlight=False, soft_wrap=True)
