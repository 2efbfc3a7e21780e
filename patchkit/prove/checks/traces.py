"""Checks that nothing leaks between sequences: earlier ones, interleaved ones, and tokens that were rolled back."""

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

# More tokens than any cache records for rollback.
_RECORDED = 300
# Tokens fed after a rollback.
_REST = 8


def runs(case: Case) -> None:
    """Check that the patched model runs; its logits of the first sequence are kept for `not_mixed`."""

    def run() -> Check | None:
        ids = case.sequence(case.probe, 1)
        case.first = logits_at(case.full, ids, case.watched(case.probe), use_cache=True)
        return None

    case.check("all", "the patched model runs", run)


def not_mixed(case: Case) -> None:
    """Check that the first sequence, run again after others, has the same logits."""
    if case.first is None:
        return
    first, ids, at = case.first, case.sequence(case.probe, 1), case.watched(case.probe)

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        cache = _used_cache(case)
        yield [logits_at(case.full, ids, at, use_cache=True)], [first]
        if cache is not None:
            cache.reset()
            yield fed(case.full, ids, case.chunkings(ids.shape[1])[-1], cache=cache, at=at), [first]

    same(case, "all", "a text after others is as in a fresh model", pairs, "also with a cache that was reset", of_any_view=False)


def _used_cache(case: Case) -> Any:
    """A used cache of the patches' own kind: padded, with a recorded past and rebased positions; None if they have no such kind."""
    length = max(case.reach, case.wrap) + 5 if case.longest is None and case.reach <= LONG else case.reach + 9
    ids = case.sequence(length, 2)
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
    """Check that two sequences through two caches, interleaved token by token, have the logits of each alone."""
    texts = [case.sequence(case.probe, number) for number in (1, 3)]
    half, at = case.probe // 2, case.watched(case.probe, len(texts))
    chunks = [half, *[1] * (case.probe - half)]

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        whole = [list(fed(view, text, [], at=at)) for text in texts]
        parts: list[list[torch.Tensor]] = [[] for _ in texts]
        for pieces in itertools.zip_longest(*(fed(view, text, chunks, at=at) for text in texts)):
            for mine, piece in zip(parts, pieces, strict=True):
                mine.append(piece)
        yield from zip(parts, whole, strict=True)

    same(case, "all", "interleaved texts do not mix", pairs, "two caches, interleaved token by token")


def rolled_back(case: Case) -> None:
    """Check that after tokens were fed and rolled back, logits are as if they had never been fed."""
    length = case.probe
    # Tokens fed before the past is recorded, and before the draft.
    places = [(kept, kept) for kept in sorted({3, max(3, case.reach - 2), max(3, length - 20)})]
    if case.longest is None and case.reach <= LONG:
        places.append((case.reach + 3, max(case.reach + _RECORDED, case.wrap - 2)))
    ids, other = case.sequence(max(length, places[-1][1] + _REST)), case.sequence(length, 2)
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
    same(case, "all", "rolled back tokens leave no trace", pairs, f"after {after} tokens, 5 at once or 3 one by one")


def _croppable(cache: Any) -> bool:
    layers = getattr(cache, "layers", None)
    return layers is not None and all(map(_compat.takes_tokens_back, layers))
