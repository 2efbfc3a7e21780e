"""Low-rank adapters of peft."""

from __future__ import annotations

from typing import Any

import torch

from patchkit._compat.declared import Names, check_when_used

RELIED_ON_WHEN_USED: Names = {
    "peft:inject_adapter_in_model": ("peft_config", "model"),
    "peft:LoraConfig": frozenset({"r", "lora_alpha", "target_modules"}),
}

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
