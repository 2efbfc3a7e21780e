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


def requantize(originals: Sequence[Original], hits: Counter[str]) -> bool:
    """Quantise the floating-point weights again, into the int8 tensors that are in use: addresses stay, compiled code goes on.

    The int8 values are those of a model that is patched now. Which modules run in int8, and in which mode, is not chosen again.

    Returns:
        Whether any int8 tensor differs from before; only that is counted in ``hits``.

    Raises:
        StaleWeights: a weight has another shape than its int8 copy, or is no longer in memory; nothing was changed.
    """
    for module, key, original in originals:
        _refuse(module, key, original)
    differs = False
    with torch.no_grad():
        for module, key, original in originals:
            now = _compat.parameters_of(module).get(key)
            experts = int8_experts_of(module)
            if experts is not None and now is not None:
                weight = original.detach().to(experts[key].scale.device, now.dtype)
                differs |= _overwrite_experts(experts[key], ExpertWeights.quantize(weight, bool(module.is_transposed)))
            elif isinstance(now, Int8Weight):  # else the module was given another weight, and runs over that
                differs |= _overwrite(now, _quantized(original, now))
    hits["requantised"] += differs
    return differs


def _refuse(module: nn.Module, key: str, original: nn.Parameter) -> None:
    experts, now = int8_experts_of(module), _compat.parameters_of(module).get(key)
    if experts is not None:
        shape = experts[key].shape
    elif isinstance(now, Int8Weight):
        shape = now.shape
    else:
        return  # the module runs over another weight that it was given
    problem = None
    if original.device.type == "meta":
        problem = "is no longer in memory"
    elif original.shape != shape:
        problem = f"has the shape {tuple(original.shape)} instead of {tuple(shape)}"
    if problem is not None:
        raise StaleWeights(
            f"the {key} of a {type(module).__name__} {problem}, so int8 cannot quantise it again: load the weights in the shape "
            "that they had and call patchkit.refresh(model), or unpatch_model(model) and patch it again"
        )


def _quantized(original: nn.Parameter, now: Int8Weight) -> Int8Weight:
    adopted = _compat.torchao_int8(original)
    if adopted is not None:
        return Int8Weight(adopted[0], adopted[1], now.dtype)
    return Int8Weight.quantize(original.detach().to(now.device, now.dtype), transposed=now.transposed)


def _overwrite(weight: Int8Weight, new: Int8Weight) -> bool:
    return any([_copy(weight.qdata, new.qdata), _copy(weight.scale, new.scale)])


def _overwrite_experts(weights: ExpertWeights, new: ExpertWeights) -> bool:
    differs = [_overwrite(expert, fresh) for expert, fresh in zip(weights.experts, new.experts, strict=True)]
    return any([*differs, _copy(weights.scale, new.scale)])


def _copy(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Write ``new`` to ``old`` if they differ, or else nothing, which others would take for a change. Returns whether they do."""
    if torch.equal(old, new):
        return False
    with torch.inference_mode(old.is_inference()):  # such a tensor can be written to in that mode only
        old.copy_(new)
    return True
