"""Time per token with compiled steps against eager ones. Compilation is in the warm-up, and its time is recorded apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from patchkit import patch_model, report
from patchkit.measure.latency import DecodeStream, Timings, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.models import load_model
from patchkit.views import twin

SINKS = 4


def stream(model: PreTrainedModel, spec: str, tokens: int) -> DecodeStream:
    view = patch_model(twin(model), spec, verbose=False)
    return DecodeStream(view, prefilled_cache(view, tokens))


def timed(benchmark: Any, streams: dict[str, DecodeStream], rounds: int) -> Timings:
    return benchmark.pedantic(decode_latency, args=(streams,), kwargs={"rounds": rounds, "warmup": 8}, rounds=1, iterations=1)


def compilation(stream: DecodeStream) -> dict[str, float]:
    hits = report(stream.model).patches[-1].hits
    return {"graphs": hits["graphs compiled"], "compile_seconds": hits["compile milliseconds"] / 1000}


def test_compiled_steps_of_a_small_model(benchmark: Any, record: Callable[..., None]) -> None:
    model = load_model("stdlib-7m")[0].float()
    window = 512 - SINKS
    streams = {
        spec: stream(model, spec, 2 * window)
        for spec in (
            f"streaming(window={window})",
            f"streaming(window={window}) + compile",
            f"streaming(window={window}) + compile(mode='reduce-overhead')",
            f"streaming(window={window}) + compile(scope=layers)",
        )
    }
    timings = timed(benchmark, streams, rounds=300)
    eager, compiled, *others = streams
    ratio = paired_ratio(timings, eager, compiled)
    record(
        "compiled_steps_of_a_small_model",
        ratio,
        ">= 1.6",
        what=f"ms per token, {eager} / {compiled}, full window, stdlib-7m in fp32",
        eager_ms=median_ms(timings, eager),
        compiled_ms=median_ms(timings, compiled),
        **{f"ratio of {spec}": paired_ratio(timings, eager, spec) for spec in others},
        **compilation(streams[compiled]),
    )
    assert ratio >= 1.6


def test_everything_together(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = pythia("410m")
    window, rounds = 1024 - SINKS, 40
    eager, compiled = "unpatched", f"streaming(window={window}) + mlp_int8 + compile"
    streams = {
        # Its context grows by a token per round: begin as far below 1024 as it will end above.
        eager: DecodeStream(model, filled_cache(model, 1024 - rounds // 2)),
        compiled: stream(model, compiled, 1024 + 8),
    }
    timings = timed(benchmark, streams, rounds)
    ratio = paired_ratio(timings, eager, compiled)
    record(
        "everything_together",
        ratio,
        ">= 1.7",
        what=f"ms per token, unpatched at context 1024 / {compiled} at full window, Pythia-410m shape, fp32, random weights",
        eager_ms=median_ms(timings, eager),
        compiled_ms=median_ms(timings, compiled),
        **compilation(streams[compiled]),
    )
    assert ratio >= 1.7
