"""Int8Weight: a tensor that only a linear layer can use."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from patchkit.errors import KernelError
from patchkit.int8.weight import Int8Weight


def converted(module: nn.Module) -> nn.Module:
    made = copy.deepcopy(module)
    made.weight = nn.Parameter(Int8Weight.quantize(module.weight, transposed=isinstance(module, Conv1D)), requires_grad=False)
    return made


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(40, 24), nn.Linear(40, 24, bias=False), Conv1D(24, 40)]


X = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("module", modules(), ids=["linear", "no bias", "Conv1D"])
def test_it_runs_as_the_dequantised_weight(module):
    int8, plain = converted(module), copy.deepcopy(module)
    plain.weight = nn.Parameter(int8.weight.dequantize())
    assert int8.weight.shape == module.weight.shape and int8.weight.dtype == module.weight.dtype
    assert torch.allclose(int8(X), plain(X), atol=1e-4)
    # half a step of rounding at most, and not none
    rows = module.weight.T if isinstance(module, Conv1D) else module.weight
    error = (int8.weight.dequantize() - module.weight).abs()
    assert 0 < error.max() <= rows.abs().amax() / 127 * 0.501


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float32)])
@pytest.mark.parametrize("module", modules(), ids=["linear", "no bias", "Conv1D"])
def test_copies_are_bit_equal(module, again):
    int8 = converted(module)
    expected = int8(X)
    other = again(int8)
    assert isinstance(other.weight, Int8Weight) and isinstance(other.weight, nn.Parameter)
    assert torch.equal(other(X), expected)


def test_products_with_the_transpose_are_the_linear_layer():
    weight = converted(nn.Linear(40, 24, bias=False)).weight
    expected = nn.functional.linear(X, weight)
    assert weight.T.shape == (40, 24) and weight.t().T.shape == (24, 40)
    for product in (X @ weight.T, torch.matmul(X, weight.t()), nn.functional.linear(X, weight.T.T)):
        assert torch.equal(product, expected)


def test_dtypes_follow_the_module():
    module = converted(nn.Linear(40, 24)).to(torch.bfloat16)
    assert module.weight.dtype == torch.bfloat16 and module(X.bfloat16()).dtype == torch.bfloat16


def test_any_other_use_is_refused_with_the_remedy():
    weight = converted(nn.Linear(40, 24)).weight
    for use in (
        lambda: weight + 1,
        lambda: weight.T * 2,
        lambda: X[..., :24] @ weight,
        lambda: weight[0],
        lambda: nn.functional.linear(weight, X[0, :, :24].T),
    ):
        with pytest.raises(KernelError, match="int8 weight"):
            use()


def test_there_is_no_gradient():
    module = converted(nn.Linear(40, 24))
    with pytest.raises(KernelError, match="unpatch_model"):
        module(X.clone().requires_grad_()).sum().backward()


def test_rows_of_zeros_and_tiny_rows():
    weight = torch.zeros(3, 8)
    weight[1] = 1e-30
    weight[2] = torch.finfo(torch.float32).max / 2
    assert torch.allclose(Int8Weight.quantize(weight).dequantize(), weight)


def test_it_compiles_in_one_graph_for_several_layers():
    layers = [converted(nn.Linear(40, 40)) for _ in range(3)]
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda layer, x: layer(x).relu(), fullgraph=True, backend="aot_eager")
        for layer in layers:
            assert torch.equal(compiled(layer, X), layer(X).relu())
    torch.compiler.reset()


@pytest.mark.parametrize("largest", [-128, 127])
@pytest.mark.parametrize("zeros", [False, True])
def test_rows_that_were_rounded_before_keep_their_integers(largest: int, zeros: bool) -> None:
    """Also where most inputs are pruned: what is left may be in none of the places that are looked at first."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(-120, 120, (4, 576), generator=generator)
    if zeros:
        steps[:, torch.arange(576) % 36 == 0] = 0
    steps[:, 5] = largest
    rows = steps * (torch.rand(4, 1, generator=generator) * 0.01 + 0.001)
    assert torch.equal(Int8Weight.quantize(rows).qdata.long(), steps)
