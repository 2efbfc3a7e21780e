"""Sweep of streaming over a grid of windows, sinks and refreshes: perplexity, milliseconds per token, and bytes of the cache.

* Every configuration scores the same documents, each streamed through one cache, and is compared with others document by document.
* Its steps are timed interleaved with those of the unpatched model at the longest document's length.
* A finished configuration is stored at once, and an interrupted sweep resumes from there.
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
from patchkit.measure.perplexity import TextError, block_nll, perplexity_of, stream_nll
from patchkit.measure.texts import encode, heldout_texts, read_text
from patchkit.patches.streaming import StreamingLLM
from patchkit.search.sweep_files import ids_digest, model_digest, store, stored_rows, write
from patchkit.search.sweep_result import BLOCKS, UNPATCHED, Sweep, SweepPoint
from patchkit.spelled import parse_object
from patchkit.streaming.heavy_hitters import DynamicSinks
from patchkit.streaming.reencode import Reencode
from patchkit.streaming.refresh import Refresh
from patchkit.streaming.rule import LayerRule
from patchkit.views import cache_bytes, twin

# Least number of timed rounds, where a round is R steps because every R-th one refreshes the cache.
_PERIODS = 3

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class TailInsert(DynamicSinks):
    """A control: the tokens that `DynamicSinks` chooses, reinserted at the end of the cache, at the newest positions, out of order."""

    name = "tail_insert"

    def first_position(self, rule: LayerRule) -> int:
        return rule.capacity - self.n


REFRESHES: tuple[type[Refresh], ...] = (Reencode, DynamicSinks, TailInsert)


@dataclass(frozen=True)
class Document:
    """A document to score: its name, and token ids [T]."""

    name: str
    ids: list[int]


def parse_refresh(text: str) -> Refresh | None:
    """Parse `none`, or a refresh as in a spec string; `tail_insert`, the control, is allowed too.

    Raises:
        SpecError: the text is none of these.
    """
    return None if text.strip() == "none" else parse_object(text, "refresh", REFRESHES)


def grid(windows: Sequence[int], sinks: Sequence[int], refreshes: Sequence[Refresh | None] = (None,)) -> list[StreamingLLM]:
    """Every combination of windows, sinks and refreshes; those of one window are neighbours."""
    return [StreamingLLM(s, window, refresh=refresh) for window in windows for s in sinks for refresh in refreshes]


def documents(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], tokens: int, count: int) -> list[Document]:
    """The first ``tokens`` predictions of each file, or, without files, of the first ``count`` held-out library files of that length.

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
    for number, text in enumerate(heldout_texts("give a text of your own with --text")):
        # A token, except the boundary token, is at least a byte: short files need not be encoded.
        ids = encode(tokenizer, text) if len(text.encode()) >= tokens else []
        if len(ids) > tokens:
            found.append(Document(f"held-out library file {number}", ids[: tokens + 1]))
        if len(found) == count:
            break
    if not found:
        raise TextError(f"no held-out library file has {tokens} tokens: ask for fewer with --tokens")
    return found


def work(patches: Sequence[StreamingLLM], texts: Sequence[Document]) -> int:
    """Number of tokens that `run_sweep` reports to ``advance``, if it does not resume and no patch is refused."""
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
        folder: where results go. A sweep of the same model, texts and options in it is resumed: its results are not measured again.
        name: of the model, for the record.
        chunk: tokens per forward when scoring.
        block: tokens after which the context of `BLOCKS` is cut off.
        rounds: timed steps per configuration; with a refresh every R steps, at least 3 R.
        restart: drop what is in the folder.
        advance: called with a description of the work and a number of finished tokens.

    Raises:
        SweepConflict: the folder holds something else.
    """
    weights = [len(text.ids) - 1 for text in texts]
    settings = {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "weights": model_digest(model),
        "texts": [{"name": text.name, "tokens": len(text.ids) - 1, "sha256": ids_digest(text.ids)} for text in texts],
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
        if any(point.name == spec for point in done):
            advance(f"{spec}: done before", scored)
            continue
        tell = partial(advance, spec)
        if each == BLOCKS:
            point = _in_blocks(plain, texts, weights, block, tell)
        else:
            point = _measured(plain, None if isinstance(each, str) else each, texts, weights, context, chunk, rounds, tell)
        done.append(point)
        store(sweep, folder)
    write(sweep, folder)
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
    """Measure the unpatched model (``patch`` None) or one patch."""
    point = SweepPoint(UNPATCHED)
    if patch is not None:
        point = SweepPoint(patch.spec, patch.sinks, patch.window, patch.refresh.spec if patch.refresh else None)
    try:
        view = model if patch is None else patch_model(twin(model), patch, verbose=False)
        point = _scored(point, [stream_nll(view, text.ids, chunk, tell) for text in texts], weights)
    except (UnsupportedModel, NothingMatched, StreamError) as reason:
        return dataclasses.replace(point, refused=str(reason))
    streams, period = {UNPATCHED: DecodeStream(model, filled_cache(model, context))}, 1
    if patch is not None:
        point = dataclasses.replace(point, refreshes=report(view).patches[0].hits.get("refreshes", 0))
        streams[point.name] = DecodeStream(view, prefilled_cache(view, patch.capacity + 1, chunk))
        period = patch.refresh.every if patch.refresh else 1
    timings = decode_latency(streams, rounds=period * max(_PERIODS if period > 1 else 1, math.ceil(rounds / period)))
    means = {name: [statistics.fmean(times[i : i + period]) for i in range(0, len(times), period)] for name, times in timings.items()}
    ratios = [own / unpatched for own, unpatched in zip(means[point.name], means[UNPATCHED], strict=True)]
    return dataclasses.replace(
        point,
        ms_per_token=statistics.median(means[point.name]),
        over_unpatched=statistics.median(ratios),
        cache_bytes=cache_bytes(streams[point.name].cache),
    )


def _scored(point: SweepPoint, nll: list[torch.Tensor], weights: list[int]) -> SweepPoint:
    means = [each.double().mean().item() for each in nll]
    total = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    return dataclasses.replace(point, nll=means, perplexity=perplexity_of(total))
