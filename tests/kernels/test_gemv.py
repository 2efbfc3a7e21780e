"""gemv beyond the contract of all ops: bits that do not depend on the batch, and every split of the outputs over threads."""

from __future__ import annotations

import pytest
import torch

import patchkit.kernels.gemv as module
from patchkit.kernels.gemv import gemv, most_rows, why_not

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors(rows: int, n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * n + k)
    return torch.randn(rows, k, generator=generator).to(dtype), torch.randn(n, k, generator=generator).to(dtype)


def native(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    if (reason := why_not(x, weight)) is not None:
        pytest.skip(reason)
    return gemv.backends["native"].run(x, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [15, 16, 577])
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: torch.dtype, k: int) -> None:
    x, weight = tensors(most_rows(dtype), 131, k, dtype)
    alone = torch.cat([native(row[None], weight) for row in x])
    for rows in range(1, len(x) + 1):
        assert torch.equal(native(x[:rows].contiguous(), weight), alone[:rows]), rows
    # What torch calls does not promise that; with it, this test fails.
    wide, matrix = tensors(16, 513, 577, torch.float32)
    assert not torch.equal(wide @ matrix.T, torch.cat([row[None] @ matrix.T for row in wide]))


@pytest.mark.parametrize("n", [1, 2, 3, 63, 64, 65, 130])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_outputs_is_split_over_any_number_of_threads(n: int, threads: int) -> None:
    x, weight = tensors(5, n, 40, torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = native(x, weight)
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found.double(), x.double() @ weight.double().T, atol=1e-4)


def test_an_inf_stays_in_its_row() -> None:
    x, weight = tensors(3, 20, 50, torch.float32)
    right = native(x, weight)
    x[1, 7] = torch.inf
    found = native(x, weight)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2]], right[[0, 2]])


@pytest.mark.parametrize(("features", "bias"), [(400, None), (100, None), (200, 5), (200, 1)])
def test_shapes_of_no_linear_layer_never_reach_the_kernel(features: int, bias: int | None) -> None:
    args = torch.ones(2, features), torch.ones(7, 200), None if bias is None else torch.ones(bias)
    assert "no linear layer's shapes" in str(gemv.explain(*args)["native"])


def test_the_output_is_on_the_cpu_whatever_the_default_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    monkeypatch.setattr(module, "_kernel", lambda: (lambda *args: given.extend(args[:4]), None))
    x, weight = tensors(2, 7, 20, torch.float32)
    with torch.device("meta"):
        assert gemv.backends["native"].run(x, weight, torch.ones(7, device="cpu")).device.type == "cpu"
    assert all(given), "an address of None is no memory to write to"
