"""Fused experts: the registry of functions that run them, and the names by which a module and its config take part in it."""

from __future__ import annotations

from typing import Any

import torch

from patchkit._compat.declared import Names
from patchkit._compat.names import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

RELIED_ON: Names = {
    "transformers.integrations.moe:ExpertsInterface.register": ("key", "value"),
    "transformers:PreTrainedConfig()._experts_implementation": None,
    "transformers:PreTrainedConfig()._experts_implementation_internal": None,
}

MAY_BE_MISSING = {
    "_apply_gate": "`on_experts_interface` asks each module for it, and experts without it are not patched",
    "_is_expert_parallel": "without it no module is spread over processes in this way",
}

# The attribute of a config in which transformers keeps the name of the experts implementation.
EXPERTS_NAME = "_experts_implementation_internal"


def register_experts(name: str, forward: Any) -> None:
    """Make ``name`` a known experts implementation."""
    ExpertsInterface.register(name, forward)


def experts_named(config: Any) -> str:
    """The name of the experts implementation of a config, "eager" where it names none (transformers' ``_experts_implementation``)."""
    name: str = config._experts_implementation or "eager"
    return name


def experts_forward(module: Any, implementation: str) -> Any:
    """The forward that ``implementation`` names for an experts module: a registered function, or the module class's own."""
    return ALL_EXPERTS_FUNCTIONS.get(implementation, type(module).forward.__wrapped__)


def on_experts_interface(module: Any) -> bool:
    """Whether ``module`` holds fused expert weights and lets a registered experts implementation run them."""
    marks = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "down_proj", "config")
    return all(hasattr(module, mark) for mark in marks) and hasattr(type(module).forward, "__wrapped__")


def apply_gate(module: Any, gate_up: torch.Tensor) -> torch.Tensor:
    """The activation and the product of gate and up projection [rows, 2 * I] of an experts module, [rows, I] (``_apply_gate``)."""
    product: torch.Tensor = module._apply_gate(gate_up)
    return product


def is_expert_parallel(module: Any) -> bool:
    """Whether the experts of ``module`` are spread over several processes (transformers' ``_is_expert_parallel``)."""
    return bool(getattr(module, "_is_expert_parallel", False))
