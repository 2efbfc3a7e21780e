"""Entries of a quantised model in its `state_dict`, and the restoration of its original weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.int8.weight import Int8Weight


def restore_weights(originals: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Put original parameters, given as (module, name, parameter), back into their modules."""
    for module, key, original in reversed(originals):
        now = _compat.parameters_of(module)[key]
        if now is not None:  # the patched model may have been moved, or cast
            original.data = original.data.to(now.device, now.dtype)
        _compat.parameters_of(module)[key] = original


def save_torchao(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write the int8 weight of a linear layer as a torchao tensor. A state-dict hook."""
    weight = module.weight
    assert isinstance(weight, Int8Weight)
    state[f"{prefix}weight"] = _compat.to_torchao(weight.qdata, weight.scale, weight.dtype, weight.activation == "int8")


def save_plain(
    key: str, original: torch.Tensor | None, int8: Any, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Write the weight ``key`` in floating point. A state-dict hook, for layers that no torchao tensor can serve.

    torchao does not support `Conv1D`, and transformers does not run torchao tensors as fused experts.
    """
    now = getattr(module, key)
    state[prefix + key] = (int8.dequantize() if original is None else original.detach()).to(now.device, now.dtype)
