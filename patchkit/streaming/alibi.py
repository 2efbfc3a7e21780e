"""ALiBi in a window: biases that are linear in the distance, computed again for the keys that are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit.anatomy.layers import AttentionLayer
from patchkit.errors import StreamError
from patchkit.streaming.rule import LayerRule
from patchkit.streaming.runtime import Runtime

BIAS = "_patchkit_alibi"  # the attribute of an attention module


@dataclass(eq=False)
class Alibi:
    """The rule of a layer that adds a bias linear in the distance (ALiBi, Press et al. 2022) and computes attention itself."""

    runtime: Runtime
    rule: LayerRule
    layer: AttentionLayer


def before_alibi_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the bias and the mask by those of the streaming rule."""
    alibi: Alibi = vars(module)[BIAS]
    context, rule, layer = alibi.runtime.context, alibi.rule, alibi.layer
    if context is None:
        return None
    assert layer.alibi is not None and layer.slopes is not None
    given = kwargs[layer.alibi]
    pads = None if context.pads is None else context.pads.to(given.device)
    tokens, keys = torch.arange(context.start, context.end, device=given.device), context.key_tokens(rule).to(given.device)
    query_row, key_row = context.row_positions(tokens)[:, :, None], (keys if pads is None else keys - pads[:, None])[:, None, :]
    distance = query_row - key_row
    if rule.in_cache:
        distance = torch.where(key_row < rule.sinks, query_row.clamp(max=rule.capacity - 1) - key_row, distance)
    bias = -layer.slopes.to(given.device)[:, None, None] * distance[:, None]  # [B or 1, H, T, n]
    rows = given.shape[0] // len(layer.slopes)  # a model gives one bias per row, or one for all
    if rows == 1 and len(bias) > 1:
        raise StreamError(f"{type(module).__name__} takes one bias for all rows, so a left-padded batch cannot stream: run its rows alone")
    bias = bias.expand(rows, -1, -1, -1).flatten(0, 1).to(given.dtype)
    hidden = ~context.visible(rule, tokens, keys)
    if not layer.mask_is_boolean:
        hidden = torch.zeros(hidden.shape, dtype=given.dtype, device=given.device).masked_fill_(hidden, torch.finfo(given.dtype).min)
    return args, {**kwargs, layer.alibi: bias, "attention_mask": hidden}
