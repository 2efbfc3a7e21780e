"""Checks of logits: equal to those of the model without a patch, independent of chunking and padding, and causal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from patchkit.errors import PatchError
from patchkit.prove.checks.bounds import same
from patchkit.prove.checks.case import LONG, Case
from patchkit.prove.checks.compare import Pieces
from patchkit.prove.checks.feeding import ONE_BY_ONE, NotJudged, cut, fed, listed, padded

CHUNKINGS = "whole, in chunks, and one by one"


def same_logits(case: Case) -> None:
    """Check that logits are those of the model without the patch; without patches, those of another view."""
    others = {patch.spec: case.without(patch) for patch, promise in case.promises.items() if promise.same_logits}
    for about, other in others.items() if case.patches else [("all", case.twin())]:
        _compared(case, about, "logits stay the same", other, case.probe)


def short_texts(case: Case) -> None:
    """Check that sequences in which a patch does not act yet have the logits of the model without it."""
    for patch, promise in case.promises.items():
        if promise.same_up_to:
            _compared(case, patch.spec, "short texts are unpatched", case.without(patch), promise.same_up_to)


def _compared(case: Case, about: str, promise: str, other: Any, length: int) -> None:
    ids = case.sequence(length)
    at = case.watched(ids.shape[1])

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        return ((fed(case.full, ids, chunks, at=at), fed(other, ids, chunks, at=at)) for chunks in case.chunkings(ids.shape[1]))

    same(case, about, promise, pairs, f"{at_of(ids, at)}, {CHUNKINGS}, with the patch and without", of_any_view=False)


def any_feeding(case: Case) -> None:
    """Check that every chunking gives the logits of a whole sequence without a cache; short sequences, and longer than the window."""
    lengths = [case.probe]
    if case.longest is None and max(case.reach, case.wrap) <= LONG:
        lengths.append(2 * max(case.reach, case.wrap) + 8)
    for ids in (case.sequence(length) for length in lengths):
        at = case.watched(ids.shape[1])

        def pairs(view: Any, ids: torch.Tensor = ids, at: torch.Tensor | None = at) -> Iterable[tuple[Pieces, Pieces]]:
            others = case.chunkings(ids.shape[1])[1:]
            if not others:
                raise NotJudged("the unpatched model gives other logits in other chunkings")
            whole = list(fed(view, ids, [], at=at))
            # In a sequence this long, one forward with a cache tests nothing that chunks do not.
            return (
                (fed(view, ids, chunks, at=at), whole)
                for chunks in others
                if case.thorough or len(chunks) > 1 or ids.shape[1] == case.probe
            )

        same(case, "all", "any chunking gives the same logits", pairs, f"{at_of(ids, at)}, {CHUNKINGS}")


def causal(case: Case) -> None:
    """Check that logits do not change when later tokens are exchanged."""
    ids = case.sequence(case.probe)
    length = ids.shape[1]
    ends = sorted({1, length // 3, length - 8, length - 1} & set(range(1, length)))
    at = case.watched(length)

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        for chunks in ([], [length], cut([17, 5], length)):
            plain = list(fed(view, ids, chunks, at=at))
            for end in ends:
                changed = ids.clone()
                changed[:, end:] = ids.flip(1)[:, : length - end]
                changed[:, end] = ids[:, end - 1] if ids[0, end - 1] != ids[0, end] else ids[:, 0]
                before = end if at is None else int((at < end).sum())
                yield _first(fed(view, changed, chunks, at=at), before), _first(plain, before)

    same(case, "all", "no token sees a later one", pairs, f"{at_of(ids, at)}, those from {listed(ends)} on exchanged")


def padded_rows(case: Case) -> None:
    """Check that rows of a left-padded batch have the logits of the sequences alone."""
    length = case.probe
    pads = [pad for pad in (0, 3, 11) if pad < length]
    texts = [case.sequence(length - pad, number) for number, pad in enumerate(pads)]
    at = case.watched(length, len(texts))

    def pairs(view: Any) -> Iterable[tuple[Pieces, Pieces]]:
        batch, mask = padded(texts, length)
        # Positions of the rows alone.
        wanted = [torch.arange(length - pad) if at is None else at[at >= pad] - pad for pad in pads]
        alone = [list(fed(view, text, [], at=places)) for text, places in zip(texts, wanted, strict=True)]
        for chunks in ([], cut([13, 1, 1, 5], length) if length <= ONE_BY_ONE else cut([case.reach, 1, 1, 1, length], length)):
            try:
                logits = torch.cat(list(fed(view, batch, chunks, mask, at=at)), 1)
            except PatchError as refusal:
                raise NotJudged(f"refused: {refusal}") from refusal
            for row, expected in enumerate(alone):
                yield [logits[row : row + 1, -len(wanted[row]) :]], expected

    same(case, "all", "a padded row is the row alone", pairs, f"rows of {length} tokens, {listed(pads)} of them padding on the left")


def at_of(ids: torch.Tensor, at: torch.Tensor | None) -> str:
    """Number of tokens and, if not all, of compared positions, for a message."""
    return f"{ids.shape[1]} tokens" if at is None else f"{ids.shape[1]} tokens, compared at {len(at)}"


def _first(pieces: Pieces, count: int) -> Pieces:
    """The first ``count`` positions; the others are computed and dropped."""
    for piece in pieces:
        if count > 0:
            yield piece[:, :count]
        count -= piece.shape[1]
