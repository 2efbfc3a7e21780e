"""The arguments of a compiled step: its cache, mask and positions, in shapes and layouts that do not change."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.compiled.eligibility import TENSORS, autocast_of, why_eager
from patchkit.kernels.op import VARIABLE
from patchkit.static_step import FixedCache, StepCache
from patchkit.streaming.cache import StreamingCache


def step_of(decoder: Any, kwargs: dict[str, Any]) -> tuple[StepCache | None, str | None]:
    """Return the cache that compiled code works on in this forward, and put its mask and positions into ``kwargs``.

    Returns:
        The cache, or None where the forward has to run eagerly; and the reason for that, "" where it is expected (`why_eager`).
    """
    cache, reason = kwargs.get(_compat.CACHE), why_eager(decoder, kwargs)
    step: StepCache | None = None
    if reason is None and isinstance(cache, StreamingCache):
        step = cache.fixed_step()
        if step is not None:
            kwargs["attention_mask"] = step.masks[0]  # not used: it keeps the model from making one
    elif reason is None and isinstance(cache, FixedCache):
        step = _fixed_step(decoder, cache, kwargs)
    return step, reason


def packed_arguments(step: StepCache, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return one set of arguments, in one layout, whoever calls: a graph is made for both."""
    return {name: _packed(kwargs[name]) for name in TENSORS if name in kwargs} | {_compat.CACHE: step, "use_cache": True}


def kind_of(decoder: nn.Module, step: StepCache, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A key of everything that a graph depends on; steps with different keys have different graphs."""
    shapes = tuple((name, value.shape, value.dtype) for name, value in kwargs.items() if torch.is_tensor(value))
    masks = tuple(mask.shape for mask in step.masks)
    layer: Any = step.layers[0]
    modes = decoder.training, torch.is_inference_mode_enabled(), autocast_of(layer.keys.device), os.environ.get(VARIABLE)
    return shapes, masks, layer.keys.shape, layer.keys.dtype, *modes


def _fixed_step(decoder: Any, cache: FixedCache, kwargs: dict[str, Any]) -> StepCache:
    inputs, mask = kwargs.get("input_ids", kwargs.get("inputs_embeds")), kwargs.get("attention_mask")
    assert inputs is not None
    step = cache.fixed_step(inputs.shape[1])
    if mask is not None:
        kwargs["attention_mask"] = nn.functional.pad(mask.to(torch.int64), (0, cache.room - mask.shape[1]))
        return step
    # Some models make a mask of as many ones as tokens were seen, or take positions from it.
    kwargs["attention_mask"] = inputs.new_ones(len(inputs), cache.room, dtype=torch.int64)
    if "position_ids" in _compat.argument_names(decoder):
        kwargs.setdefault("position_ids", step.layers[0].slots.expand(len(inputs), -1))
    return step


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of a fresh tensor; `contiguous` would leave those of dimensions of size 1 as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)
