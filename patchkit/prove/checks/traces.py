"""What must leave no trace: texts before, texts beside, and tokens that were taken back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch

from patchkit import _compat
from patchkit.definitions import logits_at
from patchkit.errors import PatchError
from patchkit.prove.checks.bounds import same
from patchkit.prove.checks.case import LONG, Case, NotJudged
from patchkit.prove.checks.compare import Pieces
from patchkit.prove.checks.feeding import cache_after, cut, fed, listed
from patchkit.prove.proof import Check

# More tokens than any cache keeps on record for taking back.
_RECORDED = 300
# Tokens fed after others were taken back.
_REST = 8


def runs(case: Case) -> None:
    """The patched model runs at all; what it says of the first text that it ever sees is kept for `not_mixed`."""

    def run() -> Check | None:
        ids = case.text(case.probe, 1)
        case.first = logits_at(case.full, ids, case.watched(case.probe), use_cache=True)
        return None

    case.check("all", "the patched model runs", run)


def not_mixed(case: Case) -> None:
    """The first text comes again after another, and is as it was."""
    if case.first is None:
        return
    first, ids, at = case.first, case.text(case.probe, 1), case.watched(case.probe)

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        cache = _used_cache(case)
        yield [logits_at(case.full, ids, at, use_cache=True)], [first]
        if cache is not None:
            cache.reset()
            yield fed(case.full, ids, case.ways(ids.shape[1])[-1], cache=cache, at=at), [first]

    same(case, "all", "a text after others is as in a fresh model", pairs, "also with a cache that was reset", of_any_view=False)


def _used_cache(case: Case) -> Any:
    """A cache of the patches' own that has seen padding, a recorded past, and positions that began anew; None if they have none."""
    length = max(case.reach, case.wrap) + 5 if case.longest is None and case.reach <= LONG else case.reach + 9
    ids = case.text(length, 2)
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] >= min(3, ids.shape[1] - 1)).long()
    end = max(1, ids.shape[1] - 3)
    try:
        cache = cache_after(case.full, ids[:, :end], mask[:, :end])
    except PatchError:  # padding is refused
        mask = torch.ones_like(mask)
        cache = cache_after(case.full, ids[:, :end])
    if not (hasattr(cache, "reset") and type(cache).__module__.startswith("patchkit.")):
        return None
    if _croppable(cache):
        cache.activate_past_recording()
    for stop in range(end + 1, ids.shape[1] + 1):
        cache_after(case.full, ids[:, stop - 1 : stop], mask[:, :stop], cache)
    return cache


def interleaved(case: Case) -> None:
    """Two texts through two caches, token by token in turns."""
    texts = [case.text(case.probe, number) for number in (1, 3)]
    half, at = case.probe // 2, case.watched(case.probe, len(texts))
    way = [half, *[1] * (case.probe - half)]

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        whole = [list(fed(view, text, [], at=at)) for text in texts]
        parts: list[list[torch.Tensor]] = [[] for _ in texts]
        for turn in itertools.zip_longest(*(fed(view, text, way, at=at) for text in texts)):
            for mine, piece in zip(parts, turn, strict=True):
                mine.append(piece)
        yield from zip(parts, whole, strict=True)

    same(case, "all", "two texts in turns do not mix", pairs, "two caches, token by token in turns")


def taken_back(case: Case) -> None:
    """Tokens are fed and taken back, and the text goes on as if they had not been."""
    length = case.probe
    # Tokens fed before the past is recorded, and before the draft.
    places = [(kept, kept) for kept in sorted({3, max(3, case.reach - 2), max(3, length - 20)})]
    if case.longest is None and case.reach <= LONG:
        places.append((case.reach + 3, max(case.reach + _RECORDED, case.wrap - 2)))
    ids, other = case.text(max(length, places[-1][1] + _REST)), case.text(length, 2)
    wanted = sorted({kept + i for _, kept in places for i in range(_REST)} & set(range(ids.shape[1])))

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        whole = torch.cat(list(fed(view, ids, [], at=torch.tensor(wanted))), 1)
        for (begun, kept), draft in itertools.product(places, ([5], [1, 1, 1])):
            cache = cache_after(view, ids[:, :begun])
            if not _croppable(cache):
                raise NotJudged(f"its {type(cache).__name__} cannot take tokens back")
            cache.activate_past_recording()
            if begun < kept:
                cache_after(view, ids[:, begun:kept], cache=cache)
            count = sum(draft)
            for _ in fed(view, other[:, :count], draft, cache=cache):
                pass
            cache.crop(-count)
            rest = ids[:, kept : kept + _REST]
            start = wanted.index(kept)
            yield fed(view, rest, cut([1, 3], rest.shape[1]), cache=cache), [whole[:, start : start + rest.shape[1]]]

    after = listed(kept for _, kept in places)
    same(case, "all", "tokens taken back leave no trace", pairs, f"after {after} tokens, 5 at once or 3 one by one")


def _croppable(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return layers is not None and all(map(_compat.takes_tokens_back, layers))
