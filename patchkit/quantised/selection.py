"""Selection of the linear layers and experts to quantise, with the reasons why others cannot be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import UnsupportedModel
from patchkit.quantised.freed import FreedWeight
from patchkit.quantised.scheme import Scheme


def obstacle_of(module: Any, scheme: Scheme) -> str | None:
    """The reason why a linear layer cannot be quantised; None if it can."""
    weight: torch.Tensor = module.weight
    if _compat.parameters_of(module).get("weight") is not weight:
        return "its weight is computed from other tensors (pruning, weight_norm, a parametrization)"
    if scheme.adopted(weight, module) is not None:
        return None
    if _compat.is_wrapped(module):
        return f"compressed-tensors has quantised it in another form than {scheme.kind} keeps"
    if type(weight) is not nn.Parameter and not _is_sharded(weight):
        return f"its weight is already a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is already quantised ({weight.dtype})"
    return None


def left_experts(path: str, module: Any, left: dict[str, str]) -> bool:
    """Whether the fused experts at ``path`` cannot be quantised; the reason is then added to ``left``."""
    parameter = module.down_proj
    if _compat.is_expert_parallel(module):
        left[path] = "its experts are spread over several processes"
    elif not torch.is_tensor(parameter) or isinstance(parameter, FreedWeight) or not parameter.is_floating_point() or parameter.ndim != 3:
        left[path] = "its experts are already quantised"
    return path in left


def _is_sharded(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "DTensor" or type(getattr(weight, "data", None)).__name__ == "DTensor"


def refuse_weight(name: str, weight: torch.Tensor, kind: str) -> None:
    """Refuse a weight that this process does not hold.

    Raises:
        UnsupportedModel: it is sharded over processes, offloaded, or not loaded.
    """
    if _is_sharded(weight):
        raise UnsupportedModel(
            f"{name} is sharded over several processes (tensor parallel): load the model without tp_plan for {kind} weights"
        )
    if weight.device.type == "meta":
        raise UnsupportedModel(f"{name} is offloaded or not loaded: load the model so that its weights are in memory, then patch it")
