"""`patchkit prove`."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
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

    from patchkit.prove.proof import Proof

# Without a progress bar, a line is printed at least this often.
_SILENCE_S = 30.0


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
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="PROMISE[,PROMISE]", help="Check these promises only, by their names in the report; time nothing."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for report.json and report.html.", file_okay=False)] = Path("patchkit-prove"),
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Check everything that the patches promise on this model; exit code 1 if a promise is broken.

    Interrupted by SIGINT or SIGTERM, it writes its results and the checks that are missing, and exits with 130 or 143.
    """
    chosen = parse(patches)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    if not os.access(out if out.exists() else out.absolute().parent, os.W_OK):
        raise UsageError(f"{out} cannot be written: give another --out")
    from patchkit.measure.texts import read_text
    from patchkit.prove import texts
    from patchkit.prove.checks.plan import wanted
    from patchkit.prove.proof import Proof
    from patchkit.prove.prove import prove as run
    from patchkit.prove.prove import reach_of

    names = None if only is None else list(wanted([name.strip() for name in only.split(",")]))
    # Patching every view would log the same lines again; the tables hold them.
    logging.getLogger("patchkit").setLevel(logging.ERROR)
    contents = [read_text(path) for path in text] if text else None
    loaded, tokenizer = load(model, dtype, device)
    scored = texts.documents(tokenizer, contents, tokens // 4 if fast else tokens, reach_of(loaded, chosen))
    proof = Proof(patches, str(loaded.dtype).removeprefix("torch."))
    try:
        with _interruptible(proof) as signals, _shown(proof) as advance:
            run(proof, loaded, chosen, scored, texts.passkeys(tokenizer), fast, advance, names)
    finally:
        if proof.checks or proof.complete or proof.interrupted:
            _write(proof, out, model)
    _say(proof, out, model, as_json)
    if signals:
        raise typer.Exit(128 + signals[0])
    if not proof.passed:
        raise typer.Exit(1)


def _say(proof: Proof, out: Path, model: str, as_json: bool) -> None:
    if as_json:
        from patchkit.measure.environment import environment

        emit({"model": model, **proof.to_dict(), "out": str(out), "environment": environment()})
        return
    from patchkit.prove import report

    console = Console()
    console.width = max(console.width, 110)
    for table in report.tables(proof):
        console.print(table)
    for remark in report.remarks(proof):
        console.print(remark, highlight=False, soft_wrap=True, markup=False)
    if proof.near_tie_rate is not None:
        console.print(report.near_ties(proof), highlight=False, soft_wrap=True)
    console.print(f"report.json, report.html in {out}", highlight=False, soft_wrap=True)
    stderr().print(proof.verdict, style="bold green" if proof.passed else "bold red", highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _interruptible(proof: Proof) -> Iterator[list[int]]:
    """End the context at SIGINT and SIGTERM, whose number is then in the list; results so far stay in ``proof``.

    A second signal has its ordinary effect.
    """
    signals: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def end(number: int, frame: Any) -> None:
        signals.append(number)
        proof.interrupted = signal.Signals(number).name
        for each, handler in before.items():
            signal.signal(each, handler)
        raise KeyboardInterrupt

    for number in before:
        signal.signal(number, end)
    try:
        yield signals
    except KeyboardInterrupt:
        if not signals:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _shown(proof: Proof) -> Iterator[Callable[[str], object]]:
    """A function that shows progress: on a bar, or in one line per check if stderr is not a terminal."""
    if not stderr().is_terminal:
        lines = _Lines(proof)
        try:
            yield lines.advance
        finally:
            lines.catch_up()
        return
    with progress() as bar:
        task = bar.add_task("", total=None)

        def advance(what: str) -> None:
            left, done = len(proof.not_checked), len({(check.patches, check.promise) for check in proof.checks})
            about = "" if proof.estimated_seconds is None else f" (about {_duration(proof.estimated_seconds)} in all)"
            bar.update(task, description=escape(what + about), completed=done, total=done + left if left else None)

        yield advance
        bar.update(task, description="done", total=1, completed=1)


class _Lines:
    """Progress in lines, for a stderr that is not a terminal."""

    def __init__(self, proof: Proof) -> None:
        self.proof, self.shown, self.estimated = proof, 0, False
        self.started = self.printed = time.monotonic()

    def advance(self, what: str) -> None:
        """Print checks that were finished since the last call; the present work only after a long silence."""
        if self.proof.estimated_seconds is not None and not self.estimated:
            self.estimated = True
            count = len(self.proof.not_checked)
            self._line(f"{count} checks, about {_duration(self.proof.estimated_seconds)} by the time of one forward")
        self.catch_up()
        if time.monotonic() - self.printed > _SILENCE_S:
            self._line(what)

    def catch_up(self) -> None:
        """Print checks that were finished since the last call."""
        for check in self.proof.checks[self.shown :]:
            self._line(f"{check.status:<10} {check.seconds:6.1f} s  {check.promise} [{check.patches}]")
        self.shown = len(self.proof.checks)

    def _line(self, text: str) -> None:
        self.printed = time.monotonic()
        typer.echo(f"{self.printed - self.started:5.0f} s  {text}", err=True)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def _write(proof: Proof, out: Path, model: str) -> None:
    from patchkit.prove import report

    try:
        report.write(proof, out, model, shlex.join(["patchkit", *sys.argv[1:]]))
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
