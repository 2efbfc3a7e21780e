"""Check that greedy text is the same with and without a patch."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from patchkit.prove.checks.bounds import Bound, for_logits, judged, rounding_noise
from patchkit.prove.checks.case import Case
from patchkit.prove.checks.feeding import padded
from patchkit.prove.checks.generating import PENALTY, generated, margin_of, prompts, repeating, step_logits
from patchkit.prove.proof import Check
from patchkit.tolerance import logit_error

_PROMISE = "greedy text stays the same"


class DivergentText(Exception):
    """A sequence is not the expected one; the message describes the difference."""

    def __init__(self, message: str, measured: float | None = None, bound: Bound | None = None) -> None:
        super().__init__(message)
        self.measured, self.bound = measured, bound


def same_tokens(case: Case) -> None:
    """Check that a patched model generates the tokens of the model without the patch; without patches, those of another view."""
    others = {patch.spec: case.without(patch) for patch, promise in case.promises.items() if promise.same_tokens}
    for about, other in others.items() if case.patches else [("all", case.twin())]:
        case.check(about, _PROMISE, functools.partial(_same, case, about, other))


def _same(case: Case, about: str, other: Any) -> Check:
    try:
        divergences, compared = _texts(case, other)
        compared += _uneven_rows(case, other)
    except DivergentText as wrong:
        bound = wrong.bound or Bound(0.0, "")
        allowed = None if wrong.bound is None else bound.value
        return Check(case.spec, about, _PROMISE, "broken", wrong.measured, allowed, bound.why, str(wrong))
    worst = max(divergences, default=0.0)
    _, bound = judged(worst, for_logits(case))
    detail = f"{compared} tokens: sequences alone and in a padded batch, with an end token and without"
    if divergences:
        detail += (
            f"; {len(divergences)} sequences diverge at a near tie: two tokens are equally likely if logits are off by the difference given"
        )
    return Check(case.spec, about, _PROMISE, "kept", worst, bound.value, bound.why, detail)


def _texts(case: Case, other: Any) -> tuple[list[float], int]:
    """Return the least error of logits that explains each divergence, and the number of compared tokens."""
    divergences, compared = [], 0
    longest = max(prompt.shape[1] for prompt in prompts(case))
    batch, mask = padded(prompts(case), longest)
    plain = [generated(case, other, prompt) for prompt in prompts(case)]
    calls: list[tuple[str, torch.Tensor, torch.Tensor | None, int | None, dict[str, Any]]] = []
    for prompt, text in zip(prompts(case), plain, strict=True):
        new = text[0, prompt.shape[1] :].tolist()
        # The token that first occurs latest: the sequence has to end there.
        end = max(new, key=new.index)
        calls += [("a text", prompt, None, None, {}), ("a text that ends", prompt, None, end, {})]
    calls += [("a padded batch", batch, mask, None, {}), ("a padded batch with an end", batch, mask, end, {})]
    calls += [("a text without repetitions", prompts(case)[0], None, None, PENALTY)]
    for what, ids, rows, eos, options in calls:
        expected, actual = (generated(case, view, ids, rows, eos, **options) for view in (other, case.full))
        compared += expected.numel() - ids.numel()
        processor = RepetitionPenaltyLogitsProcessor(PENALTY["repetition_penalty"]) if options else None
        for row in range(len(ids)):
            pads = 0 if rows is None else int((rows[row] == 0).sum())
            margin = divergence(case, other, what, expected[row, pads:], actual[row, pads:], ids.shape[1] - pads, eos, processor)
            if margin is not None:
                divergences.append(margin)
    return divergences, compared


def _uneven_rows(case: Case, other: Any) -> int:
    """Compare logits where one row repeats itself, so that its drafts are accepted, and a padded row advances more slowly.

    Returns the number of compared tokens.
    """
    longest = max(prompt.shape[1] for prompt in prompts(case))
    batch, mask = padded([case.cycle.repeat(longest)[None, :longest], prompts(case)[-1]], longest)
    asked = {"return_dict_in_generate": True, "output_logits": True}
    with repeating(case.cycle, other, case.full):
        expected, actual = (generated(case, view, batch, mask, **asked) for view in (other, case.full))
    for row in range(len(batch)):
        # After a divergence at a near tie the sequences cannot be compared.
        alike = _first_difference(expected.sequences[row], actual.sequences[row]) or expected.sequences.shape[1] - 1
        for left, right in itertools.islice(zip(actual.logits, expected.logits, strict=False), alike - longest + 1):
            error = logit_error(left[row], right[row])
            kept, bound = judged(error, _of_rows(case))
            if not kept:
                raise DivergentText("logits of rows that accept more drafts than others", error, bound)
    return int(expected.sequences.numel() - batch.numel())


def _of_rows(case: Case) -> Any:
    yield Bound(case.tolerance.differs, f"more than rounding of {case.proof.dtype}")
    if case.rounding:
        yield rounding_noise(case, single_logits=True)


def divergence(
    case: Case,
    view: Any,
    what: str,
    expected: torch.Tensor,
    actual: torch.Tensor,
    prompt: int,
    eos: int | None,
    processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
) -> float | None:
    """Least error of logits that explains where a sequence diverges from the expected one; None if it does not diverge.

    After a divergence, each further token has to be the likeliest, or nearly so, after its own sequence.

    Raises:
        DivergentText: the divergence is not at a near tie.
    """
    first = _first_difference(expected, actual)
    if first is None:
        return None
    ends = [text[prompt:].tolist().index(eos) + prompt + 1 if eos in text[prompt:].tolist() else len(text) for text in (expected, actual)]
    if first >= ends[0] or first >= ends[1]:
        raise DivergentText(f"{what}: one ends after {ends[1] - prompt} new tokens, the other after {ends[0] - prompt}")
    margin = 0.0
    for place, scores in enumerate(step_logits(view, actual[None, : ends[1]], prompt, start=first), first):
        if processor is not None:
            scores = processor(actual[None, :place], scores)
        margin = max(margin, margin_of(scores, actual[None, place]))
        if place == first:
            margin = max(margin, margin_of(scores, expected[None, place]))
    kept, bound = judged(margin, for_logits(case))
    if not kept:
        raise DivergentText(
            f"{what}: new token {first - prompt} differs, and logits would have to be off by the difference given", margin, bound
        )
    return margin


def _first_difference(expected: torch.Tensor, actual: torch.Tensor) -> int | None:
    shortest = min(len(expected), len(actual))
    wrong = (expected[:shortest] != actual[:shortest]).nonzero()
    if len(wrong):
        return int(wrong[0])
    return None if len(expected) == len(actual) else shortest
