"""A needle in a haystack: a five-digit key is said once in a long English text and asked for many tokens later.

Mohtashami & Jaggi 2023, "Landmark Attention", https://arxiv.org/abs/2305.16300 (the pass-key task). Differs from the paper in that the
haystack is fluent English (`english_text`) instead of one repeated sentence, that the key is said once, that it is asked for through the
model's chat template where it has one, that distances are exact numbers of the model's tokens, and that beside the greedy answer the
probability of the key is recorded, which tells apart what greedy decoding calls all or nothing.

The distance of a key is the number of tokens from the first of the sentence that says it to where the answer begins; what a window of W
tokens can still see is at a distance of at most W less the answer's length.

One trial reads one text for all its distances and lengths: the text without a key is read once, and where a key belongs the cache is copied
and goes on with the sentence that has it.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import inspect
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit import _compat
from patchkit.api import patch_model
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.measure.english_text import Source, english_ids
from patchkit.measure.latency import filled_cache
from patchkit.measure.perplexity import encode
from patchkit.patch import Patch
from patchkit.target import Target
from patchkit.views import twin

UNPATCHED = "unpatched"
FILES = ("needle.json", "needle.csv", "needle.png")
FORGETS = "beyond the window recall is 0: what is neither a sink nor in the window is forgotten, however good the perplexity"

_SAYS = "\n\nThe secret number is {key}. Remember it.\n\n"
_ASKS = "\n\nWhat is the secret number? Answer with the number only."
_ANSWERS = "The secret number is"
_ANY_KEY = "12345"
_ANSWER_TOKENS = 24
_CHUNK = 512
# Prompts of all the positions that a model was made for, a half, a quarter and an eighth; longer limits are not reached.
_SHARES, _SHORTEST, _LONGEST = (8, 4, 2, 1), 256, 8192
# Where trials begin in the text, in tokens one after the other.
_TRIAL_STRIDE = 512
_PLACE = "\u241f"
# How the pieces of byte-level and of SentencePiece vocabularies write a leading blank or line break.
_BLANKS = (" ", "\n", "Ġ", "Ċ", "▁", "<0x0A>")

Advance = Callable[[str, int], object]


class NeedleError(PatchError):
    """A needle cannot be placed or asked for; the message names the cause and the remedy."""


@dataclass(frozen=True)
class Asking:
    """How a key is said and asked for, as token ids.

    Attributes:
        chat: through the tokenizer's chat template; else the prompt ends with the words before the key.
        head: before the text.
        tail: after the text, up to where the answer begins.
        answer: what comes before the key in the answer whose probability is taken.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    head: list[int]
    tail: list[int]
    answer: list[int]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Asking:
        """
        Raises:
            NeedleError: the chat template does not hand a message on as it is.
        """
        if tokenizer.chat_template is None:
            return cls(tokenizer, False, encode(tokenizer, ""), _ids(tokenizer, f"{_ASKS}\n\n{_ANSWERS}"), [])
        message = [{"role": "user", "content": f"{_PLACE}{_ASKS}"}]
        # Models that think before they answer have templates that know this word; others ignore it.
        rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        head, found, tail = str(rendered).partition(_PLACE)
        if not found or not tail.startswith(_ASKS):
            raise NeedleError("the chat template changes what a user says, so a needle has no place in it: use a tokenizer without one")
        return cls(tokenizer, True, _ids(tokenizer, head), _ids(tokenizer, tail), _ids(tokenizer, _ANSWERS))

    def needle(self, key: str) -> list[int]:
        return _ids(self.tokenizer, _SAYS.format(key=key))

    def key(self, key: str) -> list[int]:
        return _ids(self.tokenizer, f" {key}")

    @property
    def words(self) -> str:
        """How it is asked, in words."""
        return "through the chat template" if self.chat else "as plain continuation"

    @property
    def least(self) -> int:
        """The shortest distance: needle and question alone."""
        return len(self.needle(_ANY_KEY)) + len(self.tail)

    def side(self, distance: int, window: int | None) -> str:
        """Where a key is to a model with a window: its whole sentence "inside" until the answer has said it, all of it "beyond" before
        the answer begins, or at the "edge"; "" without a window."""
        if window is None:
            return ""
        if distance + len(self.answer) + len(self.key(_ANY_KEY)) <= window:
            return "inside"
        return "beyond" if distance - len(self.needle(_ANY_KEY)) >= window else "edge"


@dataclass(frozen=True)
class Case:
    """One key to be found: at most ``length`` tokens of prompt, the key ``distance`` tokens before the answer."""

    length: int
    distance: int
    trial: int


@dataclass(frozen=True)
class Answer:
    """What a model made of a case.

    Attributes:
        tokens: of the prompt; up to a sentence less than the case's length, because the key stands between sentences.
        text: the greedy answer.
        hit: it contains the key.
        log_probability: mean over the key's tokens of their log-probability, each after the right ones before it, in nats.
    """

    case: Case
    key: str
    tokens: int
    text: str
    hit: bool
    log_probability: float


@dataclass(frozen=True)
class Cell:
    """All trials of one length and distance."""

    length: int
    distance: int
    trials: int
    hits: int
    log_probability: float


def lengths_for(model: PreTrainedModel) -> list[int]:
    """Lengths of prompts that suit a model's position limit, ascending."""
    longest = min(Target(model).position_limit or _LONGEST, _LONGEST)
    return [longest // share for share in _SHARES if share == 1 or longest // share >= _SHORTEST]


def possible(lengths: Sequence[int], distances: Sequence[int], trials: int, asking: Asking) -> list[Case]:
    """The cases of a grid whose key fits into the prompt.

    Raises:
        NeedleError: a distance is shorter than needle and question, or no distance fits any length.
    """
    if min(distances) < asking.least:
        raise NeedleError(f"a key {min(distances)} tokens before its answer leaves no room for the question: give at least {asking.least}")
    room = len(asking.head)
    cases = [Case(length, distance, trial) for trial in range(trials) for length in lengths for distance in distances]
    cases = [case for case in cases if room + case.distance <= case.length]
    if not cases:
        raise NeedleError(f"no prompt of {max(lengths)} tokens has room for a key {min(distances)} tokens before its answer")
    return cases


@dataclass(frozen=True)
class Haystack:
    """The English text around the keys, and where in it a sentence ends.

    Attributes:
        ids: of the text.
        breaks: indices into ``ids`` before which a sentence ends, ascending; 0 is the first.
        sources: the files it comes from.
        seed: of the keys.
    """

    asking: Asking
    ids: list[int]
    breaks: list[int]
    sources: list[Source]
    seed: int

    @classmethod
    def of(cls, asking: Asking, cases: Sequence[Case], seed: int = 0) -> Haystack:
        """Text enough for these cases.

        Raises:
            TextError: there is no text of that length on this machine.
        """
        longest = max(case.length for case in cases) + (1 + max(case.trial for case in cases)) * _TRIAL_STRIDE
        text, sources = english_ids(asking.tokenizer, longest)
        ids = text.tolist()[len(encode(asking.tokenizer, "")) :]
        pieces = asking.tokenizer.convert_ids_to_tokens(ids)
        breaks = [i for i in range(1, len(ids)) if pieces[i - 1].endswith(".") and pieces[i].startswith(_BLANKS)]
        return cls(asking, ids, [0, *breaks], sources, seed)

    def start(self, trial: int) -> int:
        """Where the text of a trial begins."""
        return next(place for place in self.breaks if place >= trial * _TRIAL_STRIDE)

    def place(self, case: Case) -> int:
        """Where the key of a case stands: between two sentences, as late as its prompt may be long."""
        start = self.start(case.trial)
        latest = start + case.length - len(self.asking.head) - case.distance
        return max(place for place in self.breaks if place <= latest)

    def key(self, case: Case) -> str:
        """Five digits that follow from seed and case alone."""
        return str(random.Random(f"{self.seed} {case.length} {case.distance} {case.trial}").randrange(10_000, 100_000))

    def before(self, case: Case) -> list[int]:
        """The prompt up to the sentence with the key."""
        return self.asking.head + self.ids[self.start(case.trial) : self.place(case)]

    def after(self, case: Case) -> list[int]:
        """The rest of the prompt: ``distance`` tokens.

        Raises:
            NeedleError: they are too few for needle and question.
        """
        needle, place = self.asking.needle(self.key(case)), self.place(case)
        between = case.distance - len(needle) - len(self.asking.tail)
        if between < 0:  # keys differ in their numbers of tokens
            raise NeedleError(f"a key {case.distance} tokens before its answer leaves no room for the question: give {-between} more")
        return needle + self.ids[place : place + between] + self.asking.tail

    def work(self, cases: Sequence[Case]) -> int:
        """How many tokens `answers` will report for these cases."""
        longest = {case.trial: 0 for case in cases}
        for case in cases:
            longest[case.trial] = max(longest[case.trial], len(self.before(case)))
        return sum(longest.values()) + sum(case.distance for case in cases)


def answers(view: PreTrainedModel, haystack: Haystack, cases: Sequence[Case], progress: Callable[[int], object]) -> list[Answer]:
    """What a model, patched or not, answers in each case, in the order of ``cases``.

    Raises:
        UnsupportedModel: the model returns no cache, or its position table ends before a prompt does.
    """
    found: dict[Case, Answer] = {}
    for trial in sorted({case.trial for case in cases}):
        cache, read = None, 0
        # In the order of their places, so that the text before one is the beginning of that before the next.
        for case in sorted((case for case in cases if case.trial == trial), key=haystack.place):
            before, after = haystack.before(case), haystack.after(case)
            cache = _read(view, before[read:], cache, progress)
            read = len(before)
            branch = _read(view, after[:-1], copy.deepcopy(cache), progress)
            found[case] = _answer(view, haystack, case, branch)
            progress(1)
    return [found[case] for case in cases]


def _answer(view: PreTrainedModel, haystack: Haystack, case: Case, cache: Any) -> Answer:
    """``cache`` holds all of the prompt but its last token, and is used up."""
    asking, key = haystack.asking, haystack.key(case)
    prompt = haystack.before(case) + haystack.after(case)
    ids = torch.tensor([prompt], device=view.device)
    pad = asking.tokenizer.pad_token_id if asking.tokenizer.pad_token_id is not None else asking.tokenizer.eos_token_id
    output: Any = view.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        **{_compat.CACHE: copy.deepcopy(cache)},
    )
    text = str(asking.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)).strip()
    digits = asking.key(key)
    forced = torch.tensor([[prompt[-1], *asking.answer, *digits]], device=view.device)
    with torch.no_grad():
        logits = view(input_ids=forced[:, :-1], use_cache=True, **{_compat.CACHE: cache}).logits[0, -len(digits) :].float()
    of_key = logits.log_softmax(-1).gather(1, forced[0, -len(digits) :, None])
    return Answer(case, key, len(prompt), text, key in text, of_key.mean().item())


def _read(view: PreTrainedModel, ids: list[int], cache: Any, progress: Callable[[int], object]) -> Any:
    """The cache after these tokens too."""
    # Only the cache is wanted: where a model allows it, the head runs on one position.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(view.forward).parameters else {}
    with torch.no_grad():
        for start in range(0, len(ids), _CHUNK):
            block = torch.tensor([ids[start : start + _CHUNK]], device=view.device)
            try:
                cache = _compat.cache_of(view(input_ids=block, use_cache=True, **{_compat.CACHE: cache}, **options))
            except IndexError as error:
                raise UnsupportedModel(
                    f"{type(view).__name__} cannot take a prompt of that length ({error}): its position table is shorter, or the "
                    "tokenizer is not its own. Ask for shorter --lengths"
                ) from error
            if cache is None:
                raise UnsupportedModel(f"{type(view).__name__} returns no cache, so texts cannot be read in parts")
            progress(block.shape[1])
    return cache


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


# -- the grid --------------------------------------------------------------------------------------------------------------


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

    def cells(self, way: str) -> list[Cell]:
        """Every length and distance that fits, in the order asked for."""
        grouped: dict[tuple[int, int], list[Answer]] = {}
        for answer in self.answers[way]:
            grouped.setdefault((answer.case.length, answer.case.distance), []).append(answer)
        return [
            Cell(*place, len(group), sum(a.hit for a in group), statistics.fmean(a.log_probability for a in group))
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


def run_needle(
    model: PreTrainedModel,
    haystack: Haystack,
    cases: Sequence[Case],
    patches: Sequence[Patch] = (),
    name: str = "",
    advance: Advance = lambda what, count: None,
) -> NeedleGrid:
    """Ask the unpatched model and, if any are given, the patched one; ``model`` itself stays unpatched, and weights are shared.

    Args:
        cases: from `possible`.
        name: of the model, for the record.
        advance: called with what is being done and a number of tokens done.

    Raises:
        PatchError: patches that the model cannot use, before any work is done.
    """
    views = {UNPATCHED: twin(model).eval()}
    if patches:
        views[" + ".join(patch.spec for patch in patches)] = patch_model(twin(model).eval(), *patches, verbose=False)
    asking = haystack.asking
    settings = {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "patches": [patch.spec for patch in patches],
        "asked": asking.words,
        "prompt": asking.tokenizer.decode([*asking.head, *asking.needle(_ANY_KEY), *asking.tail]),
        "lengths": sorted({case.length for case in cases}),
        "distances": sorted({case.distance for case in cases}),
        "trials": len({case.trial for case in cases}),
        "seed": haystack.seed,
    }
    found = {way: answers(view, haystack, cases, lambda count, way=way: advance(way, count)) for way, view in views.items()}  # type: ignore[misc]
    return NeedleGrid(settings, haystack, window_of(patches), found)


def window_of(patches: Sequence[Patch]) -> int | None:
    """The tokens of the narrowest window among these patches; None if there is none."""
    windows = [window for patch in patches if isinstance(window := getattr(patch, "window", None), int)]
    return min(windows) if windows else None


def estimated_seconds(model: PreTrainedModel, haystack: Haystack, cases: Sequence[Case], ways: int) -> float:
    """How long `run_needle` will take, about: from one forward of the unpatched model at half of the longest length."""
    cache = filled_cache(model, max(case.length for case in cases) // 2)
    started = time.perf_counter()
    _read(model, haystack.ids[:_CHUNK], cache, lambda count: None)
    return ways * haystack.work(cases) * (time.perf_counter() - started) / _CHUNK


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
