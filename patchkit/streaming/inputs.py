"""Checks of a streaming forward's inputs: padding on the left, positions that go up by one."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.errors import StreamError
from patchkit.streaming.stream import Stream


def notice_padding(stream: Stream, attention_mask: Any, batch: int, tokens: int) -> None:
    """Read each row's left padding off the 2-D mask [B, seen + T] and set it in ``stream``.

    Raises:
        StreamError: the mask is not 2-D, has another shape, hides tokens between others, or contradicts earlier calls.
    """
    if attention_mask is None:
        return
    if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
        raise StreamError(
            "a streaming model takes a 2-D attention_mask [batch, tokens] of zeros and ones, or none: it makes the 4-D mask itself"
        )
    # Once every row has begun and none has ended, later steps of one token only add to the rows.
    if tokens == 1 and stream.seen > 0 and not stream.must_read_mask:
        return
    end = stream.seen + tokens
    if attention_mask.shape != (batch, end):
        raise StreamError(f"attention_mask has shape {tuple(attention_mask.shape)}: it must cover all tokens so far, ({batch}, {end})")
    real = attention_mask.bool()
    if bool(real.all()):
        stream.must_read_mask = False
        if stream.pads is not None and bool((stream.pads > 0).any()):
            raise StreamError(
                "attention_mask shows tokens that earlier calls gave as padding: pass the same mask, extended by the new tokens"
            )
        return
    begun = real.cumsum(1) > 0
    pads = (~begun).sum(1)
    inside = begun & ~real
    ended = inside & (real.flip(1).cumsum(1).flip(1) == 0)
    if bool((inside & ~ended).any()):
        raise StreamError(
            "attention_mask has zeros between tokens: streaming takes padding on the left, or on the right of the last tokens"
        )
    if stream.seen and stream.pads is None and bool((pads > 0).any()) and bool((pads < stream.seen).any()):
        raise StreamError("attention_mask hides tokens that earlier calls gave as real: pass the same mask, extended by the new tokens")
    stream.must_read_mask = bool((~real[:, -1]).any())
    if bool((pads > 0).any()):
        stream.set_pads(pads)


def refuse_packing(position_ids: Any, attention_mask: Any, seen: int, tokens: int) -> None:
    """Refuse positions of a forward of several tokens that do not go up by one. Other given positions are replaced, not used.

    Args:
        position_ids: [B, T], [axes, B, T], or None.
        attention_mask: [B, seen + T] or None; positions of padding are not checked.

    Raises:
        StreamError: positions restart (packed sequences), jump, or have several axes that differ (images).
    """
    if position_ids is None or tokens == 1:
        return
    if position_ids.ndim == 3:
        if not bool((position_ids == position_ids[:1]).all()):
            raise StreamError("position_ids with several axes (images or video) cannot stream: only text has one position per token")
        position_ids = position_ids[0]
    steps = position_ids.diff(dim=-1)
    wrong = steps != 1
    if attention_mask is not None:
        real = attention_mask[:, seen : seen + tokens].bool()
        wrong = wrong & real[:, 1:] & real[:, :-1]
    if bool(wrong.any()):
        raise StreamError(
            "position_ids restart or jump within a row (packed sequences?): a stream's positions go up by one. Feed one sequence a row"
        )
