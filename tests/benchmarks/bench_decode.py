"""Time per token of StreamingLLM against the unpatched model, and along one stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from patchkit import StreamingLLM, patch_model
from patchkit.measure.latency import DecodeStream, Timings, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.views import twin

SINKS, WINDOW = 4, 1020


def streaming(model: PreTrainedModel) -> PreTrainedModel:
    return patch_model(twin(model), StreamingLLM(sinks=SINKS, window=WINDOW), verbose=False)


def timed(benchmark: Any, streams: dict[str, DecodeStream], rounds: int) -> Timings:
    return benchmark.pedantic(decode_latency, args=(streams,), kwargs={"rounds": rounds, "warmup": 4}, rounds=1, iterations=1)


def test_speedup_at_32k(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = pythia("160m")
    view = streaming(model)
    streams = {
        "unpatched": DecodeStream(model, filled_cache(model, 32768)),
        "streaming": DecodeStream(view, prefilled_cache(view, SINKS + WINDOW + 8)),
    }
    timings = timed(benchmark, streams, rounds=15)
    ratio = paired_ratio(timings, "unpatched", "streaming")
    record(
        "speedup_at_32k",
        ratio,
        ">= 12",
        what="ms per token at context 32768, unpatched / streaming(sinks=4, window=1020), Pythia-160m shape, fp32, random weights",
        unpatched_ms=median_ms(timings, "unpatched"),
        streaming_ms=median_ms(timings, "streaming"),
    )
    assert ratio >= 12


def test_cost_of_a_full_window(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = pythia("160m")
    view = streaming(model)
    rounds = 60
    streams = {
        # Its context grows by a token per round: begin as far below 1024 as it will end above.
        "unpatched": DecodeStream(model, filled_cache(model, SINKS + WINDOW - rounds // 2)),
        "streaming": DecodeStream(view, prefilled_cache(view, SINKS + WINDOW + 8)),
    }
    timings = timed(benchmark, streams, rounds)
    ratio = paired_ratio(timings, "streaming", "unpatched")
    record(
        "cost_of_a_full_window",
        ratio,
        "<= 1.03",
        what="ms per token, streaming(sinks=4, window=1020) with a full window / unpatched at context 1024, Pythia-160m shape, fp32",
        unpatched_ms=median_ms(timings, "unpatched"),
        streaming_ms=median_ms(timings, "streaming"),
    )
    assert ratio <= 1.03


def test_time_does_not_grow_along_a_stream(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    # A smaller shape, because both streams are really fed.
    view = streaming(pythia("70m"))
    early, late = 2_000, 60_000
    streams = {str(tokens): DecodeStream(view, prefilled_cache(view, tokens, chunk=1024)) for tokens in (early, late)}
    timings = timed(benchmark, streams, rounds=60)
    ratio = paired_ratio(timings, str(late), str(early))
    record(
        "time_along_a_stream",
        ratio,
        "<= 1.03",
        what="ms per token at token 60000 / at token 2000 of a stream, streaming(sinks=4, window=1020), Pythia-70m shape, fp32",
        early_ms=median_ms(timings, str(early)),
        late_ms=median_ms(timings, str(late)),
    )
    assert ratio <= 1.03
