"""gemv: products of few rows against torch's, over weights that come from memory, and smollm2 decoded with and without it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchkit import patch_model, report
from patchkit.kernels.gemv import gemv
from patchkit.measure.latency import DecodeStream, decode_latency, median_ms, paired_ratio, prefilled_cache
from patchkit.models import ModelUnavailable, load_model
from patchkit.views import twin

# Of smollm2: outputs, inputs, and so many matrices that none is in a cache when its turn comes.
SHAPES = {"up": (1536, 576, 40), "down": (576, 1536, 40), "head": (49152, 576, 2)}


class Products:
    """Products of one input with a list of weights, timed as if they were a stream."""

    def __init__(self, run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, weights: list[torch.Tensor]) -> None:
        self.run, self.x, self.weights = run, x, weights

    @torch.no_grad()
    def step(self) -> float:
        started = time.perf_counter()
        for weight in self.weights:
            self.run(self.x, weight)
        return 1000 * (time.perf_counter() - started)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_few_rows(benchmark: Any, record: Callable[..., None], dtype: torch.dtype) -> None:
    figures: dict[str, Any] = {}

    def measure() -> None:
        for name, (n, k, count) in SHAPES.items():
            weights = [torch.randn(n, k, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(count)]
            for rows in (1, 2, 4, 6, 8, 16) if dtype is torch.float32 else (1, 2, 4, 6):
                x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
                timings = decode_latency(
                    {"torch": Products(nn.functional.linear, x, weights), "gemv": Products(gemv, x, weights)}, rounds=12
                )
                ms = median_ms(timings, "gemv")
                figures[f"{name}_{rows}_rows"] = {
                    "torch_over_gemv": paired_ratio(timings, "torch", "gemv"),
                    "gb_per_second": sum(weight.nbytes for weight in weights) / ms / 1e6,
                }

    benchmark.pedantic(measure, rounds=1, iterations=1)
    ratio = min(figure["torch_over_gemv"] for name, figure in figures.items() if name.endswith("_1_rows"))
    record(
        f"gemv_{'fp32' if dtype is torch.float32 else 'bf16'}",
        ratio,
        ">= 1.3",
        what="F.linear / gemv over weights from memory, smollm2's shapes; the figure is the least of one row",
        backend=gemv.choose(torch.randn(1, 576).to(dtype), torch.randn(9, 576).to(dtype), None),
        **figures,
    )
    assert ratio >= 1.3


def test_decode(benchmark: Any, record: Callable[..., None]) -> None:
    try:
        model, _ = load_model("smollm2")
    except ModelUnavailable as error:
        pytest.skip(str(error))
    specs = ("gemv", "mlp_int8", "gemv + mlp_int8")
    views = {"unpatched": model} | {spec: patch_model(twin(model), spec, verbose=False) for spec in specs}
    streams = {name: DecodeStream(view, prefilled_cache(view, 512)) for name, view in views.items()}
    timings = benchmark.pedantic(decode_latency, args=(streams,), kwargs={"rounds": 30, "warmup": 4}, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "unpatched", "gemv")
    record(
        "decode_with_gemv",
        ratio,
        ">= 1.5",
        what="ms per token at context 512, smollm2, fp32, eager: unpatched / gemv",
        measured_while_patching=str(report(views["gemv"])),
        **{f"unpatched_over_{spec}": paired_ratio(timings, "unpatched", spec) for spec in specs},
        **{f"{name}_ms": median_ms(timings, name) for name in streams},
    )
    assert ratio >= 1.5
