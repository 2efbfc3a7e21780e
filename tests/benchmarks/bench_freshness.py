"""What it costs to look for changed weights: one stamp per call of generate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from patchkit.freshness import WeightWatch
from patchkit.models import load_model


def test_a_stamp(benchmark: Any, record: Callable[..., None]) -> None:
    model, _ = load_model("stdlib-7m")
    watch = WeightWatch(model)
    ids = torch.arange(64)[None]

    def timed(call: Callable[[], Any]) -> float:
        started = time.perf_counter()
        call()
        return time.perf_counter() - started

    def generate() -> None:
        model.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False)

    def measure() -> tuple[float, float]:
        generate()
        watch.changes()
        pairs = [(statistics.median(timed(watch.changes) for _ in range(20)), timed(generate)) for _ in range(9)]
        stamp, text = min(pairs, key=lambda pair: abs(pair[0] / pair[1] - statistics.median(a / b for a, b in pairs)))
        return stamp, text

    stamp, text = benchmark.pedantic(measure, rounds=1, iterations=1)
    record(
        "weight_watch",
        stamp / text,
        "<= 0.01",
        what="a look for changed weights of stdlib-7m, as a share of a generate of 64 tokens; median of paired ratios",
        stamp_ms=1000 * stamp,
        generate_ms=1000 * text,
        tensors=len(list(model.parameters())),
    )
    assert stamp / text <= 0.01
