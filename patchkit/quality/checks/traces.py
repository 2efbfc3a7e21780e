"""What must leave no trace: texts before, texts beside, and tokens that were taken back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import PatchError
from patchkit.quality.checks.case import BEYOND, LONG, Case, NotJudged
from patchkit.quality.checks.feeding import cache_of, cut, fed, listed, ways

# More tokens than any cache keeps on record for taking back.
RECORDED = 300


def not_mixed(case: Case, first: torch.Tensor) -> None:
    """``first``: what the patched model gave for its first text ever; the same text comes again after all others."""
    ids = case.text(case.reach + BEYOND, 1)

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        yield case.full(input_ids=ids).logits, first
        cache = _used_cache(case)
        if cache is not None:
            cache.reset()
            yield fed(case.full, ids, ways(case, ids.shape[1])[-1], cache=cache), first

    case.same("all", "a text after others is as in a fresh model", pairs, "also with a cache that was reset", own_noise=False)


def _used_cache(case: Case) -> Any:
    """A cache of the patches' own that has seen padding, a recorded past, and positions that began anew; None if they have none."""
    length = max(case.reach, case.wrap) + 5 if case.longest is None and case.reach <= LONG else case.reach + 9
    ids = case.text(length, 2)
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] >= min(3, ids.shape[1] - 1)).long()
    end = max(1, ids.shape[1] - 3)
    try:
        cache = _compat.cache_of(case.full(input_ids=ids[:, :end], attention_mask=mask[:, :end], use_cache=True))
    except PatchError:  # padding is refused
        mask = torch.ones_like(mask)
        cache = _compat.cache_of(case.full(input_ids=ids[:, :end], use_cache=True))
    if not (hasattr(cache, "reset") and type(cache).__module__.startswith("patchkit.")):
        return None
    if all(getattr(layer, "is_croppable", False) for layer in cache.layers):
        cache.activate_past_recording()
    for stop in range(end + 1, ids.shape[1] + 1):
        case.full(input_ids=ids[:, stop - 1 : stop], attention_mask=mask[:, :stop], use_cache=True, **{_compat.CACHE: cache})
    return cache


def interleaved(case: Case) -> None:
    texts = [case.text(case.reach + BEYOND, number) for number in (1, 3)]
    half = texts[0].shape[1] // 2

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        whole = [fed(view, text, []) for text in texts]
        begun = [view(input_ids=text[:, :half], use_cache=True) for text in texts]
        caches = [cache_of(out) for out in begun]
        outputs = [[out.logits] for out in begun]
        for start in range(half, texts[0].shape[1]):
            for text, cache, parts in zip(texts, caches, outputs, strict=True):
                parts.append(view(input_ids=text[:, start : start + 1], use_cache=True, **{_compat.CACHE: cache}).logits)
        yield from ((torch.cat(parts, 1), expected) for parts, expected in zip(outputs, whole, strict=True))

    case.same("all", "two texts in turns do not mix", pairs, "two caches, token by token in turns")


def taken_back(case: Case) -> None:
    length = case.text(case.reach + BEYOND).shape[1]
    # Tokens fed before the past is recorded, and before the draft.
    places = [(kept, kept) for kept in sorted({3, max(3, case.reach - 2), max(3, length - 20)})]
    if case.longest is None and case.reach <= LONG:
        places.append((case.reach + 3, max(case.reach + RECORDED, case.wrap - 2)))
    ids, other = case.text(max(length, places[-1][1] + 8)), case.text(length, 2)

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        whole = fed(view, ids, [])
        for (begun, kept), draft in itertools.product(places, ([5], [1, 1, 1])):
            cache = cache_of(view(input_ids=ids[:, :begun], use_cache=True))
            if not all(getattr(layer, "is_croppable", False) for layer in getattr(cache, "layers", [None])):
                raise NotJudged(f"its {type(cache).__name__} cannot take tokens back")
            cache.activate_past_recording()
            if begun < kept:
                fed(view, ids[:, begun:kept], [kept - begun], cache=cache)
            count = sum(draft)
            fed(view, other[:, :count], draft, cache=cache)
            cache.crop(-count)
            rest = ids[:, kept : kept + 8]
            yield fed(view, rest, cut([1, 3], rest.shape[1]), cache=cache), whole[:, kept : kept + rest.shape[1]]

    after = listed(kept for _, kept in places)
    case.same("all", "tokens taken back leave no trace", pairs, f"after {after} tokens, 5 at once or 3 one by one")
