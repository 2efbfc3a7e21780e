"""Time, memory and bandwidth of the patched model, compared with the unpatched one."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from patchkit.measure import paired
from patchkit.measure.latency import DecodeStream, decode_latency, median_ms, prefilled_cache
from patchkit.prove.checks.case import Case
from patchkit.prove.checks.feeding import cache_after
from patchkit.prove.checks.generating import NEW_TOKENS, generated, prompts
from patchkit.prove.checks.work import Work
from patchkit.prove.proof import Speed
from patchkit.quantised.experts import quantised_experts_of
from patchkit.views import cache_bytes, synchronize


def timed(case: Case) -> None:
    """Measure time, memory and bandwidth of the patched and the unpatched model, interleaved."""
    case.advance("timing")
    proof, (rounds, prefills), context = case.proof, _rounds(case), _context(case)
    views = {"unpatched": case.plain, "patched": case.full}
    prompt = case.sequence(min(256, context))
    caches = {name: prefilled_cache(view, context) for name, view in views.items()}
    if any(cache is None for cache in caches.values()):
        return
    timings = decode_latency({name: DecodeStream(view, caches[name]) for name, view in views.items()}, rounds=rounds)
    prefill = _interleaved({name: functools.partial(cache_after, view, prompt) for name, view in views.items()}, prefills)
    texts: dict[str, list[float]] = {}
    if _changes_generate(case):
        ids = prompts(case)[0]
        calls = {name: functools.partial(generated, case, view, ids) for name, view in views.items()}
        texts = {name: [ms / NEW_TOKENS for ms in times] for name, times in _interleaved(calls, prefills).items()}
        proof.generate_speedup = paired.median_ratio(texts["unpatched"], texts["patched"])
    proof.speedup = paired.median_ratio(timings["unpatched"], timings["patched"])
    proof.bandwidth_gb_s = bandwidth = _copy_bandwidth(case.model.device)
    for name, view in views.items():
        weights, kept = weight_bytes(view), cache_bytes(caches[name])
        ms = median_ms(timings, name)
        proof.speed[name] = Speed(
            context,
            prompt.shape[1],
            paired.median_ratio(prefill[name], [1.0] * len(prefill[name])).value,
            ms,
            sorted(timings[name])[math.ceil(0.95 * len(timings[name])) - 1],
            paired.median_ratio(texts[name], [1.0] * len(texts[name])).value if texts else None,
            weights,
            kept,
            (weights + kept) / (bandwidth * 1e9) / (ms / 1e3),
        )


def timing_work(case: Case) -> Work:
    """Cost of `timed`."""
    rounds, prefills = _rounds(case)
    texts = NEW_TOKENS * 2 * (prefills + 1) if _changes_generate(case) else 0
    return Work(2 * (rounds + 3) + texts, 2 * _context(case) + 2 * (prefills + 1) * min(256, _context(case)))


def _rounds(case: Case) -> tuple[int, int]:
    """Numbers of steps and of prompts that are timed."""
    return (40, 5) if case.thorough else (15, 3)


def _context(case: Case) -> int:
    return case.reach + 64 if case.longest is None else max(1, min(case.reach + 64, case.longest - _rounds(case)[0] - 8))


def _changes_generate(case: Case) -> bool:
    return bool(case.patches) and any(promise.same_tokens and not promise.same_up_to for promise in case.promises.values())


def _interleaved(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, interleaved; the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if index:
                times[name].append(1000 * (time.perf_counter() - started))
    return times


def weight_bytes(model: Any) -> int:
    """Bytes of the weights that one token reads: all but an embedding that is not tied to the head. int8 weights count as stored."""
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings().weight
    tied = head is not None and head.weight is embedding
    total = 0
    for parameter in model.parameters():
        if parameter is not embedding or tied:
            stored = getattr(parameter, "stored_bytes", None)
            total += parameter.nbytes if stored is None else stored()
    kept = (quantised_experts_of(module) or {} for module in model.modules())
    return total + sum(weights.stored_bytes() for each in kept for weights in each.values())


def _copy_bandwidth(device: torch.device) -> float:
    """GB/s read and written by the fastest of several copies of 128 MiB."""
    source = torch.ones(1 << 25, device=device)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best / 1e9
