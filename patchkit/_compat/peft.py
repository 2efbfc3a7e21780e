"""Low-rank adapters of peft."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from patchkit._compat.declared import Names, check_when_used

RELIED_ON_WHEN_USED: Names = {
    "peft:inject_adapter_in_model": ("peft_config", "model"),
    "peft:LoraConfig": frozenset({"r", "lora_alpha", "target_modules"}),
}

MAY_BE_MISSING = {
    "_disable_adapters": "an attribute by which layers of peft are known",
    "_active_adapter": "an attribute of layers of peft, which a second view of a model follows",
}

# What a layer of peft notes of its adapters.
_STATE = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")

# The name that peft gives an adapter by itself.
_ADAPTER = "default"


def insert_adapters(model: Any, modules: list[str], rank: int) -> None:
    """Put an adapter of ``rank``, scaled by 2, into each of the linear layers named.

    Raises:
        ImportError: peft is not installed.
        PatchError: peft lacks a name that patchkit relies on.
        ValueError: peft cannot adapt one of them.
    """
    import peft

    check_when_used("peft", "peft", 'Install a supported peft: pip install "peft>=0.17"')
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules), model)


def adapter_parameters(layer: Any) -> list[torch.nn.Parameter]:
    """A [r, in] and B [out, r] of one adapted layer."""
    return [layer.get_parameter(f"lora_{letter}.{_ADAPTER}.weight") for letter in "AB"]


def adapter_scaling(layer: Any) -> float:
    """The factor s of one adapted layer, which runs as W x + s B A x."""
    scaling: float = layer.scaling[_ADAPTER]
    return scaling


def _is_adapted(module: nn.Module) -> bool:
    return "_disable_adapters" in vars(module) or hasattr(type(module), "_disable_adapters")


def adapter_states(modules: Iterable[nn.Module]) -> tuple[Any, ...]:
    """Of each layer of peft among ``modules``: active and merged adapters, their scales, and whether they are disabled. Hashable."""
    return tuple(_state_of(module) for module in modules if _is_adapted(module))


def _state_of(layer: Any) -> tuple[Any, ...]:
    scales = getattr(layer, "scaling", {})
    return (
        tuple(layer.active_adapters),
        tuple(getattr(layer, "merged_adapters", ())),
        layer.disable_adapters is True,
        tuple((name, scale) for name, scale in scales.items() if isinstance(scale, int | float)) if isinstance(scales, dict) else (),
    )


def follow_adapters(module: nn.Module, followed: nn.Module) -> None:
    """Let a layer of peft use its adapters as ``followed`` does, a layer over the same weights. Other modules are left as they are."""
    if not (_is_adapted(module) and _is_adapted(followed)):
        return
    for name in _STATE:
        if name in vars(followed):
            vars(module)[name] = copy.copy(vars(followed)[name])
    if vars(module).get("_disable_adapters") and vars(module).get("merged_adapters"):
        # In its next forward such a layer takes its adapters out of the weight, in place: ``followed`` does that for both.
        vars(module)["merged_adapters"] = []
