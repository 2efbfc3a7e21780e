"""int8 weights: the op against what torch and torchao do with the same layer, whole models against the unpatched ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from patchkit import MLPInt8, patch_model, patched, report
from patchkit.int8.weight import Int8Weight
from patchkit.kernels.int8_linear import int8_linear
from patchkit.measure.latency import DecodeStream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.measure.perplexity import block_nll
from patchkit.measure.texts import heldout_ids
from patchkit.models import load_model
from patchkit.views import twin

K, N = 2560, 10240


class Call:
    """A function that is timed as if it were a stream."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function = function

    def step(self) -> float:
        started = time.perf_counter()
        with torch.no_grad():
            self.function()
        return 1000 * (time.perf_counter() - started)


@pytest.mark.parametrize(("rows", "bars"), [(1, (2.7, 1.8)), (256, (6.0, 1.5))])
def test_int8_linear(benchmark: Any, record: Callable[..., None], rows: int, bars: tuple[float, float]) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(K, N), torch.randn(rows, K)
    half, half_x = nn.Linear(K, N).bfloat16(), x.bfloat16()
    weight = Int8Weight.quantize(plain.weight)
    calls: dict[str, Any] = {
        "fp32": Call(lambda: plain(x)),
        "bf16": Call(lambda: half(half_x)),
        "weight_only": Call(lambda: int8_linear(x, weight.qdata, weight.scale, plain.bias, "float")),
        "dynamic": Call(lambda: int8_linear(x, weight.qdata, weight.scale, plain.bias, "int8")),
    }
    timings = benchmark.pedantic(decode_latency, args=(calls,), kwargs={"rounds": 60 if rows == 1 else 12}, rounds=1, iterations=1)
    figures = {f"{base}_over_{mode}": paired_ratio(timings, base, mode) for base in ("fp32", "bf16") for mode in ("weight_only", "dynamic")}
    record(
        f"int8_linear_{rows}_rows",
        figures["fp32_over_dynamic"],
        f">= {bars[0]}",
        what=f"int8_linear {K} -> {N} with bias, {rows} rows: fp32 F.linear / ours (dynamic); bf16 has the bar >= {bars[1]}",
        backend=int8_linear.choose(x, weight.qdata, weight.scale, plain.bias, "int8"),
        **figures,
        **{f"{name}_ms": median_ms(timings, name) for name in calls},
    )
    assert figures["fp32_over_dynamic"] >= bars[0] and figures["bf16_over_dynamic"] >= bars[1]


def test_torchao_eager(benchmark: Any, record: Callable[..., None]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    theirs, x = nn.Sequential(nn.Linear(K, N)), torch.randn(1, K)
    weight, bias = Int8Weight.quantize(theirs[0].weight), theirs[0].bias.detach().clone()
    quantize_(theirs, Int8WeightOnlyConfig())
    calls: dict[str, Any] = {
        "torchao": Call(lambda: theirs(x)),
        "ours": Call(lambda: int8_linear(x, weight.qdata, weight.scale, bias, "float")),
    }
    timings = benchmark.pedantic(decode_latency, args=(calls,), kwargs={"rounds": 30}, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "torchao", "ours")
    record(
        "int8_linear_and_torchao",
        ratio,
        ">= 15",
        what=f"weight-only int8, {K} -> {N}, 1 row, fp32: torchao's Int8WeightOnlyConfig in eager mode / ours",
        torchao_ms=median_ms(timings, "torchao"),
        ours_ms=median_ms(timings, "ours"),
    )
    assert ratio >= 15


def test_decode(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = pythia("410m")
    int8 = patch_model(twin(model), "mlp_int8", verbose=False)
    both = patch_model(twin(model), "streaming(sinks=4, window=1020) + mlp_int8", verbose=False)
    rounds = 40
    streams = {
        "unpatched": DecodeStream(model, filled_cache(model, 1024 - rounds // 2)),
        "mlp_int8": DecodeStream(int8, filled_cache(int8, 1024 - rounds // 2)),
        "streaming_and_mlp_int8": DecodeStream(both, prefilled_cache(both, 1024 + 8)),
    }
    timings = benchmark.pedantic(decode_latency, args=(streams,), kwargs={"rounds": rounds, "warmup": 4}, rounds=1, iterations=1)
    alone = paired_ratio(timings, "unpatched", "mlp_int8")
    together = paired_ratio(timings, "unpatched", "streaming_and_mlp_int8")
    record(
        "decode_with_int8",
        alone,
        ">= 1.2",
        what="ms per token at context 1024, Pythia-410m shape, fp32, eager: unpatched / mlp_int8; with streaming the bar is >= 1.45",
        with_streaming=together,
        measured_while_patching=str(report(int8)),
        **{f"{name}_ms": median_ms(timings, name) for name in streams},
    )
    assert alone >= 1.2 and together >= 1.45


@pytest.mark.parametrize("mode", ["weight_only", "dynamic"])
def test_perplexity(benchmark: Any, record: Callable[..., None], mode: str) -> None:
    model, tokenizer = load_model("bundled")
    ids, files = heldout_ids(tokenizer, 16384)

    def measure() -> tuple[torch.Tensor, torch.Tensor]:
        with patched(model, MLPInt8(mode=mode), verbose=False):  # type: ignore[arg-type]
            int8 = block_nll(model, ids)
        return int8, block_nll(model, ids)

    int8, plain = benchmark.pedantic(measure, rounds=1, iterations=1)
    difference = int8 - plain
    ratio = math.exp(difference.mean().item())
    record(
        f"perplexity_of_int8_{mode}",
        ratio,
        "<= 1.003",
        what=f"perplexity of stdlib-7m with mlp_int8(mode={mode}) / without, same tokens, blocks of 512",
        standard_error=ratio * difference.std().item() / math.sqrt(len(difference)),
        tokens=len(difference),
        files=files,
    )
    assert ratio <= 1.003


def test_bytes(benchmark: Any, record: Callable[..., None], pythia: Callable[[str], PreTrainedModel]) -> None:
    model = twin(pythia("70m"))
    benchmark.pedantic(patch_model, args=(model, "mlp_int8(keep_original=False)"), kwargs={"verbose": False}, rounds=1, iterations=1)
    modules = report(model).patches[0].modules.values()
    held = sum(weight.qdata.nbytes + weight.scale.nbytes for weight in model.parameters() if isinstance(weight, Int8Weight))
    ratio = held / sum(facts["original_bytes"] for facts in modules)
    record("bytes_of_int8", ratio, "<= 0.27", what="bytes of the converted weights with keep_original=False / in fp32, Pythia-70m shape")
    assert ratio <= 0.27
