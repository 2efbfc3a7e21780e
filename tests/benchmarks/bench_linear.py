"""Linear attention: the op against fused and unfused softmax attention."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from patchkit import LinearAttention, patched
from patchkit.kernels.linear_attention import linear_attention
from patchkit.kernels.research.linear_attention_step import linear_attention_step
from patchkit.measure.latency import decode_latency, median_ms, paired_ratio
from patchkit.measure.perplexity import block_nll, by_position, stream_nll
from patchkit.measure.texts import heldout_ids
from patchkit.models import load_model

HEADS, HEAD_DIM = 8, 128
# What `evals/train_stdlib.py linear` writes.
STATE = Path(__file__).resolve().parents[2] / "evals" / "work" / "linear_state.safetensors"


class Call:
    """A function that is timed as if it were a stream."""

    def __init__(self, function: Callable[[], object], times: int = 1) -> None:
        self.function, self.times = function, times

    @torch.no_grad()
    def step(self) -> float:
        started = time.perf_counter()
        for _ in range(self.times):
            self.function()
        return 1000 * (time.perf_counter() - started) / self.times


def unfused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT / HEAD_DIM**0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


# SDPA / ours; the router of the patch keeps softmax where ours takes more than 1.3 times as long.
@pytest.mark.parametrize(("tokens", "bar"), [(256, 1 / 1.3), (512, 1 / 1.3), (4096, 4.0), (16384, 12.0)])
def test_causal_attention(benchmark: Any, record: Callable[..., None], tokens: int, bar: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
    calls: dict[str, Any] = {
        "sdpa": Call(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)),
        "linear": Call(lambda: linear_attention(q, k, v)),
    }
    if tokens == 4096:
        calls["unfused"] = Call(lambda: unfused(q, k, v))
    rounds = {256: 200, 512: 100, 4096: 9, 16384: 5}[tokens]
    timings = benchmark.pedantic(decode_latency, args=(calls,), kwargs={"rounds": rounds}, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "sdpa", "linear")
    figures = {f"{name}_ms": median_ms(timings, name) for name in calls}
    if "unfused" in calls:
        figures["unfused_over_linear"] = paired_ratio(timings, "unfused", "linear")
    record(
        f"linear_attention_{tokens}",
        ratio,
        f">= {bar:.3g}",
        what=f"causal attention B1 H{HEADS} D{HEAD_DIM} fp32, {tokens} tokens: SDPA / linear_attention; unfused softmax has the bar >= 22",
        backend=linear_attention.choose(q, k, v),
        **figures,
    )
    assert ratio >= bar
    assert figures.get("unfused_over_linear", 22) >= 22


def test_a_step_costs_the_same_at_any_context(benchmark: Any, record: Callable[..., None]) -> None:
    torch.manual_seed(0)
    calls: dict[str, Any] = {}
    sizes = {}
    for tokens in (1024, 65536):
        q, k, v = (torch.randn(1, HEADS, tokens, HEAD_DIM) for _ in range(3))
        _, _, state, normalizer = linear_attention(q, k, v)
        new = [x[:, :, -1:].clone() for x in (q, k, v)]
        sizes[tokens] = state.nbytes + normalizer.nbytes
        calls[str(tokens)] = Call(lambda new=new, state=state, normalizer=normalizer: linear_attention_step(*new, state, normalizer), 20)
    timings = benchmark.pedantic(decode_latency, args=(calls,), kwargs={"rounds": 100}, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "65536", "1024")
    record(
        "linear_attention_step",
        ratio,
        "<= 1.05",
        what="linear_attention_step after 65536 tokens / after 1024; the bytes of state are the same",
        state_bytes=sizes[65536],
        **{f"step_ms_at_{name}": median_ms(timings, name) for name in calls},
    )
    assert ratio <= 1.05 and sizes[1024] == sizes[65536]


def test_quality_of_the_converted_model(benchmark: Any, record: Callable[..., None]) -> None:
    if not STATE.is_file():
        pytest.skip("there is no converted state: python evals/train_stdlib.py linear")
    model, tokenizer = load_model("bundled")
    ids, files = heldout_ids(tokenizer, 16384)

    def measure() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with patched(model, LinearAttention(state_dict=STATE), verbose=False):
            converted = block_nll(model, ids), stream_nll(model, ids)
        return *converted, block_nll(model, ids)

    fresh, streamed, unpatched = benchmark.pedantic(measure, rounds=1, iterations=1)
    # Positions 0-512 of one text are too few tokens: both start anew every 512, on the same tokens.
    within, late = by_position(fresh - unpatched, [0, len(fresh)])[0], by_position(streamed - unpatched, [4096, 16384])[0]
    for name, bucket, bar, what in (
        ("perplexity_of_linear_within", within, 1.03, "positions 0-512, both started anew every 512 tokens"),
        ("perplexity_of_linear_late", late, 1.10, "positions 4k-16k of one stream / unpatched started anew every 512, same tokens"),
    ):
        record(
            name,
            bucket.perplexity,
            f"<= {bar}",
            what=f"perplexity of stdlib-7m with linear(state_dict=...), window 64 in all layers / unpatched: {what}",
            standard_error=bucket.perplexity * bucket.stderr,
            tokens=bucket.tokens,
            files=files,
        )
    assert within.perplexity <= 1.03
    assert late.perplexity <= 1.10
