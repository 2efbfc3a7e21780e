"""The attention function of a streaming layer, and the masks that it needs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.rotary import Rotary
from patchkit.attention import AttentionOutput, original_function
from patchkit.errors import StreamError
from patchkit.static_step import StepCache
from patchkit.streaming.int8_layer import rounded
from patchkit.streaming.rule import ForwardContext, LayerRule
from patchkit.streaming.runtime import Runtime

# Queries per attention call in long forwards: bounds the scores to QUERY_BLOCK x (S + W + QUERY_BLOCK) per head.
QUERY_BLOCK = 512


# Runs an attention function over queries, keys, values and a mask, and returns [B, T, H, V].
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Further(Protocol):
    """Keys and values that a layer sees beyond its window during one forward in blocks of queries."""

    def pieces(self, queries: torch.Tensor) -> Iterable[torch.Tensor]:
        """Cut the token numbers [T] of the queries into those that are attended at once."""

    def attend(
        self, run: Run, block: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend from the queries [B, H, t, K] with token numbers ``block`` [t] to these keys, and to those beyond the window."""

    def end(self) -> None:
        """Take note that all queries have been attended."""


class Beyond(Protocol):
    """Keys and values that a layer sees beyond sinks and window. ``run`` is the model's attention function, for the model's arguments."""

    def in_fixed_step(
        self, run: Run, step: StepCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend in a fixed step; the mask [B or 1, 1, 1, S + W] is added to the scores."""

    def in_step(
        self, run: Run, context: ForwardContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Attend in a step of one token; mask as for `Further.attend`."""

    def begin(self, context: ForwardContext, key: torch.Tensor, value: torch.Tensor, keys: int) -> Further:
        """Begin a forward over ``keys`` keys in order of time [B, G, n, K] and their values [B, G, n, V]."""


def _refuse_two_way(context: ForwardContext, rule: Any, keys: int | None) -> None:
    """Refuse a forward whose mask rule shows a token later ones, as within the span of an image: a window would hide them.

    Args:
        rule: transformers' mask function: whether a query sees a key, from indices that broadcast.
        keys: number of keys of the model's own mask. What the rule knows of single tokens (ids of spans) has as many entries, the new last.

    Raises:
        StreamError: a token of this forward sees a later one.
    """
    if context.tokens == 1 or rule is None or _compat.is_causal_rule(rule):
        return
    first = context.start if keys is None else int(keys) - context.tokens
    tokens = torch.arange(first, first + context.tokens, device=context.device)
    rows = torch.arange(context.rows, device=context.device)[:, None, None, None]
    for block in tokens.split(QUERY_BLOCK):
        query, later = block[None, None, :, None], tokens[None, None, None, :]
        if bool((rule(rows, torch.zeros_like(rows), query, later) & (later > query)).any()):
            raise StreamError(
                "in this call the model lets tokens see later ones (those of an image, say, by token_type_ids), which no streaming or "
                "linear rule does: leave that argument out, or unpatch_model first"
            )


def causal_mask(context: ForwardContext, implementation: str, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Build the model's own mask, for the layers that patchkit does not keep."""
    _refuse_two_way(context, kwargs.get("mask_function"), kwargs.get("kv_length"))
    return _compat.mask_function(implementation)(*args, **kwargs)


def placeholder_mask(context: ForwardContext, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return a placeholder, since the layers make their own masks; or None where the model must see that none is needed."""
    _refuse_two_way(context, kwargs.get("mask_function"), kwargs.get("kv_length"))
    unneeded = (
        context.sees_every_slot or context.in_blocks
    ) and not context.plan.has_alibi  # such models compute with the mask before a layer sees it
    return None if unneeded else torch.zeros(1, 1, 1, 1, device=context.device)


def attend_in_window(
    runtime: Runtime,
    rule: LayerRule,
    rotary: Rotary | None,
    masked: str,
    watch: Any,
    beyond: Any,
    original: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """Run transformers' attention function under the streaming rule.

    Args:
        masked: the implementation that runs when a mask is needed.
        watch: called with queries, keys, mask, the keys' token numbers and the scaling; None for no call.
        beyond: what the layer sees beyond its window, a `Beyond`; None for nothing.
        original: the model's attention function.
        query, key, value: [B, H, T, K], [B, G, n, K] and [B, G, n, V]; keys as `StreamLayer.update` returned them.

    Returns:
        [B, T, H, V], and None for attention weights.
    """
    if runtime.step is not None:
        step_mask = runtime.step.masks[rule.number]
        if beyond is not None:
            bound = functools.partial(_run, original_function(masked, module), module, kwargs)
            return beyond.in_fixed_step(bound, runtime.step, query, key, value, step_mask), None
        return original_function(masked, module)(module, query, key, value, step_mask, **kwargs)
    context = runtime.context
    if context is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    additive = masked != "sdpa"
    # An eager function may add the mask without asking whether there is one.
    no_mask = query.new_zeros(1, 1, 1, 1) if additive and original_function(masked, module) is original else None
    if context.sees_every_slot:
        if watch is not None:
            watch(query, key, None, context.key_tokens(rule), kwargs.get("scaling"))
        return original(module, query, key, value, no_mask, **kwargs)
    run = original_function(masked, module)
    queries = torch.arange(context.start, context.end, device=query.device)
    keys = context.key_tokens(rule).to(query.device)
    if not context.in_blocks:
        mask: Any = no_mask if context.pads is None and beyond is None else _mask(context, rule, queries, keys, query, additive)
        if beyond is not None and context.start >= rule.capacity:
            return beyond.in_step(functools.partial(_run, run, module, kwargs), context, query, key, value, mask), None
        if watch is not None:
            watch(query, key, mask, keys, kwargs.get("scaling"))
        return run(module, query, key, value, mask, **kwargs)

    window_query = sink_query = query
    if rule.int8 and not context.cached:
        key, value = rounded(rule, context, key, value)
    if rotary is not None:
        if context.repositions:
            cos, sin = (t.to(query.device) for t in context.window_rotation(rotary))
            window_query = rotary.rotate(query, cos, sin, rotary.start)
            if not context.cached and not rule.int8:
                key = rotary.rotate(key, cos, sin, rotary.start)
        elif runtime.plan.limit is None and rule.in_cache and context.end > runtime.plan.main.reach:
            cos, sin = (t.to(query.device) for t in context.sink_rotation(rotary))
            sink_query = rotary.rotate(query, cos, sin, rotary.start)
    split = sink_query is not window_query and rule.sinks > 0 and rule.in_cache
    if split and kwargs.get("scaling") is None:  # the default would be taken from the doubled key dimension
        kwargs["scaling"] = query.shape[-1] ** -0.5

    outputs = []
    further = None if beyond is None else beyond.begin(context, key, value, keys.shape[-1])
    for block in queries.split(QUERY_BLOCK) if further is None else further.pieces(queries):
        rows = slice(int(block[0]) - context.start, int(block[-1]) + 1 - context.start)
        columns = visible_columns(context, rule, keys.shape[-1], rows)
        block_keys, k, v = keys[:, columns], key[:, :, columns], value[:, :, columns]
        q = window_query[:, :, rows]
        if split:
            # Whether a key is a sink [B or 1, 1, n, 1], by its position in its own row.
            row = block_keys if context.pads is None else block_keys - context.pads[:, None].to(query.device)
            is_sink = ((row >= 0) & (row < rule.sinks))[:, None, :, None]
            zero = torch.zeros((), dtype=k.dtype, device=k.device)
            k = torch.cat([torch.where(is_sink, zero, k), torch.where(is_sink, k, zero)], -1)
            q = torch.cat([q, sink_query[:, :, rows]], -1)
        mask = _mask(context, rule, block, block_keys, q, additive)
        if watch is not None:
            watch(q, k, mask, block_keys, kwargs.get("scaling"))
        if further is not None:
            outputs.append(further.attend(functools.partial(_run, run, module, kwargs), block, q, k, v, mask))
        else:
            outputs.append(run(module, q, k, v, mask, **kwargs)[0])
    if further is not None:
        further.end()
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _run(
    function: Any,
    module: nn.Module,
    kwargs: dict[str, Any],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    return function(module, query, key, value, mask, **kwargs)[0]


def watch_queries(
    runtime: Runtime, index: int, query: torch.Tensor, key: torch.Tensor, mask: Any, tokens: torch.Tensor, scaling: Any
) -> None:
    """Hand the queries, keys and mask of attention layer ``index`` to its cache layer, if a cache is in use."""
    if runtime.cache is not None:
        layer: Any = runtime.cache.layers[index]
        layer.observe(runtime.context, query, key, mask, tokens, scaling)


def visible_columns(context: ForwardContext, rule: LayerRule, n_keys: int, rows: slice) -> torch.Tensor:
    """Indices [m] of the keys that the queries ``rows`` of a forward can see: the sinks, and one window behind the first query."""
    # Keys are in order of time from column `ordered` on, where token i is in column i + offset. Every row's sinks are before
    # that, or among the first most_pads + S tokens.
    offset = n_keys - context.end
    ordered = rule.sinks if context.start >= rule.capacity else 0
    most_pads = 0 if context.pads is None else int(context.pads.max())
    head = max(ordered, most_pads + rule.sinks + offset) if most_pads or not ordered else ordered
    last = context.start + rows.stop + offset
    first = max(ordered, context.start + rows.start - rule.window + 1 + offset)
    head = min(head, last)
    return torch.cat([torch.arange(head), torch.arange(max(first, head), last)])


def _mask(
    context: ForwardContext, rule: LayerRule, queries: torch.Tensor, keys: torch.Tensor, like: torch.Tensor, additive: bool
) -> torch.Tensor:
    """Mask [B or 1, 1, T, n]: True where visible; ``additive``: 0 there and the lowest number of ``like``'s dtype elsewhere."""
    visible = context.visible(rule, queries, keys)
    if not additive:
        return visible
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, torch.finfo(like.dtype).min)
