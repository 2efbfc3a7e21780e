"""Calibration: the inputs of a model's modules on a short text, and the noise of quantisation on them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from patchkit.anatomy.target import Target

_CALIBRATION_TOKENS = 64


def calibration_ids(target: Target, calibration: Any) -> torch.Tensor:
    """Token ids [B, T] of the calibration text on the model's device: those given, [T] or [B, T]; 64 random ones for None."""
    if calibration is None:
        vocabulary = getattr(target.config, "vocab_size", 100)
        longest = min(_CALIBRATION_TOKENS, target.position_limit or _CALIBRATION_TOKENS)
        calibration = torch.randint(vocabulary, (longest,), generator=torch.Generator().manual_seed(0))
    ids = torch.as_tensor(calibration)
    return ids.reshape(-1, ids.shape[-1]).to(target.model.device)


def calibrated_inputs(target: Target, modules: dict[str, Any], calibration: Any) -> dict[str, tuple[Any, ...]]:
    """Positional arguments of each module in one forward over the calibration text; a module that is not called is missing.

    Args:
        modules: by name.
        calibration: token ids [T] or [B, T]; None for 64 random tokens.
    """
    seen: dict[str, tuple[Any, ...]] = {}

    def notice(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, args)

    hooks = [module.register_forward_pre_hook(functools.partial(notice, name)) for name, module in modules.items()]
    try:
        target.forward(calibration_ids(target, calibration))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: args for name, args in seen.items() if args}


def decibels(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-noise ratio in dB: 20 log10(|signal| / |signal - approximation|), for tensors of one shape."""
    noise = (signal.float() - approximation.float()).norm().clamp(min=1e-30)
    return float(20 * torch.log10(signal.float().norm().clamp(min=1e-30) / noise))
