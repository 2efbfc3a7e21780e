"""Rollouts of a second epoch, for which those of the first draft, against the unpatched policy; and verdicts per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smollm2 import load_smollm2, needs_smollm2
from support import BEGINNINGS

from patchkit import patched
from patchkit.models import load_model
from patchkit.rl.reward import HmacKey, MatchesPattern, checked, signed
from patchkit.speculation import reset_statistics, statistics_of

GROUP, NEW, SPEC = 8, 64, "gemv + speculative(draft=suffix)"
QUESTIONS = ("What is 12 + 30?", "Name three colours.", "Write a sentence about the sea.", "What is the capital of France?")


def _measured(model: Any, prompts: list[torch.Tensor], **options: Any) -> tuple[float, float]:
    """Median of paired ratios, seconds of unpatched over patched rollouts of the second epoch; and tokens for each round and row."""

    def seconds(ids: torch.Tensor) -> float:
        torch.manual_seed(0)
        started = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, min_new_tokens=NEW, **options)
        return time.perf_counter() - started

    groups = [ids.repeat(GROUP, 1) for ids in prompts]
    seconds(groups[0])
    plain = [[seconds(ids) for ids in groups] for _ in range(3)]
    with patched(model, SPEC, verbose=False):
        for ids in groups:  # the first epoch
            seconds(ids)
        reset_statistics(model)
        ours = [[seconds(ids) for ids in groups] for _ in range(3)]
        tokens = statistics_of(model).tokens_per_target_step or 0.0
    ratios = [a / b for one, other in zip(plain, ours, strict=True) for a, b in zip(one, other, strict=True)]
    return statistics.median(ratios), tokens


@pytest.mark.parametrize(("name", "bar"), [("stdlib-7m", 1.2), pytest.param("smollm2", 1.3, marks=needs_smollm2)])
def test_second_epoch(name: str, bar: float, benchmark: Any, record: Callable[..., None]) -> None:
    model, tokenizer = load_smollm2() if name == "smollm2" else load_model(name)
    model = model.train()
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in (QUESTIONS if name == "smollm2" else BEGINNINGS[:4])]
    try:
        greedy = benchmark.pedantic(lambda: _measured(model, prompts, do_sample=False), rounds=1, iterations=1)
        sampled = {f"temperature_{t}": _measured(model, prompts, do_sample=True, top_k=0, temperature=t) for t in (0.5, 1.0)}
    finally:
        model.eval()
    record(
        f"rollouts_{name}",
        greedy[0],
        f">= {bar}",
        what=f"seconds of generate in training mode, unpatched over {SPEC}, second epoch, groups of {GROUP}, greedy; median of pairs",
        tokens_per_round=greedy[1],
        sampled={key: {"ratio": ratio, "tokens_per_round": tokens} for key, (ratio, tokens) in sampled.items()},
    )
    assert greedy[0] >= bar and greedy[1] >= 1.5


def test_verdicts(benchmark: Any, record: Callable[..., None]) -> None:
    key, count = HmacKey(bytes(range(32))), 20_000
    prompts, completions = ["What is 12 + 30?"] * count, [str(each) for each in range(count)]

    def rate() -> float:
        reward = checked(signed(MatchesPattern(r"\d+"), key), key)
        started = time.perf_counter()
        reward(prompts, completions, step=0)
        return count / (time.perf_counter() - started)

    found = benchmark.pedantic(lambda: statistics.median(rate() for _ in range(5)), rounds=1, iterations=1)
    record("verdicts", found, ">= 10000", what="verdicts per second, signed by HMAC and checked")
    assert found >= 1e4
