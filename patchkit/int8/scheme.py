"""Scheme of int8 weights: one scale per output; torchao's tensors on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.handle import Handle
from patchkit.int8.weight import Int8Weight
from patchkit.kernels.int8_experts_linear import int8_experts_linear
from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.op import Op
from patchkit.quantised.scheme import Experts, Layer


@dataclass(frozen=True)
class Int8Scheme:
    """Weights of 8 bits, symmetric, with one scale per output. Those that torchao or compressed-tensors has loaded in this form are
    taken over."""

    kind: ClassVar[str] = "int8"
    op: ClassVar[Op] = int8_linear
    follows: ClassVar[bool] = True

    def adopted(self, weight: Any, module: Any) -> Int8Weight | None:
        found = _compat.torchao_int8(weight)
        if found is not None:
            return Int8Weight(found[0], found[1], weight.dtype, found[2])
        unpacked = _compat.unpacked_int8(module, weight)
        return None if unpacked is None else Int8Weight(*unpacked, weight.dtype)

    def quantize(self, weight: torch.Tensor, transposed: bool = False, squares: torch.Tensor | None = None) -> Int8Weight:
        return Int8Weight.quantize(weight, transposed=transposed)

    def fit_layers(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        """Do nothing: weights depend on the originals alone."""

    def run_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: Experts, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_experts_linear(x, experts, weights.values, weights.scale, bias, weights.activation)

    def saved(self, linear: Layer, model: Any) -> Callable[..., None] | None:
        return save_torchao if _compat.saves_torchao(model) else None

    def make_saveable(self, model: Any, handle: Handle, linears: Sequence[Layer]) -> None:
        if not linears or getattr(model, "hf_quantizer", None) is not None or not _compat.has_torchao():
            return
        dynamic = {block.name: block.activation == "int8" for block in linears}
        quantization, quantizer = _compat.torchao_quantizer(dynamic)
        handle.set_shared(model.config, "quantization_config", quantization)
        handle.set_attribute(model, "hf_quantizer", quantizer)
        handle.set_attribute(model, "is_quantized", True)


def save_torchao(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write the int8 weight of a linear layer as a torchao tensor. A state-dict hook."""
    weight = module.weight
    assert isinstance(weight, Int8Weight)
    state[f"{prefix}weight"] = _compat.to_torchao(weight.qdata, weight.scale, weight.dtype, weight.activation == "int8")
