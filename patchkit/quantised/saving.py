"""Floating-point entries of a quantised model in its `state_dict`, and the restoration of its original weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchkit import _compat


def restore_weights(originals: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    """Put original parameters, given as (module, name, parameter), back into their modules."""
    for module, key, original in reversed(originals):
        now = _compat.parameters_of(module)[key]
        if now is not None:  # the patched model may have been moved, or cast
            original.data = original.data.to(now.device, now.dtype)
        _compat.parameters_of(module)[key] = original


def save_plain(
    key: str, original: torch.Tensor | None, quantised: Any, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """Write the weight ``key`` in floating point. A state-dict hook, for layers whose weights have no other form on disk."""
    now = getattr(module, key)
    state[prefix + key] = (quantised.dequantize() if original is None else original.detach()).to(now.device, now.dtype)
