"""`patchkit train-heads`."""

from __future__ import annotations

import time
from enum import Enum
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
    stderr,
)


class HeadsKind(str, Enum):
    """Which heads to train."""

    eagle = "eagle"
    eagle3 = "eagle3"
    medusa = "medusa"


@app.command(name="train-heads")
def train_heads(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", metavar="FILE|stdlib", help="UTF-8 text to learn on, or Python's standard library.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.", dir_okay=False)],
    kind: Annotated[HeadsKind, typer.Option("--kind", help="Heads to train.")] = HeadsKind.eagle,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    depth: Annotated[int, typer.Option(min=1, help="How many tokens ahead to learn: Medusa's number of heads.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens per text.")] = 256,
    on_policy: Annotated[float, typer.Option(min=0, max=1, help="Share of steps on the model's own continuations.")] = 0.0,
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Train for so long instead of --steps.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Write every minute and at SIGINT or SIGTERM, and resume from this file.", dir_okay=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train heads that draft for a model, on hidden states computed as they are needed."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    import torch

    from patchkit.measure.stdlib_text import read_texts, stdlib_files
    from patchkit.measure.texts import encode, read_text
    from patchkit.training import heads as heads_training
    from patchkit.training import heads_loss

    texts = read_texts(stdlib_files("train")) if text == "stdlib" else [read_text(text)]
    loaded, tokenizer = load(model, dtype, device)
    tokens = torch.tensor([token for each in texts for token in encode(tokenizer, each)])
    kept = len(tokens) // 20 // length * length  # the end is held out, to evaluate the heads
    started = time.perf_counter()
    try:
        heads = heads_training.train_heads(
            loaded, tokens[: len(tokens) - kept], kind.value, steps, depth=depth, batch=batch, length=length, on_policy=on_policy,
            seed=seed, checkpoint=checkpoint, minutes=minutes,
        )  # fmt: skip
    except KeyboardInterrupt as interrupted:
        stderr().print(f"{interrupted or 'stopped'}", highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(130) from None
    heads.save(out)
    seconds = time.perf_counter() - started
    shares = None
    if kept:
        found = heads_loss.agreement(heads, loaded, tokens[len(tokens) - kept :].view(-1, length)[:64], depth)
        shares = heads_loss.accepted_by_position(found).tolist()
    if as_json:
        emit({
            "model": model,
            "kind": kind.value,
            "out": str(out),
            "bytes": out.stat().st_size,
            "seconds": seconds,
            "accepted_by_position": shares,
        })  # fmt: skip
        return
    console = Console()
    console.print(f"{kind.value} heads: {out}, {out.stat().st_size / 2**20:.2f} MiB, {seconds:.0f} s", highlight=False, soft_wrap=True)
    if shares:
        listed = " ".join(f"{share:.2f}" for share in shares)
        console.print(f"drafts of 1 to {depth} tokens that are the model's choice, on held-out text: {listed}", highlight=False)
