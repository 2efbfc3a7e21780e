"""int8 weights that follow the floating-point weights that they were made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import StaleWeights
from patchkit.int8.experts import ExpertWeights, int8_experts_of
from patchkit.int8.weight import Int8Weight

Original = tuple[nn.Module, str, nn.Parameter]


def requantize(originals: Sequence[Original], hits: Counter[str]) -> None:
    """Quantise the floating-point weights again, into the int8 tensors that are in use: addresses stay, compiled code goes on.

    The int8 values are those of a model that is patched now. Which modules run in int8, and in which mode, is not chosen again.

    Raises:
        StaleWeights: a weight has another shape than its int8 copy, or is no longer in memory; nothing was changed.
    """
    for module, key, original in originals:
        _refuse(module, key, original)
    with torch.no_grad():
        for module, key, original in originals:
            now = _compat.parameters_of(module)[key]
            experts = int8_experts_of(module)
            if experts is not None:
                weight = original.detach().to(experts[key].scale.device, now.dtype)
                _overwrite_experts(experts[key], ExpertWeights.quantize(weight, bool(module.is_transposed)))
            elif isinstance(now, Int8Weight):  # else the module was given another weight, and runs over that
                _overwrite(now, _quantized(original, now))
    hits["requantised"] += 1


def _refuse(module: nn.Module, key: str, original: nn.Parameter) -> None:
    experts = int8_experts_of(module)
    shape = _compat.parameters_of(module)[key].shape if experts is None else experts[key].shape
    problem = None
    if original.device.type == "meta":
        problem = "is no longer in memory"
    elif original.shape != shape:
        problem = f"has the shape {tuple(original.shape)} instead of {tuple(shape)}"
    if problem is not None:
        raise StaleWeights(
            f"the {key} of a {type(module).__name__} {problem}, so mlp_int8 cannot quantise it again: load the weights in the shape "
            "that they had and call patchkit.refresh(model), or unpatch_model(model) and patch it again"
        )


def _quantized(original: nn.Parameter, now: Int8Weight) -> Int8Weight:
    adopted = _compat.torchao_int8(original)
    if adopted is not None:
        return Int8Weight(adopted[0], adopted[1], now.dtype)
    return Int8Weight.quantize(original.detach().to(now.device, now.dtype), transposed=now.transposed)


def _overwrite(weight: Int8Weight, new: Int8Weight) -> None:
    for old, fresh in ((weight.qdata, new.qdata), (weight.scale, new.scale)):
        with torch.inference_mode(old.is_inference()):  # such a tensor can be written to in that mode only
            old.copy_(fresh)


def _overwrite_experts(weights: ExpertWeights, new: ExpertWeights) -> None:
    for expert, fresh in zip(weights.experts, new.experts, strict=True):
        _overwrite(expert, fresh)
    with torch.inference_mode(weights.scale.is_inference()):
        weights.scale.copy_(new.scale)
