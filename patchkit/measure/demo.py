"""Demo of StreamingLLM and of slots beyond its window on a long text: quality, speed and memory, unpatched and patched."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model
from patchkit.measure.demo_plan import BEFORE_KEY, CHUNK, REFERENCE, SINKS, UNPATCHED, DemoPlan, plan_for
from patchkit.measure.demo_result import Demo, DemoRow, short
from patchkit.measure.english_text import TextSource, english_ids
from patchkit.measure.latency import DecodeStream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.measure.needle import answers
from patchkit.measure.needle_grid import Answer
from patchkit.measure.needle_text import Asking, Haystack, NeedleCase
from patchkit.measure.perplexity import block_nll, by_position, stream_nll
from patchkit.measure.texts import heldout_ids
from patchkit.patches.streaming import StreamingLLM
from patchkit.views import cache_bytes, twin

_CURVE_BINS = 28

Advance = Callable[[str, int], object]


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int | None = None,
    windows: Sequence[int] | None = None,
    advance: Advance = lambda what, count: None,
) -> Demo:
    """Score text unpatched, with `StreamingLLM(4, window)` at each window and with `Memory`, time decoding, and ask for keys.

    What is done follows the plan of `plan_for`.

    Every configuration is a view of the same weights; `model` itself stays unpatched.

    Args:
        advance: called with a description of the work and a number of finished tokens.

    Raises:
        TextError: no text on this machine, or none of that length.
        PatchError: a window that the model cannot use, before any work is done.
    """
    plan = plan_for(model, tokens, windows)
    views: dict[str, PreTrainedModel] = {UNPATCHED: model}
    for window in plan.windows:
        views[f"streaming {SINKS}+{window}"] = patch_model(twin(model), StreamingLLM(sinks=SINKS, window=window), verbose=False)
    if plan.memory is not None:
        views[plan.memory_name] = patch_model(twin(model), plan.memory, verbose=False)
    sources: list[TextSource] = []
    if plan.english:
        ids, sources = english_ids(tokenizer, plan.tokens)
        files = len(sources)
    else:
        ids, files = heldout_ids(tokenizer, plan.tokens)

    nll, caches = {}, {}
    for name, view in views.items():
        keeper = _Keeper(() if name == UNPATCHED else plan.contexts, len(ids) - 1)
        nll[name] = stream_nll(view, ids, CHUNK, partial(advance, f"scoring: {name}"), keeper)
        caches[name] = keeper.kept
    if plan.block is not None:
        nll[REFERENCE] = block_nll(model, ids, plan.block, progress=partial(advance, f"scoring: {REFERENCE}"))
    ms, speedup, size = _time(views, caches, plan.contexts, advance)
    asking, keys = _ask(views, tokenizer, plan.distances, advance)

    rows = []
    windows_held: list[int | None] = [None, *plan.windows, *([] if plan.memory is None else [plan.memory.window])]
    for name, held in zip(views, windows_held, strict=True):
        ratios = [] if name == plan.reference else by_position(nll[name] - nll[plan.reference], plan.compared)
        row = DemoRow(name, by_position(nll[name], plan.edges), _curve(nll[name], plan), ratios, held, ms[name], size[name], speedup[name])
        rows.append(dataclasses.replace(row, keys=keys.get(name, [])))
    if plan.block is not None:
        rows.insert(1, DemoRow(REFERENCE, by_position(nll[REFERENCE], plan.edges), _curve(nll[REFERENCE], plan), []))
    return Demo(plan, len(nll[UNPATCHED]), files, sources, rows, asking)


@dataclass
class _Keeper:
    """Keeps copies of the cache while a text is scored: as late as possible before each context, with the number of tokens seen."""

    contexts: Sequence[int]
    tokens: int
    kept: dict[int, tuple[int, Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, seen: int, cache: Any) -> None:
        for context in self.contexts:
            if 0 <= context - seen < CHUNK or context > seen == self.tokens:
                self.kept[context] = seen, copy.deepcopy(cache)


def _time(
    views: dict[str, PreTrainedModel], caches: dict[str, dict[int, tuple[int, Any]]], contexts: Sequence[int], advance: Advance
) -> tuple[dict[str, dict[int, float]], dict[str, float], dict[str, int]]:
    """Milliseconds per token by view and context, and at the longest context the speed-up and the bytes of the cache."""
    streams = {}
    for name, view in views.items():
        for context in contexts:
            if name == UNPATCHED:
                cache = filled_cache(view, context)
            else:
                seen, cache = caches[name].get(context, (0, None))
                tell = partial(advance, f"streaming to {short(context)}: {name}")
                cache = prefilled_cache(view, context - seen, CHUNK, cache, tell)
            streams[f"{name} at {context}"] = DecodeStream(view, cache)
    # Interleaved over contexts too: whether a curve is flat must not depend on drift in load.
    timings = decode_latency(streams)
    longest = max(contexts)
    ms = {name: {context: median_ms(timings, f"{name} at {context}") for context in contexts} for name in views}
    speedup = {name: paired_ratio(timings, f"{UNPATCHED} at {longest}", f"{name} at {longest}") for name in views}
    return ms, speedup, {name: cache_bytes(streams[f"{name} at {longest}"].cache) for name in views}


def _ask(
    views: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, distances: Sequence[int], advance: Advance
) -> tuple[Asking | None, dict[str, list[Answer]]]:
    """Return how keys were asked for, and the answers of each view; None and no answers without distances."""
    if not distances:
        return None, {}
    asking = Asking.of(tokenizer)
    cases = [NeedleCase(len(asking.head) + BEFORE_KEY + distance, distance, 0) for distance in distances]
    haystack = Haystack.of(asking, cases)
    return asking, {name: answers(view, haystack, cases, partial(advance, f"asking for keys: {name}")) for name, view in views.items()}


def _curve(nll: torch.Tensor, plan: DemoPlan) -> list[tuple[float, float]]:
    if plan.english:
        edges = [round(len(nll) * i / _CURVE_BINS) for i in range(_CURVE_BINS + 1)]
        return [((b.start + b.stop) / 2, b.perplexity) for b in by_position(nll, sorted(set(edges)))]
    first, last = min(32, len(nll)), len(nll)
    edges = sorted({round(first * (last / first) ** (i / _CURVE_BINS)) for i in range(_CURVE_BINS + 1)})
    return [(math.sqrt(b.start * b.stop), b.perplexity) for b in by_position(nll, edges)]
