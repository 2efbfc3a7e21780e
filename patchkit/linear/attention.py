"""The attention function of a linear layer, for one token and for several."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import BAKED_IN, AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.attention import AttentionOutput
from patchkit.errors import StreamError
from patchkit.kernels.linear_attention import linear_attention
from patchkit.linear.cache import LinearLayer
from patchkit.linear.hybrid import CHUNK, HybridAttention, banded_softmax_part, softmax_part
from patchkit.linear.rule import LinearRule
from patchkit.linear.step import LinearStep, LinearStepLayer
from patchkit.streaming.attention import visible_columns
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.runtime import Runtime

# Arguments of attention calls that do not change which keys are seen and how they are weighed, or that this function serves.
_UNDERSTOOD = {
    *("scaling", "is_causal", "sliding_window", "position_ids", "position_embeddings", "cache_position", "cos", "sin"),
    *("use_cache", "input_ids", "labels", "token_type_ids", "logits_to_keep", "output_router_logits", "output_hidden_states"),
}

# Queries of long forwards that are computed at once: with a window, and where every query has its own mask.
_QUERY_BLOCK = 4096
_MASKED_BLOCK = 256


def obstacle_of(layer: AttentionLayer, calls: int, learned: bool) -> str | None:
    """The reason why hybrid attention cannot replace this layer's attention; None if it can.

    Args:
        calls: number of times that a forward calls its module's attention.
        learned: positions come from a table, not from rotations.
    """
    if layer.alibi is not None:
        return "scores get a bias that grows with the distance (ALiBi), which a sum over old tokens cannot have"
    if layer.obstacle is not None and not (layer.obstacle == BAKED_IN and learned):
        return layer.obstacle
    extra = [name for name in layer.arguments if name not in _UNDERSTOOD]
    if extra:
        return f"attention takes {', '.join(f'`{name}`' for name in extra)}, which linear attention cannot honour"
    if calls != 1:
        return f"attention is called {calls} times in a forward, and there is one state"
    if not layer.attends_stored or (layer.rotary is not None and layer.rotary.slot == "values"):
        return "the cache holds something else than the keys and values that attention receives (multi-head latent attention)"
    return None


@dataclass(eq=False)
class HybridLayer:
    """Data of the attention function of one layer: the index in the cache, the rule, and the hybrid attention."""

    index: int
    rule: LinearRule
    part: HybridAttention


def attend_linearly(
    runtime: Runtime,
    hybrid: HybridLayer,
    original: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """Run hybrid attention in place of transformers' attention function.

    Args:
        original: the model's attention function, which runs outside a forward of the patched decoder.
        query, key, value: [B, H, T, K], [B, G, N, K] and [B, G, N, V]; keys as `LinearLayer.update` returned them.

    Returns:
        [B, T, H, V], and None for attention weights.

    Raises:
        StreamError: an argument changes attention in a way that hybrid attention cannot follow.
    """
    rule, context = hybrid.rule, runtime.context
    given = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if given is None else given
    if runtime.step is not None:
        layer = runtime.step.layer(hybrid.index)
        visible = runtime.step.masks[rule.number] == 0
        out = _one_token(hybrid, layer, layer.linear_step().short, softmax_part(query, key, value, visible, scaling), query)
    elif context is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    else:
        _refuse_arguments(module, kwargs)
        if hybrid.part.factor.device != query.device:  # the model was moved since it was patched
            hybrid.part.to(query.device)
        cached: Any = None if runtime.cache is None else runtime.cache.layers[hybrid.index]
        if context.in_blocks:
            out = _several_tokens(hybrid, cached, context, query, key, value, scaling)
        else:
            token = torch.tensor([context.start], device=query.device)
            hidden = not context.sees_every_slot and (context.pads is not None or not rule.sees_all)
            seen = context.visible(rule, token, context.key_tokens(rule)).to(query.device) if hidden else None
            short = context.row_positions(token.to(context.device)) < rule.min_length if rule.min_length else None
            layer = cached if context.start >= rule.full_from else None  # nothing is old yet
            out = _one_token(hybrid, layer, short, softmax_part(query, key, value, seen, scaling), query)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _refuse_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    given = {name: value for name, value in kwargs.items() if name not in _UNDERSTOOD and not _compat.means_nothing_to_a_model(value)}
    unknown = [name for name, value in given.items() if value is not None and value is not False]
    unknown = [name for name in unknown if torch.is_tensor(kwargs[name]) or kwargs[name] != 0]
    if unknown:
        raise StreamError(
            f"{type(module).__name__} was called with {', '.join(unknown)}, which linear attention cannot honour: leave it out"
        )


def _one_token(
    hybrid: HybridLayer,
    layer: LinearLayer | LinearStepLayer | None,
    short: torch.Tensor | None,
    both: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
) -> torch.Tensor:
    """Outputs [B, H, 1, V] float32 of one token.

    Args:
        layer: holds the state; None while no key is old.
        short: [B or 1, 1] bool, the query sees everything by softmax; None if no query does.
        both: numerator [B, H, 1, V] and denominator [B, H, 1] of the softmax part.
    """
    rule, part = hybrid.rule, hybrid.part
    numerator, denominator = both
    young = numerator / denominator[..., None]
    if layer is None:
        mixed = part.read(young)
    else:
        step: LinearStep = layer.linear_step()
        features = part.query_map(step.plain_query(query, rule.rotary)).unflatten(1, (layer.state.shape[1], -1))[..., 0, :]  # [B, G, h, F]
        old_numerator = (features @ layer.state).flatten(1, 2)[:, :, None]
        old_denominator = (features @ layer.normalizer[..., None]).flatten(1, 2)
        mixed = part.combine(numerator, denominator, old_numerator, old_denominator, step.old_keys.to(query.device))
    return mixed if short is None else torch.where(short.to(query.device)[:, :, None, None], young, mixed)


def _several_tokens(
    hybrid: HybridLayer,
    layer: LinearLayer | None,
    context: ForwardContext,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Outputs [B, H, T, V] float32 of T tokens, by one call of `linear_attention`. Keys that become old enter the state of ``layer``."""
    rule, part, rotary = hybrid.rule, hybrid.part, hybrid.rule.rotary
    if rotary is not None and context.repositions:  # the model has put them at in-cache positions
        cos, sin = (t.to(q.device) for t in context.window_rotation(rotary))
        q = rotary.rotate(q, cos, sin, rotary.start)
        if not context.cached:
            k = rotary.rotate(k, cos, sin, rotary.start)
    numerator, denominator = _softmax(context, rule, q, k, v, scaling)
    queries = torch.arange(context.start, context.end, device=q.device)
    rows = context.row_positions(queries.to(context.device)).to(q.device)
    young = numerator / denominator[..., None]
    # Keys are in order of time, token i in column i + offset; that of the first query which has an old key is S.
    first = max(context.start, rule.full_from)
    if first < context.end:
        late, offset = first - context.start, k.shape[2] - context.end
        columns = slice(first - rule.softmax_window + offset, context.end - rule.softmax_window + offset)
        plain_q, plain_k, old_v = q[:, :, late:], k[:, :, columns], v[:, :, columns]
        if rotary is not None:
            plain_q = _unrotated(context, rotary, plain_q, 0, first)
            plain_k = _unrotated(context, rotary, plain_k, rule.softmax_window, first - rule.softmax_window)
        mask = None
        if context.pads is not None:
            tokens = torch.arange(first, context.end, device=context.device) - rule.softmax_window
            mask = rule.is_old(context, tokens).to(q.device)
        name = part.key_map.kind if part.key_map.fused else "identity"
        fq, fk = (plain_q, plain_k) if part.key_map.fused else (part.query_map(plain_q), part.key_map(plain_k))
        before = (None, None) if layer is None else (layer.state, layer.normalizer)
        if layer is not None and torch.is_grad_enabled():  # `advance` will write into them
            before = layer.state.clone(), layer.normalizer.clone()
        old_numerator, old_denominator, state, normalizer = linear_attention(
            fq.contiguous(), fk.contiguous(), old_v.contiguous(), *before, mask, name, False, CHUNK
        )
        if layer is not None:
            layer.advance(context, state, normalizer, functools.partial(_entering, part, plain_k, old_v, mask))
        count = rule.old_keys(context, queries[late:].to(context.device)).to(q.device)
        mixed = part.combine(numerator[:, :, late:], denominator[:, :, late:], old_numerator, old_denominator, count)
        out = torch.cat([part.read(young[:, :, :late]), mixed], 2)
    else:
        out = part.read(young)
    if rule.min_length and context.start < rule.min_length + context.most_pads:
        out = torch.where((rows < rule.min_length)[:, None, :, None], young, out)
    return out


def _unrotated(context: ForwardContext, rotary: Rotary, x: torch.Tensor, delay: int, first: int) -> torch.Tensor:
    cos, sin = context.inverse_rotation(rotary, delay, first)
    return rotary.rotate(x, cos.to(x.device), sin.to(x.device), rotary.start)


def _entering(part: HybridAttention, plain_k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    features = part.key_map(plain_k)
    return features if mask is None else features * mask[:, None, :, None], v


def _softmax(
    context: ForwardContext, rule: LinearRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator [B, H, T, V] and denominator [B, H, T] float32 of the softmax part of each query."""
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    # Queries that need their own masks: those of padded rows, whose sinks are at other places, and those that see more than a window.
    masked = tokens if context.pads is not None else min(max(rule.min_length - context.start, 0), tokens)
    pieces = []
    keys = context.key_tokens(rule)
    for start in range(0, masked, _MASKED_BLOCK):
        stop = min(start + _MASKED_BLOCK, masked)
        columns = visible_columns(context, rule, k.shape[2], slice(start, stop))
        queries = torch.arange(context.start + start, context.start + stop, device=context.device)
        visible = context.visible(rule, queries, keys[:, columns]).to(q.device)
        pieces.append(softmax_part(q[:, :, start:stop], k[:, :, columns], v[:, :, columns], visible, scaling))
    for start in range(masked, tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, tokens)
        seen = slice(past + stop)
        pieces.append(banded_softmax_part(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], rule.softmax_window, scaling, rule.sinks))
    if len(pieces) == 1:
        return pieces[0]
    numerators, denominators = zip(*pieces, strict=True)
    return torch.cat(numerators, 2), torch.cat(denominators, 2)
