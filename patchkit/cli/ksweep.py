"""`patchkit ksweep`."""

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
)
from patchkit.errors import PatchError


@app.command()
def ksweep(
    model: ModelArgument,
    draft: Annotated[str, typer.Option("--draft", metavar="NAME|PATH", help="What drafts: a model, 'prompt_lookup', 'medusa', 'eagle'.")],
    ks: Annotated[str, typer.Option("--ks", help="Numbers of drafts per round, separated by commas.")] = "0,1,2,3,4,6,8",
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE|stdlib", help="A prompt per line (.json: a list of texts), or held-out library files.")
    ] = "stdlib",
    n_prompts: Annotated[int, typer.Option("--n-prompts", min=1, help="How many prompts.")] = 8,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompts from the library.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate per prompt.")] = 128,
    iterations: Annotated[int, typer.Option(min=1, help="How often everything is repeated.")] = 3,
    out: Annotated[Path, typer.Option(help="The folder to write to.", file_okay=False)] = Path("patchkit-ksweep"),
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one run of the fastest K.", dir_okay=False)] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Sweep the number of drafts per round against plain decoding: throughput, acceptance, and whether the text stays the same."""
    sizes = number_list(ks, "--ks", smallest=0)
    for folder in [out.absolute().parent] + ([trace.absolute().parent] if trace else []):
        if not folder.is_dir():
            raise UsageError(f"the folder {folder} does not exist: create it, or write elsewhere")
    from patchkit.search import ksweep as sweep
    from patchkit.search import ksweep_files, ksweep_result

    loaded, tokenizer = load(model, dtype, device)
    texts = sweep.encoded_prompts(prompts, tokenizer, n_prompts, prompt_tokens)
    with progress() as bar:
        task = bar.add_task("", total=sweep.work(sizes, len(texts), iterations))

        def advance(what: str, count: int) -> None:
            bar.update(task, advance=count, description=what)

        result = sweep.run_ksweep(loaded, draft, sizes, texts, new_tokens, iterations, trace, advance)
        bar.update(task, description="done")
    try:
        ksweep_files.write(result, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        emit({"model": model, **result.to_dict(), "out": str(out)})
    else:
        console = Console()
        console.width = max(console.width, 100)
        console.print(ksweep_result.table(result))
        console.print(f"best: K = {result.best.k or 0}; {', '.join(ksweep_files.FILES)} in {out}", highlight=False, soft_wrap=True)
    if not result.identical:
        wrong = sum(not run.identical for run in result.runs)
        raise PatchError(f"{wrong} of {len(result.runs)} texts differ from plain decoding: use --dtype float32, as 16 bits leave ties")
