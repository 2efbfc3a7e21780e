"""Floating-point entries of a quantised model in its `state_dict`, and the restoration of its original weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from patchkit import _compat


class Original(NamedTuple):
    """A weight in floating point that a quantised one has replaced.

    Attributes:
        key: its name in the module.
        squares: mean square [K] of each input on the calibration text; None if the scheme does not use it.
    """

    module: nn.Module
    key: str
    weight: nn.Parameter
    squares: torch.Tensor | None = None


def restore_weights(originals: list[Original]) -> None:
    """Put original parameters back into their modules."""
    for module, key, original, _ in reversed(originals):
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
