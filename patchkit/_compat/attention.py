"""The registries of attention functions and masks, and the configs that name them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from patchkit._compat.declared import Names
from patchkit._compat.names import (
    ALL_ATTENTION_FUNCTIONS,
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    causal_mask_function,
)

RELIED_ON: Names = {
    "transformers:AttentionInterface.register": ("key", "value"),
    "transformers:AttentionMaskInterface.register": ("key", "value"),
    "transformers:PreTrainedConfig()._attn_implementation": None,
    "transformers:PreTrainedConfig()._attn_implementation_internal": None,
    "transformers:PreTrainedConfig.sub_configs": None,
    "transformers:PreTrainedModel._supports_sdpa": None,
}

# The attribute of a config in which transformers keeps the name of the attention implementation. Its property of another name,
# `_attn_implementation`, hands what it is given on to the sub-configs.
ATTENTION_NAME = "_attn_implementation_internal"


def register_attention(name: str, attention: Any, mask: Any) -> None:
    """Make ``name`` a known attention implementation. A name without a mask function would silently lose the causal mask."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def attention_function(implementation: str) -> Any:
    """The registered attention function of ``implementation`` (not "eager", which every modeling file defines for itself)."""
    return ALL_ATTENTION_FUNCTIONS[implementation]


def mask_function(implementation: str) -> Any:
    """The function that builds masks for ``implementation``; one without any gets None, as in transformers."""
    return ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, lambda *args, **kwargs: None)


def is_causal_rule(rule: Any) -> bool:
    """Whether a mask function of transformers shows no query a later key, as far as that can be told from how it is put together."""
    if rule is causal_mask_function:
        return True
    names = getattr(getattr(rule, "__code__", None), "co_freevars", ())
    held = dict(zip(names, (cell.cell_contents for cell in rule.__closure__ or ()), strict=True)) if names else {}
    if "mask_functions" in held:
        parts = map(is_causal_rule, held["mask_functions"])
        return any(parts) if rule.__qualname__.startswith("and_masks.") else all(parts)
    # One rule with other indices: with an offset, or those within a packed sequence.
    return "mask_function" in held and is_causal_rule(held["mask_function"])


def attention_configs(model: Any) -> list[Any]:
    """Every config object through which a module of ``model`` looks its attention implementation up, each once."""
    configs: dict[int, Any] = {}
    waiting = [module.config for module in model.modules() if isinstance(getattr(module, "config", None), PreTrainedConfig)]
    while waiting:
        config = waiting.pop()
        if id(config) not in configs:
            configs[id(config)] = config
            waiting += [sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None]
    return list(configs.values())


def attention_named(config: Any) -> str | None:
    """The name of the attention implementation of a config, None where it names none (transformers' ``_attn_implementation``)."""
    name: str | None = config._attn_implementation
    return name


def name_attention(config: Any, name: str | None) -> None:
    """Set the attention implementation of one config, and of no other (transformers' ``_attn_implementation_internal``)."""
    config._attn_implementation_internal = name


def supports_sdpa(model: Any) -> bool:
    """Whether ``model`` can run the attention implementation "sdpa" (transformers' ``_supports_sdpa``)."""
    return bool(getattr(model, "_supports_sdpa", False))


@contextlib.contextmanager
def attention_set_to(model: Any, names: Callable[[str], str]) -> Iterator[None]:
    """Within this context every config of ``model`` names ``names(implementation)`` instead of its implementation."""
    before = [(config, attention_named(config)) for config in attention_configs(model)]
    try:
        for config, implementation in before:
            name_attention(config, names(implementation or "eager"))
        yield
    finally:
        for config, implementation in before:
            name_attention(config, implementation)
