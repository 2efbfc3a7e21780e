"""`patchkit ppl`."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    PatchesOption,
    app,
    emit,
    load,
    parse,
    patch,
    print_table,
    progress,
    report,
    stderr,
)

if TYPE_CHECKING:
    from patchkit.measure.perplexity import Bucket


@app.command()
def ppl(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The UTF-8 text to score.")],
    patches: PatchesOption = "",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Score only the first tokens of the text.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the unpatched model too.")] = False,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text streamed through one cache, in total and by position."""
    chosen = parse(patches)
    from patchkit.measure.perplexity import by_position, default_edges, stream_nll
    from patchkit.measure.texts import encode, read_text

    content = read_text(text)
    loaded, tokenizer = load(model, dtype, device)
    ids = encode(tokenizer, content)[:max_tokens]
    edges = default_edges(len(ids) - 1)
    results: dict[str, dict[str, Any]] = {}
    buckets: dict[str, list[Bucket]] = {}
    with progress() as bar:
        for name in (["unpatched"] if baseline or not chosen else []) + (["patched"] if chosen else []):
            patched = chosen if name == "patched" else []
            patch(loaded, patched)
            task = bar.add_task(name, total=len(ids) - 1)
            started = time.perf_counter()
            nll = stream_nll(loaded, ids, chunk=chunk, progress=lambda count, task=task: bar.update(task, advance=count))  # type: ignore[misc]
            total = by_position(nll, [0, len(nll)])[0]
            buckets[name] = [*by_position(nll, edges), total]
            results[name] = {
                "patches": report(loaded, patched).to_dict()["patches"],
                **dataclasses.asdict(total),
                "by_position": [dataclasses.asdict(bucket) for bucket in buckets[name][:-1]],
                "tokens_per_s": len(nll) / (time.perf_counter() - started),
            }
    ratio = math.exp(results["patched"]["nll"] - results["unpatched"]["nll"]) if len(results) == 2 else None
    if as_json:
        emit(
            {"model": model, "text": str(text), "chunk": chunk, "tokens": len(ids) - 1, "results": results, "patched_over_unpatched": ratio}
        )
        return
    rows = []
    for columns in zip(*buckets.values(), strict=True):
        last = columns[0] is next(iter(buckets.values()))[-1]
        span = "all" if last else f"{columns[0].start}-{columns[0].stop}"
        rows.append([span, str(columns[0].tokens), *(f"{b.perplexity:.3f} ± {b.perplexity * b.stderr:.3f}" for b in columns)])
    print_table(Console(), f"perplexity of {text}", ["position", "tokens", *buckets], rows, right=True)
    remarks = stderr()
    remarks.print(str(report(loaded, chosen)) or "unpatched", highlight=False, soft_wrap=True, markup=False)
    if ratio is not None:
        remarks.print(f"patched / unpatched: {ratio:.4f}", highlight=False)
