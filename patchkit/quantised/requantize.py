"""Quantised weights that follow the floating-point weights that they were made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import StaleWeights
from patchkit.quantised.experts import ExpertWeights, quantised_experts_of
from patchkit.quantised.saving import Original
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.weight import QuantisedWeight


def requantize(originals: Sequence[Original], hits: Counter[str], scheme: Scheme) -> bool:
    """Quantise the floating-point weights again, into the tensors that are in use: addresses stay, compiled code goes on.

    The values are those of a model that is patched now. Which modules are quantised, in which mode, and which of their inputs count more,
    is not chosen again.

    Returns:
        Whether any quantised tensor differs from before; only that is counted in ``hits``.

    Raises:
        StaleWeights: a weight has another shape than its quantised copy, or is no longer in memory; nothing was changed.
    """
    for module, key, original, _ in originals:
        _refuse(module, key, original, scheme.kind)
    differs = False
    with torch.no_grad():
        for module, key, original, squares in originals:
            now = _compat.parameters_of(module).get(key)
            experts = quantised_experts_of(module)
            if experts is not None and now is not None:
                weight = original.detach().to(experts[key].scale.device, now.dtype)
                differs |= _overwrite_experts(experts[key], ExpertWeights.quantize(weight, bool(module.is_transposed), scheme))
            elif isinstance(now, QuantisedWeight):  # else the module was given another weight, and runs over that
                differs |= overwrite(now, _quantized(original, module, now, scheme, squares))
    hits["requantised"] += differs
    return differs


def checksums(originals: Sequence[Original]) -> list[torch.Tensor]:
    """Of each weight, the sum and the norm [2] float64."""
    weights = [each.weight.detach() for each in originals]
    return [torch.stack([each.sum(dtype=torch.float64), torch.linalg.vector_norm(each, dtype=torch.float64)]) for each in weights]


def refuse_changes(originals: Sequence[Original], before: Sequence[torch.Tensor], kind: str) -> bool:
    """Return False if the weights have the `checksums` that they had.

    Raises:
        StaleWeights: they have others, and the quantised ones were fitted with more than the weights, so that they cannot be made again.
    """
    for module, key, original, _ in originals:
        _refuse(module, key, original, kind)
    for (module, key, *_), old, new in zip(originals, before, checksums(originals), strict=True):
        if not torch.equal(old.view(torch.int64), new.to(old.device).view(torch.int64)):
            raise StaleWeights(
                f"the {key} of a {type(module).__name__} has changed, and its {kind} weight was fitted to calibration text: "
                "unpatch_model(model) and patch it again, or use a fit without calibration, which follows the weights"
            )
    return False


def _refuse(module: nn.Module, key: str, original: nn.Parameter, kind: str) -> None:
    experts, now = quantised_experts_of(module), _compat.parameters_of(module).get(key)
    if experts is not None:
        shape = experts[key].shape
    elif isinstance(now, QuantisedWeight):
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
            f"the {key} of a {type(module).__name__} {problem}, so {kind} cannot quantise it again: load the weights in the shape "
            "that they had and call patchkit.refresh(model), or unpatch_model(model) and patch it again"
        )


def _quantized(
    original: nn.Parameter, module: nn.Module, now: QuantisedWeight, scheme: Scheme, squares: torch.Tensor | None
) -> QuantisedWeight:
    adopted = scheme.adopted(original, module)
    if adopted is not None:
        return adopted
    return scheme.quantize(original.detach().to(now.device, now.dtype), now.transposed, squares)


def overwrite(weight: QuantisedWeight, new: QuantisedWeight) -> bool:
    """Write the integers and scales of ``new`` to ``weight``, of the same form. Returns whether any differ."""
    return any([_copy(weight.qdata, new.qdata), _copy(weight.scale, new.scale)])


def _overwrite_experts(weights: ExpertWeights, new: ExpertWeights) -> bool:
    differs = [overwrite(expert, fresh) for expert, fresh in zip(weights.experts, new.experts, strict=True)]
    return any([*differs, _copy(weights.scale, new.scale)])


def _copy(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Write ``new`` to ``old`` if they differ, or else nothing, which others would take for a change. Returns whether they do."""
    if torch.equal(old, new):
        return False
    with torch.inference_mode(old.is_inference()):  # such a tensor can be written to in that mode only
        old.copy_(new)
    return True
