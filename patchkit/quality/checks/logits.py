"""What is promised about logits: beside the model without a patch, beside a definition, and however tokens are fed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from patchkit import api
from patchkit.errors import PatchError
from patchkit.patch import Patch, Promises
from patchkit.quality.checks.case import BEYOND, LONG, Case, NotJudged
from patchkit.quality.checks.feeding import ONE_BY_ONE, WAYS, cut, fed, listed, padded, ways

# A definition runs each query as a text of its own; more tokens than this in all are too many.
_DEFINED_TOKENS = 1 << 16


def same_logits(case: Case, about: str, other: Any) -> None:
    ids = case.text(case.reach + BEYOND)
    case.same(
        about,
        "logits stay the same",
        lambda _: ((fed(case.full, ids, way), fed(other, ids, way)) for way in ways(case, ids.shape[1])),
        f"{ids.shape[1]} tokens, {WAYS}, with the patch and without",
        own_noise=False,
    )


def defined(case: Case, patch: Patch, promise: Promises) -> None:
    length = promise.same_up_to + BEYOND
    if promise.same_up_to * BEYOND > _DEFINED_TOKENS:
        length = promise.same_up_to + max(4, _DEFINED_TOKENS // promise.same_up_to)
    ids = case.text(length)
    expected: list[torch.Tensor] = []

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        facts = next(each for each in api.report(case.full).patches if each.name == patch.name)
        if not expected:
            assert promise.definition is not None
            expected.append(promise.definition(case.without(patch), ids, facts))
        return ((fed(view, ids, way), expected[0]) for way in ways(case, ids.shape[1]))

    detail = f"{ids.shape[1]} tokens, {WAYS}, and worked out by definition"
    case.same(patch.spec, "logits are those of the definition", pairs, detail, own_noise=False)


def any_feeding(case: Case) -> None:
    if not all(promise.any_feeding for promise in case.promises.values()):
        return
    lengths = [case.reach + BEYOND]
    if case.longest is None and max(case.reach, case.wrap) <= LONG:
        lengths.append(2 * max(case.reach, case.wrap) + 8)
    for ids in (case.text(length) for length in lengths):

        def pairs(view: Any, ids: torch.Tensor = ids) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
            found = ways(case, ids.shape[1])[1:]
            if not found:
                raise NotJudged("the unpatched model gives other logits for other ways")
            whole = fed(view, ids, [])
            return ((fed(view, ids, way), whole) for way in found)

        case.same("all", "any way of feeding is the same", pairs, f"{ids.shape[1]} tokens, {WAYS}")


def causal(case: Case) -> None:
    ids = case.text(case.reach + BEYOND)
    length = ids.shape[1]
    ends = sorted({1, length // 3, length - 8, length - 1} & set(range(1, length)))

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        for way in ([], [length], cut([17, 5], length)):
            plain = fed(view, ids, way)
            for end in ends:
                changed = ids.clone()
                changed[:, end:] = ids.flip(1)[:, : length - end]
                changed[:, end] = ids[:, end - 1] if ids[0, end - 1] != ids[0, end] else ids[:, 0]
                yield fed(view, changed, way)[:, :end], plain[:, :end]

    case.same("all", "no token sees a later one", pairs, f"{length} tokens, those from {listed(ends)} on exchanged")


def padded_rows(case: Case) -> None:
    length = case.text(case.reach + BEYOND).shape[1]
    pads = [pad for pad in (0, 3, 11) if pad < length]
    texts = [case.text(length - pad, number) for number, pad in enumerate(pads)]

    def pairs(view: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        batch, mask = padded(texts, length)
        for way in ([], cut([13, 1, 1, 5], length) if length <= ONE_BY_ONE else cut([case.reach, 1, 1, 1, length], length)):
            try:
                logits = fed(view, batch, way, mask)
            except PatchError as refusal:
                raise NotJudged(f"refused: {refusal}") from refusal
            for row, (pad, text) in enumerate(zip(pads, texts, strict=True)):
                yield logits[row : row + 1, pad:], fed(view, text, [])

    case.same("all", "a padded row is the row alone", pairs, f"rows of {length} tokens, {listed(pads)} of them padding on the left")
