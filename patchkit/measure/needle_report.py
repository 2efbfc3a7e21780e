"""Recall by length and distance as a table, as files and as a plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchkit.measure.needle_grid import UNPATCHED, NeedleGrid

FILES = ("needle.json", "needle.csv", "needle.png")


def write(grid: NeedleGrid, folder: Path, **more: Any) -> None:
    """Write `FILES` to ``folder``, which is created if it does not exist; ``more`` goes into the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "needle.json").write_text(json.dumps({**grid.to_dict(), **more}, indent=2) + "\n")
    with (folder / "needle.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "length", "distance", "window", "trials", "hits", "log_probability"])
        for model in grid.answers:
            for cell in grid.cells(model):
                where = grid.side(cell.distance)
                writer.writerow([model, cell.length, cell.distance, where, cell.trials, cell.hits, f"{cell.log_probability:.4f}"])
    draw(grid, folder / "needle.png")


def table(grid: NeedleGrid) -> Table:
    """Table for a terminal of 110 columns or more: a row per model and length, a column per distance."""
    trials, distances = grid.settings["trials"], grid.settings["distances"]
    result = Table(
        title=f"a five-digit key, asked for {grid.settings['asked']}, by the tokens between key and answer",
        caption=f"keys recalled of {trials}, and the mean log-probability of a token of the key in the right answer (nats)",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    result.add_column("")
    result.add_column("length", justify="right")
    for distance in distances:
        where = {"inside": "in window", "edge": "at its edge", "beyond": "beyond", "": ""}[grid.side(distance)]
        result.add_column(f"{_short(distance)}\n{where}".rstrip(), justify="right", no_wrap=True)
    for model in grid.answers:
        for number, length in enumerate(grid.settings["lengths"]):
            cells = {cell.distance: cell for cell in grid.cells(model) if cell.length == length}
            shown = [f"{c.hits}/{c.trials} {c.log_probability:6.2f}" if (c := cells.get(distance)) else "" for distance in distances]
            result.add_row(model if number == 0 else "", _short(length), *shown, end_section=length == grid.settings["lengths"][-1])
    return result


def draw(grid: NeedleGrid, path: Path) -> None:
    """Write a PNG with the share of keys recalled: heat maps of length against distance, one per model."""
    from matplotlib.figure import Figure

    lengths, distances = grid.settings["lengths"], grid.settings["distances"]
    figure = Figure(figsize=(1.5 + 4.6 * len(grid.answers), 1.9 + 0.55 * len(lengths)), layout="constrained")
    panels = figure.subplots(1, len(grid.answers), squeeze=False, sharey=True)[0]
    for axes, model in zip(panels, grid.answers, strict=True):
        share = [[math.nan] * len(distances) for _ in lengths]
        for cell in grid.cells(model):
            row, column = lengths.index(cell.length), distances.index(cell.distance)
            share[row][column] = cell.hits / cell.trials
            label = f"{cell.hits}/{cell.trials}\n{cell.log_probability:.2f}"
            color = "white" if cell.hits > 0.55 * cell.trials else "black"
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=color)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_facecolor("0.93")
        axes.set_title(model, fontsize=10)
        axes.set_xticks(range(len(distances)), [_short(distance) for distance in distances])
        axes.set_yticks(range(len(lengths)), [_short(length) for length in lengths])
        axes.set_xlabel("tokens between key and answer")
        if grid.window is not None and model != UNPATCHED:
            axes.axvline(_column(distances, grid.window), color="tab:red", lw=1.6)
            axes.annotate(
                f"window {grid.window}",
                (_column(distances, grid.window), -0.5),
                xytext=(3, 3),
                textcoords="offset points",
                color="tab:red",
                fontsize=8,
            )
    panels[0].set_ylabel("tokens of prompt")
    asked = f"{grid.settings['model']}: keys recalled, and mean log-probability of a token of the key; asked {grid.settings['asked']}"
    figure.suptitle(asked, fontsize=10)
    figure.savefig(path, dpi=130, format="png")


def _column(distances: Sequence[int], window: int) -> float:
    """Position of a window on an axis with a column per distance: interpolated between two columns by logarithm."""
    below = sum(distance <= window for distance in distances)
    if below == 0 or below == len(distances):
        return below - 0.5
    low, high = math.log(distances[below - 1]), math.log(distances[below])
    return below - 1 + (math.log(window) - low) / (high - low)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
