"""The registry of functions that run fused experts."""

from __future__ import annotations

from typing import Any

from patchkit._compat.names import ALL_EXPERTS_FUNCTIONS, ExpertsInterface


def register_experts(name: str, forward: Any) -> None:
    """Make ``name`` a known experts implementation."""
    ExpertsInterface.register(name, forward)


def experts_forward(module: Any, implementation: str) -> Any:
    """The forward that ``implementation`` names for an experts module: a registered function, or the module class's own."""
    return ALL_EXPERTS_FUNCTIONS.get(implementation, type(module).forward.__wrapped__)


def on_experts_interface(module: Any) -> bool:
    """Whether ``module`` holds fused expert weights and lets a registered experts implementation run them."""
    marks = ("is_transposed", "has_gate", "has_bias", "_apply_gate", "down_proj", "config")
    return all(hasattr(module, mark) for mark in marks) and hasattr(type(module).forward, "__wrapped__")
