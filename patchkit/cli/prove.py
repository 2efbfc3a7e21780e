"""`patchkit prove`."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

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

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


@app.command()
def prove(
    model: ModelArgument,
    patches: PatchesOption = "",
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="FILE", help="A UTF-8 text; several are allowed. Default: held-out library files."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of text to score.")] = 16384,
    fast: Annotated[bool, typer.Option("--fast", help="Check with short windows only, score a quarter of the text, time less.")] = False,
    out: Annotated[Path, typer.Option(help="The folder for report.json and report.html.", file_okay=False)] = Path("patchkit-prove"),
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Check everything that the patches promise on this model; exit code 1 if a promise is broken."""
    chosen = parse(patches)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise UsageError(f"{out} cannot be written: give another --out")
    from patchkit.quality.perplexity import read_text
    from patchkit.quality.proof import Proof
    from patchkit.quality.prove import prove as run

    # Every view of the model would say again what patching says; the tables hold it.
    logging.getLogger("patchkit").setLevel(logging.ERROR)
    contents = [read_text(path) for path in text] if text else None
    loaded, tokenizer = load(model, dtype, device)
    documents = _documents(tokenizer, contents, tokens // 4 if fast else tokens)
    proof = Proof(patches, str(loaded.dtype).removeprefix("torch."))
    try:
        with progress() as bar:
            task = bar.add_task("", total=None)
            run(proof, loaded, chosen, documents, _passkeys(tokenizer), fast, lambda what: bar.update(task, description=escape(what)))
            bar.update(task, description="done", total=1, completed=1)
    finally:
        # After Ctrl-C too: what was found so far is a report, which says that it is incomplete.
        if proof.checks:
            _write(proof, out, model)
            if not proof.complete:
                stderr().print(f"{proof.verdict}; see {out}", style="bold red", highlight=False, soft_wrap=True)
    if as_json:
        from patchkit.quality.environment import environment

        emit({"model": model, **proof.to_dict(), "out": str(out), "environment": environment()})
    else:
        from patchkit.quality import report

        console = Console()
        console.width = max(console.width, 110)
        for table in report.tables(proof):
            console.print(table)
        console.print(report.near_ties(proof), highlight=False, soft_wrap=True)
        console.print(f"report.json, report.html in {out}", highlight=False, soft_wrap=True)
        stderr().print(proof.verdict, style="bold green" if proof.passed else "bold red", highlight=False, soft_wrap=True)
    if not proof.passed:
        raise typer.Exit(1)


def _documents(tokenizer: PreTrainedTokenizerBase, contents: list[str] | None, tokens: int) -> list[list[int]]:
    """Token ids of about ``tokens`` in all, in eight documents or more where the texts allow: intervals are over documents."""
    from patchkit.quality.perplexity import TextError, encode
    from patchkit.quality.stdlib_text import read_texts, stdlib_files

    length = max(64, tokens // 8)
    found: list[list[int]] = []
    try:
        for content in read_texts(stdlib_files("heldout")) if contents is None else contents:
            ids = encode(tokenizer, content)
            # Of the library the beginning of each file; of a text that was given, all of it.
            last = length if contents is None else len(ids)
            found += [ids[start : start + length] for start in range(0, min(last, len(ids)), length)]
            if sum(map(len, found)) >= tokens:
                break
    except FileNotFoundError as error:
        raise TextError(f"{error}: give texts of your own with --text") from error
    return found[: max(1, -(-tokens // length))] if contents is not None else found


def _passkeys(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], tuple[list[int], int]]:
    """Texts of Python in which a string is given, and wanted again."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def make(distance: int, trial: int) -> tuple[list[int], int]:
        key, tail = ids(str(10007 + 7919 * trial)), ids('\nassert PASSKEY == "')
        lines = "".join(f"value_{i} = {i * 37 % 101} + {(i + trial) * 53 % 89}\n" for i in range(distance))
        filler = ids(lines)[: max(0, distance - len(tail))]
        return [*ids('PASSKEY = "'), *key, *filler, *tail, *key], len(key)

    return make


def _write(proof: Any, out: Path, model: str) -> None:
    from patchkit.quality import report

    try:
        report.write(proof, out, model, shlex.join(["patchkit", *sys.argv[1:]]))
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
