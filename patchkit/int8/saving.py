"""What a quantised model writes into its `state_dict`, and how its own weights come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.int8.weight import Int8Weight


def put_back(originals: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, key, original in reversed(originals):
        now = _compat.parameters_of(module)[key]
        if now is not None:  # the patched model may have been moved, or cast
            original.data = original.data.to(now.device, now.dtype)
        _compat.parameters_of(module)[key] = original


def save_torchao(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    weight = module.weight
    assert isinstance(weight, Int8Weight)
    state[f"{prefix}weight"] = _compat.to_torchao(weight.qdata, weight.scale, weight.dtype, weight.activation == "int8")


def save_plain(
    key: str, original: torch.Tensor | None, int8: Any, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """torchao knows no `Conv1D`, and transformers runs no torchao tensor as fused experts: these are saved in floating point."""
    now = getattr(module, key)
    state[prefix + key] = (int8.dequantize() if original is None else original.detach()).to(now.device, now.dtype)
