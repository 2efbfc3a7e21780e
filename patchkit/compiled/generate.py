"""The cache of `generate` on a model whose steps are compiled."""

from __future__ import annotations

import functools
from typing import Any

from patchkit import _compat
from patchkit.compiled.steps import Steps
from patchkit.static_step import FixedCache

# The largest room, in tokens, with which the cache of `generate` starts, however many it may make.
_MOST_ROOM = 4096


def prepare_cache(
    model: Any,
    steps: Steps,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Replace `prepare_stock_cache`: make a `FixedCache` where it would make a dynamic or static one."""
    if generation_config.use_cache is False:
        steps.warnings.add("steps of this model run uncompiled: generate was called with use_cache=False")
    prepare = functools.partial(
        _compat.prepare_stock_cache, model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    )
    given, kind = model_kwargs.get(_compat.CACHE), generation_config.cache_implementation
    if given is not None or kind not in (None, "dynamic", "static"):
        return prepare(*args, **kwargs)
    generation_config.cache_implementation = None
    result = prepare(*args, **kwargs)
    generation_config.cache_implementation = kind
    if model_kwargs.get(_compat.CACHE) is not None:
        # A limit far beyond what will be generated must not cost memory, nor make every step read it.
        model_kwargs[_compat.CACHE] = FixedCache(steps.cache_layers, min(max_cache_length, _MOST_ROOM))
    return result
