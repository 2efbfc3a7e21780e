"""Int4Weight: a tensor that only a linear layer can use."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from patchkit.errors import KernelError
from patchkit.int4.scheme import Int4Scheme
from patchkit.int4.weight import Int4Weight


def converted(module: nn.Module, **options: Any) -> Any:
    made: Any = copy.deepcopy(module)
    made.weight = nn.Parameter(Int4Scheme(**options).quantize(made.weight, isinstance(module, Conv1D)), requires_grad=False)
    return made


def modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(40, 24), nn.Linear(140, 24, bias=False), Conv1D(24, 40)]


def inputs(module: Any) -> torch.Tensor:
    features = module.nx if isinstance(module, Conv1D) else module.in_features
    return torch.randn(3, 5, features, generator=torch.Generator().manual_seed(0))


IDS = ["linear", "no bias", "Conv1D"]
COPIES: list[Callable[[Any], Any]] = [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to(torch.float32)]


@pytest.mark.parametrize("options", [{}, {"group": 128}, {"symmetric": True}], ids=str)
@pytest.mark.parametrize("module", modules(), ids=IDS)
def test_it_runs_as_the_dequantised_weight(module: nn.Module, options: dict[str, Any]) -> None:
    int4, plain = converted(module, **options), copy.deepcopy(module)
    plain.weight = nn.Parameter(int4.weight.dequantize())
    x = inputs(module)
    assert int4.weight.shape == module.weight.shape and int4.weight.dtype == module.weight.dtype
    assert torch.allclose(int4(x), plain(x), atol=1e-4)
    assert 0 < (int4.weight.dequantize() - module.weight).abs().max() < 0.05
    assert int4.weight.stored_bytes() == int4.weight.qdata.nbytes + 4 * 24


@pytest.mark.parametrize("again", COPIES)
@pytest.mark.parametrize("module", modules(), ids=IDS)
def test_copies_are_bit_equal(module: nn.Module, again: Callable[[Any], Any]) -> None:
    int4, x = converted(module), inputs(module)
    expected = int4(x)
    other = again(int4)
    assert isinstance(other.weight, Int4Weight) and isinstance(other.weight, nn.Parameter)
    assert torch.equal(other(x), expected)


def test_products_with_the_transpose_are_the_linear_layer() -> None:
    module = nn.Linear(40, 24, bias=False)
    weight, x = converted(module).weight, inputs(module)
    expected = nn.functional.linear(x, weight)
    assert weight.T.shape == (40, 24) and weight.t().T.shape == (24, 40)
    for product in (x @ weight.T, torch.matmul(x, weight.t()), nn.functional.linear(x, weight.T.T)):
        assert torch.equal(product, expected)


def test_any_other_use_is_refused_with_the_remedy() -> None:
    module = nn.Linear(40, 24)
    weight, x = converted(module).weight, inputs(module)
    uses: list[Callable[[], Any]] = [
        lambda: weight + 1,
        lambda: weight.T * 2,
        lambda: x[..., :24] @ weight,
        lambda: weight[0],
        lambda: nn.functional.linear(weight, x[0, :, :24].T),
    ]
    for use in uses:
        with pytest.raises(KernelError, match="an int4 weight"):
            use()


@pytest.mark.parametrize("features", [39, 41, 32, 64, 8])
def test_inputs_of_another_width_are_refused(features: int) -> None:
    """Also where their groups are as many as the weight's."""
    with pytest.raises(RuntimeError, match="it has 40 inputs"):
        converted(nn.Linear(40, 24))(torch.ones(2, features))


def test_there_is_no_gradient() -> None:
    module = nn.Linear(40, 24)
    with pytest.raises(KernelError, match="unpatch_model"):
        converted(module)(inputs(module).requires_grad_()).sum().backward()


def test_it_compiles_in_one_graph_for_several_layers() -> None:
    layers = [converted(nn.Linear(40, 40)) for _ in range(3)]
    x = inputs(layers[0])
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda layer, x: layer(x).relu(), fullgraph=True, backend="aot_eager")
        for layer in layers:
            assert torch.equal(compiled(layer, x), layer(x).relu())
    torch.compiler.reset()
