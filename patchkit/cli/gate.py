"""`patchkit gate`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from patchkit.cli.common import JsonOption, UsageError, app, emit, print_table, stderr


@app.command()
def gate(
    current: Annotated[Path, typer.Argument(metavar="CURRENT", help="The newer run, written by pytest --benchmark-json=FILE.")],
    baseline: Annotated[Path, typer.Option("--baseline", metavar="FILE", help="The older run, written in the same way.")],
    tolerance: Annotated[float, typer.Option(min=0, max=0.99, help="Share of a speed-up that may be lost.")] = 0.05,
    across_machines: Annotated[bool, typer.Option("--across-machines", help="Compare ratios only, whatever the machines.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two saved runs of patch_gate; exit code 1 if a gate got slower, worse or larger, or is missing."""
    from patchkit.gates.runs import compare, read_run

    found = compare(read_run(baseline), read_run(current), tolerance, across_machines)
    if as_json:
        emit({**dataclasses.asdict(found), "problems": found.problems, "passed": not found.problems})
    else:
        rows = [
            [
                row.name.rpartition("::")[2],
                row.patches,
                f"{row.before:.3g}",
                f"{row.now:.3g}",
                str(row.change),
                "" if row.ppl_change is None else f"{row.ppl_change:.4f}",
                "worse" if row.problems else "ok",
            ]
            for row in found.rows
        ]
        console = Console()
        console.width = max(console.width, 140)
        headings = ["gate", "patches", "speed-up before", "now", "now / before", "perplexity now / before", ""]
        print_table(console, None, headings, rows, right=False)
        remarks = [*found.remarks, *(f"{name}: new, not compared" for name in found.new)]
        for remark in remarks:
            stderr().print(remark, markup=False, highlight=False, soft_wrap=True)
    if found.problems:
        raise UsageError("; ".join(found.problems))
