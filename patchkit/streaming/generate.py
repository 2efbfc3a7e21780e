"""The cache of `generate` on a model that streams."""

from __future__ import annotations

from typing import Any

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.runtime import Runtime
from patchkit.training_mode import off_policy


def prepare_cache(model: Any, runtime: Runtime, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Replace `prepare_stock_cache`: make a streaming cache where it would make a dynamic or static one."""
    given = model_kwargs.get(_compat.CACHE)
    if given is not None and not isinstance(given, StreamingCache):
        raise StreamError(f"this model streams with its own cache: leave {_compat.CACHE} out instead of passing a {type(given).__name__}")
    kind = generation_config.cache_implementation
    if kind is not None and kind not in ("dynamic", "static"):
        raise StreamError(
            f"cache_implementation={kind!r} would replace the streaming cache: leave it out, a window of keys is small already"
        )
    generation_config.cache_implementation = None
    result = _compat.prepare_stock_cache(model, generation_config, model_kwargs, *args, **kwargs)
    generation_config.cache_implementation = kind
    if generation_config.use_cache is False:
        runtime.warnings.add("generate was called with use_cache=False: every step reads the whole text again, and memory grows with it")
    made = model_kwargs.get(_compat.CACHE)
    if made is not None and _compat.decoder_of(model).training:
        runtime.warnings.add(off_policy("a streaming cache"))
    if given is None and made is not None:
        cache = runtime.plan.new_cache()
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[_compat.CACHE] = cache
    return result


def refuse_continuous_batching(name: str, *args: Any, **kwargs: Any) -> Any:
    """Take the place of the method ``name`` of continuous batching, and raise a StreamError."""
    raise StreamError(
        f"{name} keeps keys in its own pages, and would bypass the window of streaming or linear: unpatch_model first, or call generate"
    )
