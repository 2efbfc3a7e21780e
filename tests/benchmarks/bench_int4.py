"""int4 weights: the op over weights from memory, smollm2 decoded beside int8 and gemv, perplexity by fit, and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from patchkit import patch_model, patched, report
from patchkit.int4.scheme import Int4Scheme
from patchkit.int4.weight import Int4Weight
from patchkit.kernels.gemv import gemv
from patchkit.kernels.int4_linear import int4_linear
from patchkit.kernels.int8_linear import int8_linear
from patchkit.measure.english_text import english_ids
from patchkit.measure.latency import DecodeStream, decode_latency, median_ms, paired_ratio, prefilled_cache
from patchkit.measure.perplexity import block_nll
from patchkit.measure.texts import heldout_ids
from patchkit.models import ModelUnavailable, load_model
from patchkit.patches.int4 import Int4
from patchkit.views import twin

# Outputs, inputs, and so many matrices that none is in a cache when its turn comes: smollm2's, and two larger ones.
SHAPES = {
    "smollm2_up": (1536, 576, 60),
    "smollm2_down": (576, 1536, 60),
    "smollm2_q": (576, 576, 150),
    "smollm2_head": (49152, 576, 3),
    "2048x2048": (2048, 2048, 20),
    "2048x8192": (2048, 8192, 6),
}
TOKENS = 16384


class Products:
    """Products of one input with a list of weights, timed as if they were a stream."""

    def __init__(self, run: Callable[..., torch.Tensor], weights: list[Any]) -> None:
        self.run, self.weights = run, weights

    @torch.no_grad()
    def step(self) -> float:
        started = time.perf_counter()
        for weight in self.weights:
            self.run(weight)
        return 1000 * (time.perf_counter() - started)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows(benchmark: Any, record: Callable[..., None], shape: str) -> None:
    """GB/s of the stored bytes at 1 to 512 rows, and torch's time over ours."""
    n, k, count = SHAPES[shape]
    figures: dict[str, Any] = {}

    def measure() -> None:
        plain = [torch.randn(n, k, generator=torch.Generator().manual_seed(i)) * 0.02 for i in range(count)]
        first = Int4Scheme().quantize(plain[0])
        packed = [Int4Weight(first.qdata.clone(), first.scale.clone(), first.dtype, inputs=k) for _ in plain]
        values = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for _ in plain]
        scale = torch.rand(n) * 1e-3
        for rows in (1, 2, 4, 8, 16, 512):
            x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows))
            part = slice(None) if rows < 512 else slice(max(1, count // 10))
            calls: dict[str, Any] = {
                "torch": Products(lambda w, x=x: nn.functional.linear(x, w), plain[part]),
                "weight_only": Products(lambda w, x=x: int4_linear(x, w.qdata, w.scale, None, 32, "float"), packed[part]),
                "dynamic": Products(lambda w, x=x: int4_linear(x, w.qdata, w.scale, None, 32, "int8"), packed[part]),
                "int8_weight_only": Products(lambda w, x=x: int8_linear(x, w, scale, None, "float"), values[part]),
            }
            if rows <= 16:
                calls["gemv"] = Products(lambda w, x=x: gemv(x, w), plain[part])
            timings = decode_latency(calls, rounds=12 if rows <= 16 else 5)
            stored = sum(each.stored_bytes() for each in packed[part])
            figures[f"{rows}_rows"] = {
                **{f"torch_over_{name}": paired_ratio(timings, "torch", name) for name in calls if name != "torch"},
                **{f"gb_per_second_{name}": stored / median_ms(timings, name) / 1e6 for name in ("weight_only", "dynamic")},
                **{f"{name}_ms_per_product": median_ms(timings, name) / len(plain[part]) for name in calls},
            }

    benchmark.pedantic(measure, rounds=1, iterations=1)
    ratio = figures["1_rows"]["torch_over_weight_only"]
    record(
        f"int4_linear_{shape}",
        ratio,
        ">= 2",
        what=f"F.linear in fp32 / int4_linear, {k} -> {n}, groups of 32 with minima, weights from memory; the figure is that of one row",
        backend=int4_linear.choose(torch.randn(1, k), *_sample(n, k), None, 32, "float"),
        **figures,
    )
    assert ratio >= 2


def _sample(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = Int4Scheme().quantize(torch.randn(n, k))
    return weight.qdata, weight.scale


def _smollm2() -> Any:
    try:
        return load_model("smollm2")
    except ModelUnavailable as error:
        pytest.skip(str(error))


def test_decode(benchmark: Any, record: Callable[..., None]) -> None:
    model, _ = _smollm2()
    int4 = "int4(scope='all+head')"
    specs = {
        "gemv": "gemv",
        "int8": "int8(scope='all+head')",
        "int4": int4,
        "int4_weight_only": "int4(scope='all+head', mode=weight_only)",
        "int4_dynamic": "int4(scope='all+head', mode=dynamic)",
        "int4_symmetric": "int4(scope='all+head', symmetric=True)",
        "int4_and_int8_head": "int4 + int8(scope='all+head', modules=lm_head)",
        "int8_and_compile": "int8(scope='all+head') + streaming(window=1020) + compile",
        "int4_and_compile": f"{int4} + streaming(window=1020) + compile",
    }
    views = {"unpatched": model} | {name: patch_model(twin(model), spec, verbose=False) for name, spec in specs.items()}
    streams = {name: DecodeStream(view, prefilled_cache(view, 512)) for name, view in views.items()}
    timings = benchmark.pedantic(decode_latency, args=(streams,), kwargs={"rounds": 30, "warmup": 6}, rounds=1, iterations=1)
    ratio = paired_ratio(timings, "unpatched", "int4_and_compile")
    record(
        "decode_with_int4",
        ratio,
        ">= 3.2",
        what="ms per token at context 512, smollm2, fp32: unpatched / int4(scope='all+head') + streaming + compile",
        measured_while_patching=str(report(views["int4"])),
        **{f"unpatched_over_{name}": paired_ratio(timings, "unpatched", name) for name in specs},
        int8_over_int4=paired_ratio(timings, "int8", "int4"),
        **{f"{name}_ms": median_ms(timings, name) for name in streams},
    )
    assert ratio >= 3.2


# Of a model that comes from Q4_1, all but the head keeps its values in groups of 32 with minima; the other rows show rounding itself.
FORMS: dict[str, tuple[dict[str, Any], float | None]] = {
    "clip": ({}, 1.04),
    "clip_dynamic": ({"mode": "dynamic"}, 1.04),
    "gptq": ({"fit": "gptq"}, 1.02),
    "symmetric": ({"symmetric": True}, None),
    "symmetric_gptq": ({"symmetric": True, "fit": "gptq"}, None),
    "group_128": ({"group": 128}, None),
    "group_128_gptq": ({"group": 128, "fit": "gptq"}, None),
}


@pytest.mark.parametrize(("name", "text"), [("smollm2", "english"), ("smollm2", "code"), ("bundled", "code")])
def test_perplexity(benchmark: Any, record: Callable[..., None], name: str, text: str) -> None:
    """Forms that are fitted to text are fitted to the 8,192 tokens that follow those that are scored."""
    model, tokenizer = _smollm2() if name == "smollm2" else load_model(name)
    ids = (english_ids if text == "english" else heldout_ids)(tokenizer, TOKENS + 8192)[0]
    calibration = ids[TOKENS + 1 :][: 8192 // 512 * 512 - 512].view(-1, 512)
    ids = ids[: TOKENS + 1]
    figures: dict[str, Any] = {}

    def measure() -> None:
        plain = block_nll(model, ids)
        for form, (options, _) in FORMS.items():
            given = {"scope": "all+head", "mode": "weight_only"} | options
            if given.get("fit") == "gptq":
                given["calibration"] = calibration
            with patched(model, Int4(**given), verbose=False):
                difference = block_nll(model, ids) - plain
                measured = dict(report(model).patches[0].measured)
            ratio = math.exp(difference.mean().item())
            figures[form] = {
                "ratio": ratio,
                "standard_error": ratio * difference.std().item() / math.sqrt(len(difference)),
                **{key: str(measured[key]) for key in ("SNR", "head") if key in measured},
            }
            print(name, text, form, figures[form], flush=True)

    benchmark.pedantic(measure, rounds=1, iterations=1)
    record(
        f"perplexity_of_int4_{name}_{text}",
        figures["clip"]["ratio"],
        "<= 1.04, and <= 1.02 fitted to text",
        what=f"perplexity of {name} with int4(scope='all+head') / without, {text}, same tokens, blocks of 512",
        tokens=TOKENS,
        **figures,
    )
    assert all(bar is None or figures[form]["ratio"] <= bar for form, (_, bar) in FORMS.items())


def test_bytes(benchmark: Any, record: Callable[..., None]) -> None:
    model = twin(_smollm2()[0])
    spec = "int4(scope='all+head', keep_original=False)"
    benchmark.pedantic(patch_model, args=(model, spec), kwargs={"verbose": False}, rounds=1, iterations=1)
    modules = report(model).patches[0].modules.values()
    held = sum(weight.stored_bytes() for weight in model.parameters() if isinstance(weight, Int4Weight))
    ratio = held / sum(facts["original_bytes"] for facts in modules)
    record(
        "bytes_of_int4", ratio, "<= 0.17", what="bytes of the converted weights with keep_original=False / in fp32, smollm2, head included"
    )
    assert ratio <= 0.17
