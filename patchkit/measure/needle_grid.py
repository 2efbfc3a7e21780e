"""Recall by length and distance: the figures, a table and a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchkit.measure.needle_text import Haystack, NeedleCase

UNPATCHED = "unpatched"

FILES = ("needle.json", "needle.csv", "needle.png")

FORGETS = "beyond the window recall is 0: what is neither a sink nor in the window is forgotten, however good the perplexity"


@dataclass(frozen=True)
class Answer:
    """What a model made of a case.

    Attributes:
        tokens: of the prompt; up to a sentence less than the case's length, because the key stands between sentences.
        text: the greedy answer.
        hit: it contains the key.
        log_probability: mean over the key's tokens of their log-probability, each after the right ones before it, in nats.
    """

    case: NeedleCase
    key: str
    tokens: int
    text: str
    hit: bool
    log_probability: float


@dataclass(frozen=True)
class RecallCell:
    """All trials of one length and distance."""

    length: int
    distance: int
    trials: int
    hits: int
    log_probability: float


@dataclass(frozen=True)
class NeedleGrid:
    """What `run_needle` found.

    Attributes:
        settings: model, patches, prompts and options.
        window: tokens that the patched model's window holds; None without a window.
        answers: of the unpatched model and, under their spec, of the patches.
    """

    settings: dict[str, Any]
    haystack: Haystack
    window: int | None
    answers: dict[str, list[Answer]]

    def cells(self, way: str) -> list[RecallCell]:
        """Every length and distance that fits, in the order asked for."""
        grouped: dict[tuple[int, int], list[Answer]] = {}
        for answer in self.answers[way]:
            grouped.setdefault((answer.case.length, answer.case.distance), []).append(answer)
        return [
            RecallCell(*place, len(group), sum(a.hit for a in group), statistics.fmean(a.log_probability for a in group))
            for place, group in grouped.items()
        ]

    def side(self, distance: int) -> str:
        """`Asking.side` for the patched model's window."""
        return self.haystack.asking.side(distance, self.window)

    def recall(self, way: str, side: str) -> tuple[int, int]:
        """Hits and trials of the distances on one side."""
        chosen = [answer for answer in self.answers[way] if self.side(answer.case.distance) == side]
        return sum(answer.hit for answer in chosen), len(chosen)

    def lines(self) -> list[str]:
        """The result in sentences."""
        if self.window is None:
            return [f"{way}: {sum(a.hit for a in found)} of {len(found)} keys recalled" for way, found in self.answers.items()]
        sides = {"inside": f"inside the window of {self.window:,} tokens", "edge": "at its edge", "beyond": "beyond it"}
        found = []
        for side, words in sides.items():
            if self.recall(UNPATCHED, side)[1]:
                counts = ", ".join("{} {} of {}".format(way, *self.recall(way, side)) for way in self.answers)
                found.append(f"keys recalled {words}: {counts}")
        patched = [way for way in self.answers if way != UNPATCHED]
        if self.recall(UNPATCHED, "beyond")[0] and not any(self.recall(way, "beyond")[0] for way in patched):
            found.append(FORGETS)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        sides = {
            side: {way: dict(zip(("hits", "trials"), self.recall(way, side), strict=True)) for way in self.answers}
            for side in dict.fromkeys(self.side(distance) for distance in self.settings["distances"])
            if side
        }
        return {
            "settings": self.settings,
            "window": self.window,
            "recall": sides,
            "cells": {way: [dataclasses.asdict(cell) for cell in self.cells(way)] for way in self.answers},
            "answers": {way: [dataclasses.asdict(answer) for answer in found] for way, found in self.answers.items()},
            "sources": [dataclasses.asdict(source) for source in self.haystack.sources],
        }

    def write(self, folder: Path, **more: Any) -> None:
        """Write `FILES` to ``folder``, which is made if need be; ``more`` goes into the JSON."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "needle.json").write_text(json.dumps({**self.to_dict(), **more}, indent=2) + "\n")
        with (folder / "needle.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["model", "length", "distance", "window", "trials", "hits", "log_probability"])
            for way in self.answers:
                for cell in self.cells(way):
                    where = self.side(cell.distance)
                    writer.writerow([way, cell.length, cell.distance, where, cell.trials, cell.hits, f"{cell.log_probability:.4f}"])
        draw(self, folder / "needle.png")


def table(grid: NeedleGrid) -> Table:
    """The result for a terminal of 110 columns or more: a row per model and length, a column per distance."""
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
    for way in grid.answers:
        for number, length in enumerate(grid.settings["lengths"]):
            cells = {cell.distance: cell for cell in grid.cells(way) if cell.length == length}
            shown = [f"{c.hits}/{c.trials} {c.log_probability:6.2f}" if (c := cells.get(distance)) else "" for distance in distances]
            result.add_row(way if number == 0 else "", _short(length), *shown, end_section=length == grid.settings["lengths"][-1])
    return result


def draw(grid: NeedleGrid, path: Path) -> None:
    """Write the share of keys recalled as heat maps of length against distance, one per model, as a PNG."""
    from matplotlib.figure import Figure

    lengths, distances = grid.settings["lengths"], grid.settings["distances"]
    figure = Figure(figsize=(1.5 + 4.6 * len(grid.answers), 1.9 + 0.55 * len(lengths)), layout="constrained")
    panels = figure.subplots(1, len(grid.answers), squeeze=False, sharey=True)[0]
    for axes, way in zip(panels, grid.answers, strict=True):
        share = [[math.nan] * len(distances) for _ in lengths]
        for cell in grid.cells(way):
            row, column = lengths.index(cell.length), distances.index(cell.distance)
            share[row][column] = cell.hits / cell.trials
            label = f"{cell.hits}/{cell.trials}\n{cell.log_probability:.2f}"
            color = "white" if cell.hits > 0.55 * cell.trials else "black"
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=color)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_facecolor("0.93")
        axes.set_title(way, fontsize=10)
        axes.set_xticks(range(len(distances)), [_short(distance) for distance in distances])
        axes.set_yticks(range(len(lengths)), [_short(length) for length in lengths])
        axes.set_xlabel("tokens between key and answer")
        if grid.window is not None and way != UNPATCHED:
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
    """Where a window lies on an axis with a column for each distance: between two of them by its logarithm."""
    below = sum(distance <= window for distance in distances)
    if below == 0 or below == len(distances):
        return below - 0.5
    low, high = math.log(distances[below - 1]), math.log(distances[below])
    return below - 1 + (math.log(window) - low) / (high - low)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else f"{tokens:,}"
