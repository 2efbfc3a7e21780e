"""`patchkit inspect`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from patchkit.cli.common import (
    JsonOption,
    ModelArgument,
    app,
    emit,
    load,
    print_table,
    word,
)
from patchkit.errors import PatchError

if TYPE_CHECKING:
    from patchkit.patch import Patch


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what patchkit finds in a model, and which patches would apply."""
    from patchkit.anatomy.target import Target
    from patchkit.patch import available_patches

    loaded, _ = load(model)
    target = Target(loaded)
    facts: dict[str, Any] = {
        "model": model,
        "class": type(loaded).__name__,
        "parameters": sum(p.numel() for p in loaded.parameters()),
    }
    try:
        facts |= target.describe()
    except PatchError as error:
        facts["attention_layers"] = []
        facts["obstacle"] = str(error)
    facts["patches"] = {name: _verdict(cls, target) for name, cls in available_patches().items()}
    if as_json:
        emit(facts)
        return
    layers, verdicts = facts.pop("attention_layers"), facts.pop("patches")
    console = Console()
    _print_pairs(console, facts)
    if layers:
        console.print(_layer_table(layers))
    print_table(console, "patches with their default options", ["patch", "applies", "why"], [
        [name, "yes" if verdict["applies"] else "no", verdict["reason"] or ""] for name, verdict in verdicts.items()
    ])  # fmt: skip


def _verdict(cls: type[Patch], target: Any) -> dict[str, Any]:
    try:
        cls().check(target)
    except (PatchError, TypeError) as error:  # TypeError: an option without a default
        return {"applies": False, "reason": str(error)}
    return {"applies": True, "reason": None}


def _print_pairs(console: Console, pairs: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        grid.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else word(value))
    console.print(grid, highlight=False, markup=False)


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """Table with one line per run of neighbouring layers that differ in `layer` and `module` only."""
    facts = [name for name in layers[0] if name not in ("layer", "module")]
    facts = [name for name in facts if any(layer[name] is not None for layer in layers)]
    runs: list[list[dict[str, Any]]] = []
    for layer in layers:
        if runs and all(runs[-1][-1][name] == layer[name] for name in facts):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    table = Table(title=f"{len(layers)} attention layers", title_justify="left")
    for heading in ("layers", *facts):
        table.add_column(heading.replace("_", " "))
    for run in runs:
        first, last = run[0]["layer"], run[-1]["layer"]
        table.add_row(str(first) if first == last else f"{first}-{last}", *(word(run[0][name]) for name in facts))
    return table
