"""Feeding a model the tokens of a text in different ways."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from patchkit import _compat
from patchkit.quality.checks.case import Case, NotJudged
from patchkit.testing import logit_error

# Above this many, a text is fed one by one only where something begins or wraps around.
ONE_BY_ONE = 160
WAYS = "whole, in chunks, and one by one"


def ways(case: Case, length: int) -> list[list[int]]:
    """Numbers of tokens per forward: as a whole without a cache (no numbers) and with one, in chunks, and one by one.

    Some recurrent models start anew with every chunk: left out are ways in which the unpatched model does not agree with itself.
    """
    if length not in case.sound:
        if length <= ONE_BY_ONE:
            chunks, singles = [1, 2, 7, 1, 13], [1]
        else:
            edge = max(1, min(case.reach - 6, length - 12))
            chunks = [1, 2, 97, 1, 61]
            singles = [edge, *[1] * 12, *([length - edge - 24] if length > edge + 24 else []), *[1] * length]
        ways = [[length], cut(chunks, length), cut(singles, length)]
        ids = case.text(length)
        whole = fed(case.plain, ids, [])
        sound = [way for way in ways if logit_error(fed(case.plain, ids, way), whole) <= case.tolerance.differs]
        case.sound[length] = [[], *sound]
    return case.sound[length]


def cut(sizes: Sequence[int], length: int) -> list[int]:
    """These sizes, over and over, up to ``length`` in all."""
    found: list[int] = []
    for size in itertools.cycle(sizes):
        if length == 0:
            return found
        found.append(min(size, length))
        length -= found[-1]
    return found


def cache_of(out: Any) -> Any:
    cache = _compat.cache_of(out)
    if cache is None:
        raise NotJudged("the model returns no cache")
    return cache


def fed(view: Any, ids: torch.Tensor, way: Sequence[int], mask: torch.Tensor | None = None, cache: Any = None) -> torch.Tensor:
    """Logits [B, T, V] of ids [B, T] fed in forwards of these many tokens; as a whole without a cache for none."""
    if not way:
        return view(input_ids=ids, attention_mask=mask, use_cache=False).logits
    logits, end = [], 0
    for size in way:
        start, end = end, end + size
        seen = None if mask is None else mask[:, :end]
        out = view(input_ids=ids[:, start:end], attention_mask=seen, use_cache=True, **{_compat.CACHE: cache})
        cache = cache_of(out)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def padded(texts: Sequence[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch [B, length] of texts [1, T], padded on the left with tokens that must not count, and its mask."""
    rows = [torch.cat([text[:, :1].expand(-1, length - text.shape[1]), text], 1) for text in texts]
    mask = [torch.arange(length, device=text.device)[None] >= length - text.shape[1] for text in texts]
    return torch.cat(rows), torch.cat(mask).long()


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))
