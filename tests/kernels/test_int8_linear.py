"""int8_linear against float64 arithmetic on the same integers."""

from __future__ import annotations

import pytest
import torch

from patchkit.kernels.int8_linear import _kernel, int8_linear
from patchkit.kernels.op import VARIABLE


def parts(n: int, k: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8), torch.rand(n, generator=generator) * 1e-3 + 1e-4


@pytest.mark.parametrize("form", ["reference", "chosen"])
def test_weight_only_is_the_product_with_the_dequantised_weight(form):
    values, scale = parts(96, 200)
    x, bias = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)), torch.randn(96)
    exact = x.double() @ (values.double() * scale.double()[:, None]).T + bias
    found = (int8_linear.reference if form == "reference" else int8_linear)(x, values, scale, bias)
    assert (found - exact).norm() / exact.norm() < 5e-5


@pytest.mark.parametrize("form", ["reference", "chosen"])
def test_dynamic_rounds_each_token_by_its_own_largest_value(form):
    values, scale = parts(96, 200)
    x = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * torch.tensor([1e-3, 1, 30, 1e3, 1])[:, None]
    run = int8_linear.reference if form == "reference" else int8_linear
    found = run(x, values, scale, None, "int8")
    for row, y in zip(x, found, strict=True):
        step = float(row.abs().max()) / 127
        rounded = torch.tensor([round(float(value) / step) * step for value in row], dtype=torch.float64)
        exact = rounded @ (values.double() * scale.double()[:, None]).T
        assert (y - exact).norm() / exact.norm() < 1e-4
    # One step for the whole tensor, as per-tensor primitives have it, would lose the small rows.
    step = x.abs().max() / 127
    per_tensor = ((x / step).round() * step) @ (values * scale[:, None]).T
    assert (per_tensor[0] - found[0]).norm() / found[0].norm() > 0.5


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("form", ["reference", "chosen"])
def test_fp16_does_not_overflow(form, activation):
    """|y| = 59 with 2560 inputs and a largest weight of 0.08: the unscaled sum, 59 * 127 / 0.08, is beyond fp16's 65504."""
    k = 2560
    values = torch.full((4, k), 127, dtype=torch.int8)
    scale = torch.full((4,), 0.08 / 127)
    x = torch.full((1, k), 59 / (k * 0.08), dtype=torch.float16)
    # The wrong variant: the product in fp16, the scale afterwards.
    assert (x @ values.half().T * scale.half()).isinf().all()
    run = int8_linear.reference if form == "reference" else int8_linear
    y = run(x, values, scale, None, activation)
    assert y.dtype == torch.float16 and (y - 59).abs().max() < 0.1


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_the_largest_fp16_inputs_stay_finite(activation):
    values, scale = torch.full((3, 2560), 127, dtype=torch.int8), torch.full((3,), 1e-9)
    x = torch.full((2, 2560), torch.finfo(torch.float16).max, dtype=torch.float16)
    y = int8_linear(x, values, scale, None, activation)
    assert torch.allclose(y.double(), torch.full((2, 3), 65504 * 2560 * 127e-9, dtype=torch.float64), rtol=1e-3)


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_scales_may_be_of_any_dtype(activation):
    """As `model.to(torch.bfloat16)` leaves them: read as float32, bf16 numbers would be others, and half as many."""
    values, scale = parts(70, 96)
    scale, x = scale.bfloat16(), torch.randn(3, 96, generator=torch.Generator().manual_seed(4))
    for name, reason in int8_linear.explain(x, values, scale, None, activation).items():
        if reason is None:
            run = int8_linear.backends[name].run
            assert torch.equal(run(x, values, scale, None, activation), run(x, values, scale.float(), None, activation)), name


def test_a_row_does_not_depend_on_the_others():
    values, scale = parts(130, 300)
    x = torch.randn(9, 300, generator=torch.Generator().manual_seed(2))
    for activation in ("float", "int8"):
        whole = int8_linear(x, values, scale, None, activation)
        rows = torch.cat([int8_linear(row[None], values, scale, None, activation) for row in x])
        assert torch.equal(whole, rows)


def test_rows_that_are_not_finite_show_it():
    values, scale = parts(8, 64)
    x = torch.ones(3, 64)
    x[0, 3], x[2, 5] = float("inf"), float("nan")
    for activation in ("float", "int8"):
        y = int8_linear(x, values, scale, None, activation)
        assert not y[0].isfinite().any() and y[1].isfinite().all() and not y[2].isfinite().any()


def served() -> dict[str, str | None]:
    values, scale = parts(8, 64)
    return int8_linear.explain(torch.ones(1, 64), values, scale)


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_cpu_backends_give_the_same_bits(dtype, activation, monkeypatch):
    if any(served()[name] for name in ("native", "cpu")):
        pytest.skip(str(served()))
    for n, k in ((130, 300), (1, 2), (77, 64), (64, 1027)):
        values, scale = parts(n, k)
        x = (torch.randn(3, k, generator=torch.Generator().manual_seed(2)) * torch.tensor([[1e-3], [1], [50]])).to(dtype)
        found = []
        for backend in ("native", "cpu"):
            monkeypatch.setenv(VARIABLE, backend)
            found.append(int8_linear(x, values, scale, torch.ones(n, dtype=dtype), activation))
        assert torch.equal(*found)


def test_more_threads_than_rows_and_weights_that_are_views():
    values, scale = parts(3, 100)
    x = torch.randn(2, 200)[:, ::2]
    wide = torch.zeros(3, 200, dtype=torch.int8)
    wide[:, ::2] = values
    assert torch.equal(int8_linear(x, wide[:, ::2], scale), int8_linear(x.contiguous(), values, scale))


def test_what_the_cpu_backends_refuse():
    values, scale = parts(8, 64)
    x = torch.ones(3, 64)
    reasons = {
        "per group": (x, values, torch.ones(8, 2)),
        "empty": (x[:0], values, scale),
        "overflow": (torch.ones(1, 70_000), torch.ones(2, 70_000, dtype=torch.int8), torch.ones(2)),
    }
    if served()["cpu"]:
        pytest.skip(str(served()["cpu"]))
    for word, args in reasons.items():
        for backend in ("native", "cpu"):
            reason = int8_linear.explain(*args)[backend]
            assert reason is not None and word in reason
        assert int8_linear.choose(*args) == "reference"
    assert "up to" in str(int8_linear.explain(torch.ones(40, 64), values, scale)["native"])


def test_without_a_compiler_the_native_backend_refuses_and_another_serves(monkeypatch, tmp_path):
    if served()["cpu"]:
        pytest.skip(str(served()["cpu"]))
    values, scale = parts(8, 64)
    x = torch.ones(1, 64)
    expected = int8_linear(x, values, scale)
    for variables, word in (({"PATH": str(tmp_path)}, "no C++ compiler"), ({"CXX": "/bin/false"}, "failed|could not")):
        with monkeypatch.context() as patch:
            for name, value in {"CXX": "", "XDG_CACHE_HOME": str(tmp_path), **variables}.items():
                patch.setenv(name, value)
            _kernel.cache_clear()
            reason = int8_linear.explain(x, values, scale)["native"]
            assert reason is not None and any(part in reason for part in word.split("|"))
            assert int8_linear.choose(x, values, scale) == "cpu" and torch.equal(int8_linear(x, values, scale), expected)
    _kernel.cache_clear()
