"""Every private or moving name of transformers and torch that patchkit touches, in one place."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["Cache", "CacheLayerMixin", "DynamicCache", "DynamicLayer", "DynamicSlidingWindowLayer"]


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


@contextlib.contextmanager
def attention_set_to(model: Any, names: Callable[[str], str]) -> Iterator[None]:
    """Within this context every config of ``model`` names ``names(implementation)`` instead of its implementation."""
    before = [(config, config._attn_implementation_internal) for config in attention_configs(model)]
    try:
        for config, implementation in before:
            config._attn_implementation_internal = names(implementation or "eager")
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def supports_dynamic_cache(model: Any) -> bool:
    """Whether ``model`` takes a `DynamicCache`, as almost all do, or has a cache class of its own."""
    return bool(type(model)._supports_default_dynamic_cache())


def argument_names(module: Any) -> tuple[str, ...]:
    """The names of ``module.forward``'s arguments, in order, without ``self``."""
    return _argument_names(type(module))


@lru_cache(maxsize=256)
def _argument_names(cls: type) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``module.forward`` by name."""
    return {**dict(zip(argument_names(module), args, strict=False)), **kwargs}
