"""The mode of training, and when a patch acts in it.

A trainer that learns from the model's own texts (GRPO, RLOO) generates in training mode, without gradients. There a patch is in force.
A forward with gradients is the model's own, and so is one without a cache: with those a trainer scores texts under what it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def is_in_force(module: nn.Module, cache: Any) -> bool:
    """Whether a patch of ``module`` acts in a forward with this cache, None for no cache: always, in evaluation mode."""
    return not module.training or (cache is not None and not torch.is_grad_enabled())


def off_policy(name: str) -> str:
    """Return the warning of a lossy patch, called ``name``, that a model in training mode generates under."""
    return (
        f"texts that are generated in training mode are off-policy: under {name} they are drawn from another function than the one that "
        "is trained. patch_model(..., lossless=True) draws from the model's own; patchkit.rl.logprobs scores them for importance weights"
    )


def drops_values(model: nn.Module) -> bool:
    """Whether a module of the model is in training mode and drops values there, so that no two forwards are equal."""
    for module in model.modules():
        rates = (getattr(module, name, 0) for name in ("p", "dropout", "attention_dropout"))
        if module.training and any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False
