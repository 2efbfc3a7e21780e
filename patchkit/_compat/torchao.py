"""Weights of torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from patchkit._compat.declared import Names, check_when_used
from patchkit.errors import PatchError

RELIED_ON_WHEN_USED: Names = {
    "torchao.quantization:Int8Tensor": None,
    "torchao.quantization:PerRow": None,
    "torchao.quantization:FqnToConfig": None,
    "torchao.quantization:Int8WeightOnlyConfig": frozenset({"version"}),
    "torchao.quantization:Int8DynamicActivationInt8WeightConfig": frozenset({"version"}),
    "torchao.quantization.quantize_.workflows:QuantizeTensorToInt8Kwargs": frozenset({"granularity"}),
    "transformers:TorchAoConfig": None,
    "transformers.quantizers.auto:AutoHfQuantizer.from_config": None,
}


_REMEDY = 'Install a supported torchao: pip install "torchao>=0.17"'


def has_torchao() -> bool:
    """Whether torchao is installed."""
    return importlib.util.find_spec("torchao") is not None


def saves_torchao(model: Any) -> bool:
    """Whether torchao's tensors may be in a checkpoint of ``model``: no other library has quantised it."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer is None or type(quantizer).__name__ == "TorchAoHfQuantizer"


def torchao_int8(weight: Any) -> tuple[torch.Tensor, torch.Tensor, str] | None:
    """The contents of a torchao `Int8Tensor` with one symmetric scale per row: values int8 [N, K], scale fp32 [N], and the activation
    mode of `int8_linear`. None for any other tensor, and for what that op cannot express."""
    if type(weight).__name__ != "Int8Tensor" or not type(weight).__module__.startswith("torchao."):
        return None
    plain = weight.ndim == 2 and list(weight.block_size) == [1, weight.shape[1]]
    shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    static = weight.act_quant_scale is not None or weight.act_pre_scale is not None
    dynamic = weight.act_quant_kwargs
    if not plain or shifted or static or (dynamic is not None and type(dynamic.granularity).__name__ != "PerRow"):
        return None
    return weight.qdata, weight.scale.reshape(-1).float(), "float" if dynamic is None else "int8"


def to_torchao(values: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, dynamic: bool) -> Any:
    """The torchao `Int8Tensor` of int8 values [N, K] and fp32 scales [N].

    Raises:
        PatchError: torchao is not installed, or lacks a name that patchkit relies on.
    """
    if not has_torchao():
        raise PatchError("saving int8 weights needs torchao: pip install torchao, or unpatch_model(model) and save the original")
    check_when_used("torchao", "torchao", _REMEDY)
    from torchao.quantization import Int8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    column = scale.reshape(-1, 1)
    return Int8Tensor(
        values.contiguous(),
        column,
        [1, values.shape[1]],
        dtype,
        zero_point=torch.zeros_like(column, dtype=torch.int8),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None,
    )


def torchao_quantizer(dynamic: dict[str, bool]) -> tuple[Any, Any]:
    """transformers' quantization config and quantizer for the linear layers named; their values say which quantise activations."""
    check_when_used("torchao", "torchao", _REMEDY)
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    of_mode = {False: Int8WeightOnlyConfig(version=2), True: Int8DynamicActivationInt8WeightConfig(version=2)}
    config = TorchAoConfig(FqnToConfig({name: of_mode[mode] for name, mode in dynamic.items()}))
    return config, AutoHfQuantizer.from_config(config, pre_quantized=True)
