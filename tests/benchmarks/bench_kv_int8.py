"""Windows and slots in int8 (`kv="int8"`) against the same patch without: time per token, perplexity, bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from patchkit import patch_model, patched
from patchkit.measure.english_text import english_ids
from patchkit.measure.latency import DecodeStream, decode_latency, median_ms, paired_ratio, prefilled_cache
from patchkit.measure.perplexity import stream_nll
from patchkit.models import load_model
from patchkit.views import twin

# By patch, the spec up to its last option.
TIMED = {"streaming": "streaming(window=1020{})", "memory": "memory(slots=428{})"}
READ = {"streaming": "streaming(window=508{})", "memory": "memory(slots=428{})"}
TOKENS = 16384


@pytest.mark.parametrize("steps", ["eager", "compiled"])
@pytest.mark.parametrize("patch", TIMED)
def test_time_per_token(benchmark: Any, record: Callable[..., None], patch: str, steps: str) -> None:
    model, more = load_model("smollm2")[0].float(), " + compile" if steps == "compiled" else ""
    specs = {kv: TIMED[patch].format(option) + more for kv, option in (("model", ""), ("int8", ", kv=int8"))}
    # Both are patched before either is compiled: patching makes torch forget compiled code.
    views = {kv: patch_model(twin(model), spec, verbose=False) for kv, spec in specs.items()}
    streams = {kv: DecodeStream(view, prefilled_cache(view, 1100)) for kv, view in views.items()}
    options = {"rounds": 60, "warmup": 8}
    timings = benchmark.pedantic(decode_latency, args=(streams,), kwargs=options, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "int8", "model")
    record(
        f"time_of_kv_int8_{patch}_{steps}",
        ratio,
        "<= 1.1",
        what=f"ms per token, {specs['int8']} / {specs['model']}, full window, smollm2 in fp32",
        int8_ms=median_ms(timings, "int8"),
        model_ms=median_ms(timings, "model"),
        bytes_ratio=streams["int8"].cache.n_bytes() / streams["model"].cache.n_bytes(),
    )
    assert ratio <= 1.1


@pytest.mark.parametrize("patch", READ)
def test_perplexity(benchmark: Any, record: Callable[..., None], patch: str) -> None:
    model, tokenizer = load_model("smollm2")
    ids = english_ids(tokenizer, TOKENS)[0]

    def measure() -> list[torch.Tensor]:
        found = []
        for option in ("", ", kv=int8"):
            with torch.no_grad(), patched(model, READ[patch].format(option), verbose=False):
                found.append(stream_nll(model, ids))
        return found

    plain, rounded = benchmark.pedantic(measure, rounds=1, iterations=1)
    ratio = (rounded - plain).double().mean().exp().item()
    record(
        f"perplexity_of_kv_int8_{patch}",
        ratio,
        "<= 1.002",
        what=f"perplexity of English text, {READ[patch].format(', kv=int8')} / {READ[patch].format('')}, smollm2 in fp32",
        int8=rounded.double().mean().exp().item(),
        model=plain.double().mean().exp().item(),
        tokens=len(plain),
    )
    assert ratio <= 1.002
