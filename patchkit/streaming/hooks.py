"""Hooks before and after the decoder, which begin and end a forward of a stream."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.attention import Masks, refuse_other_attention, swap_mask_builder
from patchkit.errors import StreamError
from patchkit.streaming.attention import causal_mask, placeholder_mask
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.inputs import notice_padding, refuse_packing
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.runtime import Runtime, runtime_of
from patchkit.streaming.stream import Stream
from patchkit.training_mode import is_in_force


def before_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give the decoder a streaming cache and bounded positions, and the attention layers the context of this forward."""
    runtime = runtime_of(decoder)
    assert runtime is not None
    kwargs = _compat.by_name(decoder, args, kwargs)
    cache = kwargs.get(_compat.CACHE)
    if _compat.is_paged(kwargs):
        raise StreamError("continuous batching has its own paged cache and would bypass the streaming window: unpatch_model first")
    if not is_in_force(decoder, cache if isinstance(cache, StreamingCache) else None):
        if isinstance(cache, StreamingCache):
            raise StreamError(
                "a streaming cache was given to a forward with gradients in training mode, which is the unpatched model's: "
                "call it under torch.no_grad(), or model.eval() first"
            )
        if not torch.is_grad_enabled():
            runtime.warnings.add(
                "the model is in training mode, where forwards without a streaming cache run unpatched: call model.eval(), or generate"
            )
        forget_masks(runtime)
        runtime.context = runtime.cache = None
        return None
    # PyTorch does not call the hook that gives it back where KeyboardInterrupt ends a forward.
    runtime.exclusive.take(f"a forward of this {type(decoder).__name__}", decoder, nested=False)
    runtime.context = runtime.cache = None
    refuse_other_attention(runtime.configs)
    for each in runtime.frequencies:
        each.follow()
    if kwargs.get("output_attentions"):
        raise StreamError("output_attentions is not available with streaming or linear: their attention runs over blocks of the window")
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    if cache is None and use_cache:
        cache = runtime.plan.new_cache()
        kwargs[_compat.CACHE] = cache
    if cache is not None and not (isinstance(cache, StreamingCache) and cache.plan is runtime.plan):
        raise StreamError(
            f"this model streams with its own cache, and was given a {type(cache).__name__}. Leave {_compat.CACHE} out of the first "
            "call, and pass the cache that it returns to the next. A cache made before the model was patched, by another model, or "
            "loaded from a pickle cannot be used (copy.deepcopy can), nor can the prefix of PEFT's prefix tuning."
        )
    stream = cache.stream if cache is not None else Stream(runtime.plan)
    notice_padding(stream, kwargs.get("attention_mask"), batch, tokens)
    refuse_packing(kwargs.get("position_ids"), kwargs.get("attention_mask"), stream.seen, tokens)
    if cache is not None:
        cache.make_writable()
        runtime.context = stream.begin(tokens, cache.own_layers, inputs.device, in_place=not torch.is_grad_enabled(), batch=batch)
        runtime.cache = cache
    else:
        base = torch.zeros(1, dtype=torch.int64, device=inputs.device)
        runtime.context = ForwardContext(
            runtime.plan,
            0,
            tokens,
            stream.pads,
            base,
            inputs.device,
            cached=False,
            rows=batch,
            most_pads=stream.most_pads,
            pad_list=stream.pad_list,
        )
    if "position_ids" in _compat.argument_names(decoder):
        kwargs["position_ids"] = runtime.context.position_ids().expand(batch, -1)
    builder = functools.partial(placeholder_mask if runtime.plan.owns_all else causal_mask, runtime.context)
    forget_masks(runtime)
    runtime.own_masks = Masks(builder, runtime.mask_configs)
    runtime.outer_masks = swap_mask_builder(runtime.own_masks)
    return (), kwargs


def forget_masks(runtime: Runtime) -> None:
    """Remove the mask builder that an interrupted forward has left behind."""
    if runtime.own_masks is not None:
        found = swap_mask_builder(None)
        if found is not runtime.own_masks:
            swap_mask_builder(found)
        runtime.own_masks = None


def after_forward(decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Count the tokens as seen; runs after a failed forward too, with no output."""
    runtime = runtime_of(decoder)
    assert runtime is not None
    if not runtime.exclusive.give_back():  # refused: the state belongs to another thread's forward
        return
    context, cache = runtime.context, runtime.cache
    if context is None:
        return
    swap_mask_builder(runtime.outer_masks)
    runtime.context = runtime.cache = runtime.outer_masks = runtime.own_masks = None
    if output is None:
        return
    if cache is not None:
        cache.stream.commit()
    if torch.compiler.is_compiling():  # by the user: a count that changes would need a new graph for every call
        return
    for rule, hits in runtime.counters:
        rule.count(hits, context)
