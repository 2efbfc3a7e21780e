"""`patchkit export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from patchkit.cli.common import Dtype, DtypeOption, ModelArgument, app, load, parse, stderr
from patchkit.errors import SpecError


@app.command()
def export(
    model: ModelArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    patches: Annotated[str, typer.Option("--patches", metavar="SPEC", help="Patches, such as 'streaming(sinks=4, window=508)'.")],
    dtype: DtypeOption = Dtype.float32,
) -> None:
    """Write a directory that loads patched in transformers, pipeline and plain lm_eval, with trust_remote_code=True."""
    chosen = parse(patches)
    if not chosen:
        raise SpecError("no patch given: the model can be saved without patchkit then")
    from patchkit.export import export

    loaded, tokenizer = load(model, dtype)
    export(loaded, tokenizer, chosen, directory)
    typer.echo(directory)
    stderr().print(
        f"AutoModelForCausalLM.from_pretrained({str(directory)!r}, trust_remote_code=True) loads it patched, where patchkit is installed; "
        "without trust_remote_code it loads unpatched, and so it does in `transformers serve`, with that option too.",
        highlight=False,
        soft_wrap=True,
        markup=False,
    )
