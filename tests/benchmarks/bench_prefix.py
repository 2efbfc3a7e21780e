"""`prefix_cache`: what it costs where prompts share nothing, and the time to the first token of a prompt that is kept.

python -m pytest tests/benchmarks/bench_prefix.py --benchmark-only
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from smollm2 import load_smollm2

from patchkit import patch_model
from patchkit.models import load_model
from patchkit.prefix import clear_prefix_cache, prefix_statistics
from patchkit.views import twin

PROMPT = 2049  # four blocks of 512, and the token that is always fed
NEW = 32


def model_of(name: str) -> Any:
    return load_model(name)[0] if name == "stdlib-7m" else load_smollm2()[0]


def seconds(model: Any, ids: torch.Tensor, new: int) -> float:
    started = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return time.perf_counter() - started


def random_prompt(model: Any, tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(5, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed))


def share_of(pairs: list[tuple[int, float, float]]) -> float:
    """Seconds with the patch over those without, of all prompts together."""
    return sum(pair[1] for pair in pairs) / sum(pair[2] for pair in pairs)


@pytest.mark.parametrize(("name", "rounds", "prompts"), [("stdlib-7m", 9, 24), ("smollm2", 3, 12)])
def test_prompts_that_share_nothing(benchmark: Any, record: Callable[..., None], name: str, rounds: int, prompts: int) -> None:
    plain = model_of(name)
    ours = patch_model(twin(plain), "prefix_cache", verbose=False)
    chance = random.Random(0)
    lengths = [200 + 600 * i // (prompts - 1) for i in range(prompts)]
    found: list[list[tuple[int, float, float]]] = []  # of each round: tokens, seconds with and without the patch
    for turn in range(-1, rounds):
        pairs = []
        for number, tokens in enumerate(chance.sample(lengths, len(lengths))):
            ids = random_prompt(plain, tokens, 1000 * (turn + 1) + number)
            order = [ours, plain] if (turn + number) % 2 else [plain, ours]
            times = {id(model): seconds(model, ids, NEW) for model in order}
            pairs.append((tokens, times[id(ours)], times[id(plain)]))
        if turn >= 0:
            found.append(pairs)
    assert prefix_statistics(ours).hits == 0 and prefix_statistics(ours).lookups == (rounds + 1) * prompts
    benchmark.pedantic(lambda: None, rounds=1)
    every = [pair for pairs in found for pair in pairs]
    parts = {"up_to_512": [pair for pair in every if pair[0] <= 512], "above_512": [pair for pair in every if pair[0] > 512]}
    figure = statistics.median(map(share_of, found))
    record(
        f"prefix_without_reuse_{name}",
        figure,
        "<= 1.03",
        what=f"seconds of {prompts} random prompts of 200 to 800 tokens, {NEW} new tokens each, with / without prefix_cache, {name}, "
        "fp32; median of rounds",
        rounds=[share_of(pairs) for pairs in found],
        median_of_pairs=statistics.median(ours / off for _, ours, off in every),
        **{part: share_of(pairs) for part, pairs in parts.items()},
    )
    assert figure <= 1.03


@pytest.mark.parametrize(
    ("name", "spec", "bar", "rounds"),
    [("stdlib-7m", None, 15, 9), ("stdlib-7m", "streaming(sinks=4, window=508)", 25, 9), ("smollm2", None, 15, 5)],
)
def test_time_to_the_first_token(benchmark: Any, record: Callable[..., None], name: str, spec: str | None, bar: float, rounds: int) -> None:
    plain = model_of(name)
    ours = patch_model(twin(plain), *([] if spec is None else [spec]), "prefix_cache", verbose=False)
    off = plain if spec is None else patch_model(twin(plain), spec, verbose=False)
    ids = random_prompt(plain, PROMPT, 0)
    times: dict[str, list[float]] = {"off": [], "miss": [], "hit": []}
    for turn in range(-1, rounds):
        clear_prefix_cache(ours)
        found = {"off": seconds(off, ids, 1)} if turn % 2 else {}
        found |= {"miss": seconds(ours, ids, 1), "hit": seconds(ours, ids, 1)}
        if "off" not in found:
            found["off"] = seconds(off, ids, 1)
        if turn >= 0:
            for way, took in found.items():
                times[way].append(took)
    assert prefix_statistics(ours).hits == rounds + 1
    benchmark.pedantic(lambda: None, rounds=1)
    ratios = {
        f"{above}_{below}": statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))
        for above, below in (("miss", "hit"), ("off", "hit"), ("miss", "off"))
    }
    figure = ratios.pop("miss_hit")
    label = name if spec is None else f"{name}_streaming"
    record(
        f"prefix_first_token_{label}",
        figure,
        f">= {bar}",
        what=f"time to the first token after {PROMPT} tokens, a miss / a hit, {name}{'' if spec is None else f', {spec}'}, fp32",
        **ratios,
        **{f"{way}_ms": 1000 * statistics.median(took) for way, took in times.items()},
    )
    assert figure >= bar
