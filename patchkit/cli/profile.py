"""`patchkit profile`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    print_table,
)

if TYPE_CHECKING:
    from patchkit.measure.profile import Phase

# Longest operator name in characters, so that a table of two variants fits.
_NAME = 40


@app.command()
def profile(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The Chrome trace to write.", dir_okay=False)],
    patches: PatchesOption = "",
    context: Annotated[int, typer.Option(min=1, help="Tokens of real text before the decoded ones.")] = 256,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 16,
    top: Annotated[int, typer.Option(min=1, help="Operators to show of each variant and phase.")] = 10,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Show the time of prefill and decoding by operator, unpatched and patched, and write a Chrome trace with memory."""
    chosen = parse(patches)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.measure.environment import environment
    from patchkit.measure.profile import run_profile
    from patchkit.measure.texts import heldout_ids

    loaded, tokenizer = load(model, dtype, device)
    ids = heldout_ids(tokenizer, context)[0][:context]
    if len(ids) < context:
        raise UsageError(f"Python's library has only {len(ids)} held-out tokens: give a smaller --context")
    phases = run_profile(loaded, chosen, ids, tokens, out)
    if as_json:
        listed = [dataclasses.asdict(phase) | {"ops": [dataclasses.asdict(op) for op in phase.ops[:top]]} for phase in phases]
        emit({"model": model, "context": context, "tokens": tokens, "phases": listed, "trace": str(out), "environment": environment()})
        return
    console = Console()
    console.width = max(console.width, 120)
    for name in dict.fromkeys(phase.name for phase in phases):
        _print_phase(console, [phase for phase in phases if phase.name == name], top)
    console.print(f"trace: {out} (open it in chrome://tracing or https://ui.perfetto.dev)", highlight=False, soft_wrap=True)


def _print_phase(console: Console, phases: list[Phase], top: int) -> None:
    """Print the variants side by side, a row for each operator that is among the costliest of one variant."""
    costs = [{op.name: op for op in phase.ops} for phase in phases]
    names = dict.fromkeys(op.name for phase in phases for op in phase.ops[:top])
    names = dict.fromkeys(sorted(names, key=lambda name: -max(cost[name].ms for cost in costs if name in cost)))
    headings = ["operator", *(f"{phase.variant}\n{what}" for phase in phases for what in ("ms", "share", "calls", "MiB"))]
    rows = []
    for name in names:
        cells = []
        for cost in costs:
            op = cost.get(name)
            cells += [f"{op.ms:.2f}", f"{op.share:.0%}", str(op.calls), f"{op.bytes / 2**20:.2f}"] if op else [""] * 4
        rows.append([name if len(name) <= _NAME else f"{name[: _NAME - 1]}…", *cells])
    times = ", ".join(f"{phase.variant} {phase.wall_ms:.1f} ms, {phase.ops_ms:.1f} in operators" for phase in phases)
    print_table(console, f"{phases[0].name}: {times}", headings, rows, right=True)
