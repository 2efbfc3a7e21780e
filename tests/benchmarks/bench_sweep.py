"""What a sweep costs beyond the forwards of the models that it measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from patchkit.models import load_model
from patchkit.search.sweep import documents, grid, run_sweep
from patchkit.streaming.reencode import Reencode


def test_overhead_beyond_the_models_own_time(
    benchmark: Any, record: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model, tokenizer = load_model("bundled")
    texts = documents(tokenizer, [], tokens=2048, count=4)
    patches = grid([508, 252, 124], [0, 4], [None, Reencode(64)])
    inside, forward = [0.0], LlamaForCausalLM.__call__

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return forward(self, *args, **kwargs)
        finally:
            inside[0] += time.perf_counter() - started

    monkeypatch.setattr(LlamaForCausalLM, "__call__", timed)

    def measure() -> float:
        inside[0], started = 0.0, time.perf_counter()
        run_sweep(model, texts, patches, tmp_path, "bundled", restart=True)
        return time.perf_counter() - started

    total = benchmark.pedantic(measure, rounds=1, iterations=1)
    overhead = total / inside[0] - 1
    record(
        "overhead_of_a_sweep",
        overhead,
        "<= 0.05",
        what="time of a sweep outside the models' forwards / inside them, plots and files included",
        seconds=total,
        seconds_in_forwards=inside[0],
        configurations=len(patches) + 2,
        tokens=sum(len(text.ids) - 1 for text in texts),
    )
    assert overhead <= 0.05
