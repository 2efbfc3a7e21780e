"""`patchkit kernels`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from patchkit.cli.common import (
    JsonOption,
    app,
    emit,
    print_table,
)


@app.command()
def kernels(
    as_json: JsonOption = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/kernels.md: every op with its backends.")] = False,
) -> None:
    """Show which backend of every op would run on this machine, and why the others would not."""
    import torch

    from patchkit.kernels import available_ops, table
    from patchkit.kernels.op import VARIABLE

    if markdown:
        typer.echo(table.markdown())
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, dict[str, Any]] = {}
    for name, op in available_ops().items():
        label, args = next(op.sample_inputs(device))
        found[name] = {"sample": label, "device": device, "runs": op.choose(*args), "refusals": op.explain(*args)}
    if as_json:
        emit(found)
        return
    rows = [
        [name, entry["runs"], backend, "serves" if reason is None else reason]
        for name, entry in found.items()
        for backend, reason in [*entry["refusals"].items(), ("reference", None)]
    ]
    for index in range(len(rows) - 1, 0, -1):  # name an op once
        if rows[index][0] == rows[index - 1][0]:
            rows[index][:2] = ["", ""]
    print_table(Console(), f"on {device}; {VARIABLE}=auto|reference|cpu|triton|native chooses", ["op", "runs", "backend", "why"], rows)
