"""Recall by length and distance: the figures, a table and a picture."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from patchkit.measure.needle_text import Haystack, NeedleCase

UNPATCHED = "unpatched"


FORGETS = "beyond the window recall is 0: what is neither a sink nor in the window is forgotten, however good the perplexity"


@dataclass(frozen=True)
class Answer:
    """Answer of a model in one case.

    Attributes:
        tokens: of the prompt; up to a sentence less than the case's length, because the key is placed between sentences.
        text: the greedy answer.
        hit: it contains the key.
        log_probability: mean log-probability of the key's tokens under teacher forcing, in nats.
    """

    case: NeedleCase
    key: str
    tokens: int
    text: str
    hit: bool
    log_probability: float


@dataclass(frozen=True)
class RecallCell:
    """Recall over all trials of one length and distance."""

    length: int
    distance: int
    trials: int
    hits: int
    log_probability: float


@dataclass(frozen=True)
class NeedleGrid:
    """The result of `run_needle`.

    Attributes:
        settings: model, patches, prompts and options.
        window: number of tokens in the patched model's window; None without a window.
        answers: of the unpatched model, and of the patched one under its spec.
    """

    settings: dict[str, Any]
    haystack: Haystack
    window: int | None
    answers: dict[str, list[Answer]]

    def cells(self, model: str) -> list[RecallCell]:
        """Recall of a model at every length and distance that fits, in the order of the settings."""
        grouped: dict[tuple[int, int], list[Answer]] = {}
        for answer in self.answers[model]:
            grouped.setdefault((answer.case.length, answer.case.distance), []).append(answer)
        return [
            RecallCell(*place, len(group), sum(a.hit for a in group), statistics.fmean(a.log_probability for a in group))
            for place, group in grouped.items()
        ]

    def side(self, distance: int) -> str:
        """Position of a key relative to the patched model's window: "inside", "edge", "beyond", or "" without a window."""
        return self.haystack.asking.side(distance, self.window)

    def recall(self, model: str, side: str) -> tuple[int, int]:
        """Hits and trials of a model at the distances on one side of the window."""
        chosen = [answer for answer in self.answers[model] if self.side(answer.case.distance) == side]
        return sum(answer.hit for answer in chosen), len(chosen)

    def lines(self) -> list[str]:
        """Sentences about the recall."""
        if self.window is None:
            return [f"{model}: {sum(a.hit for a in found)} of {len(found)} keys recalled" for model, found in self.answers.items()]
        sides = {"inside": f"inside the window of {self.window:,} tokens", "edge": "at its edge", "beyond": "beyond it"}
        found = []
        for side, words in sides.items():
            if self.recall(UNPATCHED, side)[1]:
                counts = ", ".join("{} {} of {}".format(model, *self.recall(model, side)) for model in self.answers)
                found.append(f"keys recalled {words}: {counts}")
        patched = [model for model in self.answers if model != UNPATCHED]
        if self.recall(UNPATCHED, "beyond")[0] and not any(self.recall(model, "beyond")[0] for model in patched):
            found.append(FORGETS)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        sides = {
            side: {model: dict(zip(("hits", "trials"), self.recall(model, side), strict=True)) for model in self.answers}
            for side in dict.fromkeys(self.side(distance) for distance in self.settings["distances"])
            if side
        }
        return {
            "settings": self.settings,
            "window": self.window,
            "recall": sides,
            "cells": {model: [dataclasses.asdict(cell) for cell in self.cells(model)] for model in self.answers},
            "answers": {model: [dataclasses.asdict(answer) for answer in found] for model, found in self.answers.items()},
            "sources": [dataclasses.asdict(source) for source in self.haystack.sources],
        }
