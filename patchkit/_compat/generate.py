"""State and methods of transformers' `generate`."""

from __future__ import annotations

import inspect
from typing import Any

from patchkit._compat.declared import Names

RELIED_ON: Names = {
    "transformers.generation:GenerationMixin._prepare_cache_for_generation": (
        "self",
        "generation_config",
        "model_kwargs",
        "generation_mode",
        "batch_size",
        "max_cache_length",
    ),
    "transformers.generation:GenerationMixin._prefill": ("self", "input_ids", "generation_config", "model_kwargs"),
    "transformers.generation:GenerationMixin.generate": frozenset({"custom_generate"}),
    "transformers:GenerationConfig._pad_token_tensor": None,
    "transformers:LogitsProcessorList.__call__": ("self", "input_ids", "scores"),
}

MAY_BE_MISSING = {"_mask_length": "only transformers from 5.24 on keeps the length of a prompt's mask"}

# The method with which `generate` makes the cache of a call. A patch puts its own in its place.
PREPARE_CACHE = "_prepare_cache_for_generation"

# The method with which `generate` feeds a prompt, once the cache is made.
PREFILL = "_prefill"

# That of whoever asks for it, the processor's, and the list's.
_MOST_FRAMES = 3


def prepare_stock_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Put the cache that ``model`` would use unpatched into ``model_kwargs`` (``GenerationMixin._prepare_cache_for_generation``)."""
    return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)


def stock_prefill(model: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Feed what the cache in ``model_kwargs`` does not hold of ``input_ids`` [B, L], as unpatched (``GenerationMixin._prefill``)."""
    return type(model)._prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)


def padding_token(generation_config: Any) -> int | None:
    """The token that fills texts that have ended, None if there is none; within a call of `generate` (``_pad_token_tensor``)."""
    token = generation_config._pad_token_tensor
    return None if token is None else int(token)


def calling_processors() -> Any:
    """Return the `LogitsProcessorList` that is calling the processor which asks; None if it is called without one.

    `generate` makes a list for each call, and tells its processors nothing else by which they could tell calls apart.
    """
    from transformers import LogitsProcessorList

    here = inspect.currentframe()
    frame = None if here is None else here.f_back
    del here  # a frame that holds itself keeps all frames above it, and the list, until the garbage collector comes
    for _ in range(_MOST_FRAMES):
        if frame is None:
            return None
        owner = frame.f_locals.get("self")
        if isinstance(owner, LogitsProcessorList):
            return owner
        frame = frame.f_back
    return None


def mask_length(generation_config: Any, default: int) -> int:
    """The length of the prompt's attention mask within a call of `generate`, ``default`` where it had none (``_mask_length``)."""
    length: int = getattr(generation_config, "_mask_length", default)
    return length
