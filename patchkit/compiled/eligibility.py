"""Conditions under which a forward runs compiled, and the reasons why others run eagerly."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.static_step import FixedCache
from patchkit.streaming.cache import StreamingCache
from patchkit.training_mode import is_in_force

# Tensor arguments of a compiled step. Other arguments ask for something that only an eager forward gives.
TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")

_PLAIN = {*TENSORS, _compat.CACHE, "use_cache", "return_dict"}

_ASKING = ("output_attentions", "output_hidden_states", "output_router_logits")


def wants_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is the first forward of a sequence, for which the model would make a cache."""
    if _compat.CACHE in kwargs or decoder.training or torch.is_grad_enabled():
        return False
    return bool(kwargs.get("use_cache", getattr(decoder.config, "use_cache", True)))


def why_eager(decoder: Any, kwargs: dict[str, Any]) -> str | None:
    """The reason why a forward cannot run compiled, "" where that is expected (a prompt, say); None if it can."""
    cache, mask = kwargs.get(_compat.CACHE), kwargs.get("attention_mask")
    inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    if cache is None or cache.get_seq_length() == 0 or inputs is None or not is_in_force(decoder, cache):
        return ""
    if isinstance(cache, FixedCache) and not cache.step_lengths:
        return "rows of the batch advance by different numbers of tokens"
    if inputs.shape[1] not in (cache.step_lengths if isinstance(cache, FixedCache) else (1,)):
        return ""
    given = {name: value for name, value in kwargs.items() if name not in _PLAIN and not _compat.means_nothing_to_a_model(value)}
    asked = [name for name, value in given.items() if value is not False]
    asked += [name for name in _ASKING if getattr(decoder.config, name, False)]
    if asked or kwargs.get("return_dict") is False:
        return f"they are called with {', '.join(asked) or 'return_dict=False'}"
    if torch.is_grad_enabled():
        return "gradients are enabled, put torch.no_grad() around them"
    if not isinstance(cache, StreamingCache | FixedCache):
        return f"they are given a {type(cache).__name__}, leave {_compat.CACHE} out of the first call"
    if autocast_of(inputs.device) != cache.autocast:
        return ""  # an eager forward converts the cache to the new dtype
    if isinstance(cache, StreamingCache):
        return None
    if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 2):
        return "they are given a mask that is not [batch, tokens]"
    return None


def is_new_sequence(kwargs: dict[str, Any]) -> bool:
    """Whether the arguments of a forward hold no cache, or an empty one, or one that `prefix_cache` has just filled."""
    cache = kwargs.get(_compat.CACHE)
    if cache is not None and vars(cache).pop("just_thawed", False):
        return True
    return cache is None or cache.get_seq_length() == 0


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on this kind of device; None if autocast is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
