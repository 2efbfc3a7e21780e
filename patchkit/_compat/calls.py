"""Calls of a model: the names of its arguments, and its cache among them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from patchkit._compat.declared import Names
from patchkit._compat.names import DynamicLayer, GenerationMixin, LinearAttentionLayer

RELIED_ON: Names = {
    "transformers.cache_utils:Cache.__init__": None,
    "transformers.cache_utils:Cache.crop": ("self", "tokens_to_remove"),
    "transformers.cache_utils:Cache.activate_past_recording": ("self",),
    "transformers.cache_utils:CacheLayerMixin.lazy_initialization": ("self", "key_states", "value_states"),
    "transformers.cache_utils:CacheLayerMixin.update": ("self", "key_states", "value_states", "args", "kwargs"),
    "transformers.cache_utils:CacheLayerMixin.get_mask_sizes": ("self", "query_length"),
    "transformers.cache_utils:CacheLayerMixin.get_seq_length": ("self",),
    "transformers.cache_utils:CacheLayerMixin.get_max_length": ("self",),
    "transformers.cache_utils:DynamicLayer.crop": ("self", "tokens_to_remove"),
    "transformers.generation:GenerationMixin._supports_default_dynamic_cache": None,
}

_OLD_CACHE = "past_key_values"

# What this transformers calls the cache: the argument of forward, the entry in the model kwargs of generate, and the field of outputs.
# "past_key_values" up to 5.23; "cache" from 5.24 on, with the old name as an alias until 5.40.
CACHE = "cache" if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters else _OLD_CACHE


def cache_of(output: Any) -> Any:
    """The cache in a model's output, None if it has none."""
    return getattr(output, CACHE, None)


def cache_given(kwargs: dict[str, Any]) -> Any:
    """The cache among the arguments of a call, under its old name too; None if there is none."""
    found = kwargs.get(CACHE)
    return kwargs.get(_OLD_CACHE) if found is None else found


def is_paged(kwargs: dict[str, Any]) -> bool:
    """Whether these arguments of a forward are continuous batching's, which keeps keys and values in pages of its own."""
    return type(kwargs.get("cache")).__name__ == "PagedAttentionCache"


def speaks_old_names(module: Any) -> bool:
    """Whether ``module.forward`` takes its cache under a name that this transformers no longer uses."""
    names = argument_names(module)
    return CACHE not in names and _OLD_CACHE in names


def takes_tokens_back(layer: Any) -> bool:
    """Whether a cache layer's ``crop`` brings back what it was. Layers of transformers 5.15 do not say so: there, those of keys and values
    do, and recurrent ones do not."""
    declared = getattr(layer, "is_croppable", None)
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) if declared is None else bool(declared)


def has_states_only(cache: Any) -> bool:
    """Whether all layers of a `DynamicCache` hold recurrent states only, and so do not know how many tokens they have seen."""
    recurrent = [isinstance(layer, LinearAttentionLayer) and not isinstance(layer, DynamicLayer) for layer in cache.layers]
    return bool(recurrent) and all(recurrent)


def supports_dynamic_cache(model: Any) -> bool:
    """Whether ``model`` takes a `DynamicCache`, as almost all do, or has a cache class of its own."""
    return bool(type(model)._supports_default_dynamic_cache())


def argument_names(module: Any) -> tuple[str, ...]:
    """The names of ``module.forward``'s arguments, in order, without ``self``."""
    return _argument_names(type(module).forward)


@lru_cache(maxsize=256)
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def by_name(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a call of ``module.forward`` by name; the cache is `CACHE`, also where it was given under its old name."""
    named = {**dict(zip(argument_names(module), args, strict=False)), **kwargs}
    if CACHE != _OLD_CACHE and _OLD_CACHE in named:
        old = named.pop(_OLD_CACHE)
        if named.get(CACHE) is None:
            named[CACHE] = old
    return named
