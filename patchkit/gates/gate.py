"""Regression gates: a patch compared with the unpatched model, interleaved in one process, and judged by confidence intervals.

A gate passes if the interval's worse end is within the bound: the data must show that the bound holds, so noise, too few rounds and
a patch that did not act fail and never pass. Times are paired by round, perplexity by document, with the intervals of
`patchkit.measure.paired`.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.anatomy.target import Target
from patchkit.api import patch_model, report
from patchkit.gates.result import PATCHED, UNPATCHED, Bounds, Gate, GateError, Hits, PerplexityIncrease, violations
from patchkit.gates.texts import DOCUMENT_TOKENS, texts_for
from patchkit.measure.calls import GenerateCalls, cache_of, run_within_positions
from patchkit.measure.latency import DecodeStream, Timings, decode_latency
from patchkit.measure.paired import Interval, mean_difference, median_ratio
from patchkit.measure.perplexity import perplexity_of, stream_nll
from patchkit.patch import Patch, Stage, available_patches
from patchkit.views import cache_bytes, twin

# Sequential sampling: rounds are timed in blocks until the interval is narrow relative to the ratio, so that a bar of 0.9 passes in A/A
# runs and fails at a slowdown of 20 % (tests/gates/test_gate.py). When to stop depends on the width alone, so it favours no verdict.
BLOCK = 60

LEAST_ROUNDS = 20

_MOST_ROUNDS = 600

_PATIENCE_S = 120.0

_WIDTH = 0.08

_WARMUP = 5

_MOST_CONTEXT = 1024


def run_gate(
    model: PreTrainedModel,
    patches: Patch | str | Sequence[Patch | str],
    bounds: Bounds,
    context: int | None = None,
    rounds: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    documents: Sequence[str | Sequence[int]] | None = None,
    timed: Callable[[Callable[[], Timed]], Timed] = lambda run: run(),
) -> Gate:
    """Measure a patched view of a model against an unpatched one. They share the weights, and `model` itself is not touched.

    Patches of `Stage.GENERATION` are timed through `generate`, others by steps of one token. Perplexity is that of real documents of
    up to `context` (at most 4096) tokens, streamed through one cache; the unpatched model restarts wherever the positions
    that it was made for end, because it degrades beyond them.

    Args:
        context: tokens before the timed ones; None: half the positions that the model was made for, at most 1024.
        rounds: number of interleaved rounds; None: 60, and more where the machine is noisy.
        tokenizer: for the texts; None: the one next to the model's files.
        documents: real texts, or their token ids, for perplexity and prompts; None: held-out files of Python's library.
        timed: calls the timed part, as pytest-benchmark does.

    Raises:
        GateError: nothing could be measured.
        PatchError: patches that do not exist or do not fit the model, or a model that is already patched.
    """
    if not isinstance(model, nn.Module):
        raise GateError(f"{model!r} is not a model: load it first")
    for option, value in (("context", context), ("rounds", rounds)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise GateError(f"{option}={value!r}: give a whole number")
    if rounds is not None and rounds < LEAST_ROUNDS:
        raise GateError(f"rounds={rounds} are too few for an interval: give at least {LEAST_ROUNDS}")
    view = patch_model(twin(model).eval(), patches, verbose=False)
    plain = twin(model).eval()
    limit = Target(plain).position_limit or math.inf
    context = int(min(_MOST_CONTEXT, limit / 2)) if context is None else context
    if context < 1:
        raise GateError(f"context={context}: give at least 1 token")
    kinds = {entry.name: available_patches()[entry.name] for entry in report(view).patches}
    specs = " + ".join(entry.spec for entry in report(view).patches)
    generates = any(kind.stage is Stage.GENERATION for kind in kinds.values())
    scored = bounds.max_ppl_increase is not None
    if scored and all(kind.exact for kind in kinds.values()):
        raise GateError(f"{specs} leaves every logit as it is, so max_ppl_increase bounds nothing: leave it out")

    texts: list[torch.Tensor] = []
    if scored or generates:
        length = context if generates else min(context, DOCUMENT_TOKENS)
        texts = texts_for(model, length, 2 if documents is not None and not generates else length, tokenizer, documents)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = max(1, context - (rounds or BLOCK) // 2)  # every step lengthens the cache by a token

        def streams() -> dict[str, DecodeStream]:
            models = {UNPATCHED: plain, PATCHED: view}
            return {
                name: GenerateCalls(each, None, texts) if generates else DecodeStream(each, cache_of(each, start))
                for name, each in models.items()
            }

        result = timed(lambda: run_within_positions(time_interleaved, streams, rounds, lambda: _hits(view)))
        failures = _idle(kinds, result.hits, "while it was timed")
        increase = None
        if scored:
            before = _hits(view)
            # Only attention patches claim anything beyond the model's positions.
            if not any(kind.stage is Stage.ATTENTION for kind in kinds.values()):
                texts = [text[: int(min(len(text), limit))] for text in texts]
            increase = run_within_positions(perplexity_increase, plain, view, texts, limit)
            approximate = {name: kind for name, kind in kinds.items() if not kind.exact}
            failures += _idle(
                approximate, _moved(before, _hits(view)), "while perplexity was measured, on texts that may be too short for it"
            )
    speedup = median_ratio(result.rounds_ms[UNPATCHED], result.rounds_ms[PATCHED])
    drafts = next((result.hits[name] for name, kind in kinds.items() if kind.stage is Stage.GENERATION), Counter[str]())
    return Gate(
        patches=specs,
        model=_described(plain),
        context=context,
        timed="generate" if generates else "decode",
        bounds=bounds,
        rounds_ms=result.rounds_ms,
        speedup=speedup,
        cache_bytes=result.cache_bytes,
        acceptance=drafts["accepted"] / drafts["proposed"] if drafts["proposed"] else None,
        hits=result.hits,
        perplexity=increase,
        failures=failures + violations(bounds, speedup, None if increase is None else increase.increase),
    )


@dataclass(frozen=True)
class Timed:
    """Timed rounds of both variants.

    Attributes:
        rounds_ms: milliseconds per token by variant, one entry per round.
        hits: by patch, how far its counters rose in these rounds.
        cache_bytes: bytes of the cache by variant, after the last round.
    """

    rounds_ms: Timings
    hits: Hits
    cache_bytes: dict[str, int]


def time_interleaved(make: Callable[[], Mapping[str, DecodeStream]], rounds: int | None = None, hits: Callable[[], Hits] = dict) -> Timed:
    """Time the streams `UNPATCHED` and `PATCHED` interleaved: ``rounds`` rounds, or blocks of them until the interval is narrow.

    Args:
        make: makes both streams; called for each block, so that their context stays the same.
        hits: returns the present counters.
    """
    timings: Timings = {UNPATCHED: [], PATCHED: []}
    counted: Hits = {}
    started = time.perf_counter()
    while True:
        streams = make()
        decode_latency(streams, 0, _WARMUP)
        before = hits()
        for name, times in decode_latency(streams, rounds or BLOCK, 0).items():
            timings[name] += times
        counted = {name: counted.get(name, Counter()) + moved for name, moved in _moved(before, hits()).items()}
        ratio = median_ratio(timings[UNPATCHED], timings[PATCHED])
        patient = len(timings[PATCHED]) < _MOST_ROUNDS and time.perf_counter() - started < _PATIENCE_S
        if rounds is not None or not patient or ratio.high - ratio.low <= _WIDTH * ratio.value:
            return Timed(timings, counted, {name: cache_bytes(stream.cache) for name, stream in streams.items()})


def perplexity_increase(
    plain: PreTrainedModel, view: PreTrainedModel, texts: Sequence[torch.Tensor], limit: float = math.inf
) -> PerplexityIncrease:
    """Score documents, ids [T] each, with an unpatched and a patched model; the unpatched one restarts every `limit` tokens."""
    tokens, nlls = [], {UNPATCHED: list[float](), PATCHED: list[float]()}
    for text in texts:
        block = int(min(limit, len(text)))
        pieces = [stream_nll(plain, text[start : start + block + 1]) for start in range(0, len(text) - 1, block)]
        tokens.append(len(text) - 1)
        nlls[UNPATCHED].append(torch.cat(pieces).double().mean().item())
        nlls[PATCHED].append(stream_nll(view, text).double().mean().item())
    difference = mean_difference(nlls[PATCHED], nlls[UNPATCHED], tokens)
    value, low, high = (perplexity_of(nats) - 1 for nats in (difference.value, difference.low, difference.high))
    return PerplexityIncrease(Interval(value, low, high), tokens, nlls[UNPATCHED], nlls[PATCHED])


def _described(model: PreTrainedModel) -> str:
    size = sum(parameter.numel() for parameter in model.parameters())
    return f"{type(model).__name__} of {size:,} parameters in {str(model.dtype).removeprefix('torch.')}"


def _hits(view: PreTrainedModel) -> Hits:
    return {entry.name: Counter(entry.hits) for entry in report(view).patches}


def _moved(before: Hits, now: Hits) -> Hits:
    return {name: counts - before[name] for name, counts in now.items()}  # Counter drops counts that are 0


def _idle(kinds: Mapping[str, type[Patch]], moved: Hits, when: str) -> list[str]:
    """Messages about patches whose counters did not rise."""
    found = []
    for name, kind in kinds.items():
        if not any(moved[name][counter] for counter in kind.acts or moved[name]):
            found.append(f"{name} never acted {when}: no count of {' or '.join(map(repr, kind.acts)) or 'anything'}")
    return found
