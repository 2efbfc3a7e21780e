"""`patchkit linearize`."""

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
)


@app.command()
def linearize(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", metavar="FILE|stdlib", help="UTF-8 text to learn on, or Python's standard library.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.", dir_okay=False)],
    feature_map: Annotated[str, typer.Option("--feature-map", help="hedgehog, t2r, elu1, relu or identity.")] = "hedgehog",
    window: Annotated[int, typer.Option(min=1, help="Last tokens that keep softmax attention.")] = 64,
    sinks: Annotated[int, typer.Option(min=0, help="First tokens that keep softmax attention; pretrained models need some four.")] = 0,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, separated by commas; default all.")] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Old tokens beyond which their weight grows no more.")] = None,
    closed_form: Annotated[bool, typer.Option("--closed-form/--no-closed-form", help="Fit a readout per head in closed form.")] = True,
    transfer_steps: Annotated[int, typer.Option("--transfer-steps", min=0, help="Steps of the gradient fit of the feature maps.")] = 40,
    lora_steps: Annotated[int, typer.Option("--lora-steps", min=0, help="Steps of low-rank recovery on the language model's loss.")] = 200,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    distill: Annotated[float, typer.Option(min=0, max=1, help="Share of the softmax model's distribution in the recovery's loss.")] = 0.5,
    keep_softmax: Annotated[int, typer.Option("--keep-softmax", min=0, help="Layers, the worst ones, that stay as they are.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens per text; best more than the model's context.")] = 1024,
    checkpoint: Annotated[Path | None, typer.Option(help="Write and resume from this file.", dir_okay=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Convert softmax attention to a softmax window over a linear memory, for the patch 'linear'."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    indices = None if layers is None else number_list(layers, "--layers", smallest=0)
    from patchkit.linear.feature_maps import available_feature_maps
    from patchkit.measure.stdlib_text import read_texts, stdlib_files
    from patchkit.measure.texts import heldout_ids, read_text
    from patchkit.training import linearize as conversion

    if feature_map not in available_feature_maps():
        raise UsageError(f"--feature-map {feature_map} is unknown: give one of {', '.join(available_feature_maps())}")
    texts = list(read_texts(stdlib_files("train"))) if text == "stdlib" else [read_text(text)]
    loaded, tokenizer = load(model, dtype, device)
    result = conversion.linearize(
        loaded, texts, tokenizer, feature_map=feature_map, window=window, sinks=sinks, layers=indices, horizon=horizon,
        closed_form=closed_form, transfer_steps=transfer_steps, lora_steps=lora_steps, rank=rank, distill=distill,
        keep_softmax=keep_softmax, batch=batch, length=length, seed=seed,
        heldout=heldout_ids(tokenizer, 16384)[0] if text == "stdlib" else None, checkpoint=checkpoint,
    )  # fmt: skip
    result.state.save(out)
    if as_json:
        emit({"model": model, "out": str(out), "bytes": out.stat().st_size, **result.to_json()})
        return
    console = Console()
    console.width = max(console.width, 130)
    for table in result.tables():
        console.print(table)
    times = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in result.ms_per_token.items())
    console.print(f"ms per token: {times}", highlight=False)
    console.print(f"linear attention: {out}, {out.stat().st_size / 2**20:.2f} MiB", highlight=False, soft_wrap=True)
