"""Perplexity, milliseconds per token and bytes of a cache: streaming over a grid of windows, sinks and refreshes, and the unpatched model.

Every configuration scores the same documents, each streamed through one cache of its own, and is compared with others by the differences
document by document. Its steps are timed in turns with those of the unpatched model at the longest document's length. What is finished is
stored at once, and a sweep that was interrupted goes on from there.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model, report
from patchkit.errors import NothingMatched, StreamError, UnsupportedModel
from patchkit.measure.environment import environment
from patchkit.measure.latency import DecodeStream, decode_latency, filled_cache, prefilled_cache
from patchkit.measure.perplexity import TextError, block_nll, encode, perplexity_of, read_text, stream_nll
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.patches.streaming import StreamingLLM
from patchkit.search.sweep_result import BLOCKS, UNPATCHED, Sweep, SweepPoint, digest, fingerprint, stored_rows
from patchkit.spelled import parse_object
from patchkit.streaming.heavy_hitters import DynamicSinks
from patchkit.streaming.reencode import Reencode
from patchkit.streaming.refresh import Refresh
from patchkit.streaming.rule import LayerRule
from patchkit.views import cache_bytes, twin

# Periods of R steps that are timed at least: R steps are a round where every R-th one refreshes.
_PERIODS = 3

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class TailInsert(DynamicSinks):
    """A control: the tokens that `DynamicSinks` chooses, put back at the end of the cache, at the newest positions, out of order."""

    name = "tail_insert"

    def place(self, rule: LayerRule) -> int:
        return rule.capacity - self.n


REFRESHES: tuple[type[Refresh], ...] = (Reencode, DynamicSinks, TailInsert)


@dataclass(frozen=True)
class Document:
    """A text to score: its name, and token ids [T]."""

    name: str
    ids: list[int]


def parse_refresh(text: str) -> Refresh | None:
    """`none`, or a refresh as a spec string writes it; `tail_insert`, the control, too.

    Raises:
        SpecError: it is none of these.
    """
    return None if text.strip() == "none" else parse_object(text, "refresh", REFRESHES)


def grid(windows: Sequence[int], sinks: Sequence[int], refreshes: Sequence[Refresh | None] = (None,)) -> list[StreamingLLM]:
    """Every combination, those of one window together."""
    return [StreamingLLM(s, window, refresh=refresh) for window in windows for s in sinks for refresh in refreshes]


def documents(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], tokens: int, count: int) -> list[Document]:
    """The first ``tokens`` tokens of each file, or, without files, of the first ``count`` held-out library files that have as many.

    Raises:
        TextError: a file cannot be read or has fewer than two tokens, or the library has no file that long.
    """
    if files:
        found = [Document(str(path), encode(tokenizer, read_text(path))[: tokens + 1]) for path in files]
        for document in found:
            if len(document.ids) < 2:
                raise TextError(f"{document.name} has {len(document.ids)} token(s), which leaves nothing to predict: give a longer text")
        return found
    found = []
    try:
        for number, text in enumerate(read_texts(stdlib_files("heldout"))):
            # A token is at least a byte, but for the boundary: short files need not be encoded.
            ids = encode(tokenizer, text) if len(text.encode()) >= tokens else []
            if len(ids) > tokens:
                found.append(Document(f"held-out library file {number}", ids[: tokens + 1]))
            if len(found) == count:
                break
    except FileNotFoundError as error:
        raise TextError(f"{error}: give a text of your own with --text") from error
    if not found:
        raise TextError(f"no held-out library file has {tokens} tokens: ask for fewer with --tokens")
    return found


def work(patches: Sequence[StreamingLLM], texts: Sequence[Document]) -> int:
    """How many tokens `run_sweep` will report to ``advance``, if it starts anew and nothing is refused."""
    return (2 + len(patches)) * sum(len(text.ids) - 1 for text in texts)


def run_sweep(
    model: PreTrainedModel,
    texts: Sequence[Document],
    patches: Sequence[StreamingLLM],
    folder: Path,
    name: str = "",
    chunk: int = 512,
    block: int = 512,
    rounds: int = 15,
    restart: bool = False,
    advance: Advance = lambda what, count: None,
) -> Sweep:
    """Measure the unpatched model and every patch; ``model`` itself stays unpatched, and weights are shared.

    Args:
        folder: where results go. A sweep of the same model, texts and options that is there goes on; rows it has are not measured again.
        name: of the model, for the record.
        chunk: tokens per forward when scoring.
        block: tokens after which the context of `BLOCKS` is cut.
        rounds: timed steps per configuration; with a refresh every R steps, at least three times R.
        restart: drop what is in the folder.
        advance: called with what is being done and a number of tokens done.

    Raises:
        SweepConflict: the folder holds something else.
    """
    weights = [len(text.ids) - 1 for text in texts]
    settings = {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "weights": fingerprint(model),
        "texts": [{"name": text.name, "tokens": len(text.ids) - 1, "sha256": digest(text.ids)} for text in texts],
        "chunk": chunk,
        "block": block,
        "rounds": rounds,
        "environment": environment(),
    }
    plain = twin(model).eval()
    done = [] if restart else stored_rows(folder, settings)
    sweep = Sweep(settings, weights, done)
    context = max(weights)
    scored = sum(weights)
    wanted: list[StreamingLLM | str] = [BLOCKS, UNPATCHED, *patches]
    for each in wanted:
        spec = each if isinstance(each, str) else each.spec
        if any(row.name == spec for row in done):
            advance(f"{spec}: done before", scored)
            continue
        tell = partial(advance, spec)
        if each == BLOCKS:
            row = _in_blocks(plain, texts, weights, block, tell)
        else:
            row = _measured(plain, None if isinstance(each, str) else each, texts, weights, context, chunk, rounds, tell)
        done.append(row)
        sweep.store(folder)
    sweep.write(folder)
    return sweep


def _in_blocks(
    model: PreTrainedModel, texts: Sequence[Document], weights: list[int], block: int, tell: Callable[[int], object]
) -> SweepPoint:
    try:
        return _scored(SweepPoint(BLOCKS), [block_nll(model, text.ids, block, progress=tell) for text in texts], weights)
    except IndexError as error:
        reason = f"{type(model).__name__} cannot take {block} tokens ({error}): its position table is shorter, or the tokenizer not its own"
        return SweepPoint(BLOCKS, refused=f"{reason}. Give a smaller --block")


def _measured(
    model: PreTrainedModel,
    patch: StreamingLLM | None,
    texts: Sequence[Document],
    weights: list[int],
    context: int,
    chunk: int,
    rounds: int,
    tell: Callable[[int], object],
) -> SweepPoint:
    """The row of the unpatched model (``patch`` None) or of one patch."""
    row = SweepPoint(UNPATCHED)
    if patch is not None:
        row = SweepPoint(patch.spec, patch.sinks, patch.window, patch.refresh.spec if patch.refresh else None)
    try:
        view = model if patch is None else patch_model(twin(model), patch, verbose=False)
        row = _scored(row, [stream_nll(view, text.ids, chunk, tell) for text in texts], weights)
    except (UnsupportedModel, NothingMatched, StreamError) as reason:
        return dataclasses.replace(row, refused=str(reason))
    streams, period = {UNPATCHED: DecodeStream(model, filled_cache(model, context))}, 1
    if patch is not None:
        row = dataclasses.replace(row, refreshes=report(view).patches[0].hits.get("refreshes", 0))
        streams[row.name] = DecodeStream(view, prefilled_cache(view, patch.capacity + 1, chunk))
        period = patch.refresh.every if patch.refresh else 1
    timings = decode_latency(streams, rounds=period * max(_PERIODS if period > 1 else 1, math.ceil(rounds / period)))
    means = {name: [statistics.fmean(times[i : i + period]) for i in range(0, len(times), period)] for name, times in timings.items()}
    ratios = [mine / its for mine, its in zip(means[row.name], means[UNPATCHED], strict=True)]
    return dataclasses.replace(
        row,
        ms_per_token=statistics.median(means[row.name]),
        over_unpatched=statistics.median(ratios),
        cache_bytes=cache_bytes(streams[row.name].cache),
    )


def _scored(row: SweepPoint, nll: list[torch.Tensor], weights: list[int]) -> SweepPoint:
    means = [each.double().mean().item() for each in nll]
    total = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    return dataclasses.replace(row, nll=means, perplexity=perplexity_of(total))
