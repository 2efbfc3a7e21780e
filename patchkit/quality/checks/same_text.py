"""That greedy text stays the same with a patch and without."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from patchkit.quality.checks.case import Case
from patchkit.quality.checks.feeding import padded
from patchkit.quality.checks.generating import PENALTY, generated, going_round, prompts
from patchkit.quality.proof import Check
from patchkit.testing import logit_error


def same_tokens(case: Case, about: str, other: Any) -> None:
    promise = "greedy text stays the same"

    def run() -> Check:
        ties = compared = 0
        longest = max(prompt.shape[1] for prompt in prompts(case))
        batch, mask = padded(prompts(case), longest)
        plain = [generated(case, other, prompt) for prompt in prompts(case)]
        calls: list[tuple[str, torch.Tensor, torch.Tensor | None, int | None, dict[str, Any]]] = []
        for prompt, text in zip(prompts(case), plain, strict=True):
            new = text[0, prompt.shape[1] :].tolist()
            # A token that comes late for the first time: the text has to end there.
            end = max(new, key=new.index)
            calls += [("a text", prompt, None, None, {}), ("a text that ends", prompt, None, end, {})]
        calls += [("a padded batch", batch, mask, None, {}), ("a padded batch with an end", batch, mask, end, {})]
        calls += [("a text without repetitions", prompts(case)[0], None, None, PENALTY)]
        for what, ids, rows, eos, options in calls:
            expected, actual = (generated(case, view, ids, rows, eos, **options) for view in (other, case.full))
            compared += expected.numel() - ids.numel()
            for row in range(len(ids)):
                pads = 0 if rows is None else int((rows[row] == 0).sum())
                wrong = _parting(case, other, expected[row, pads:], actual[row, pads:], ids.shape[1] - pads, eos, options)
                if isinstance(wrong, str):
                    return Check(case.spec, about, promise, "broken", detail=f"{what}: {wrong}")
                ties += wrong
        # One row repeats itself, and its drafts stand; the other, which is padded, keeps its own pace.
        own = prompts(case)[-1]
        batch, mask = padded([case.cycle.repeat(longest)[None, :longest], own], longest)
        with going_round(case.cycle, other, case.full):
            asked = {"return_dict_in_generate": True, "output_logits": True}
            expected, actual = (generated(case, view, batch, mask, **asked) for view in (other, case.full))
        compared += expected.sequences.numel() - batch.numel()
        for row in range(len(batch)):
            # Where tokens have parted at a near tie the texts are two.
            alike = _first_difference(expected.sequences[row], actual.sequences[row]) or expected.sequences.shape[1] - 1
            for left, right in itertools.islice(zip(actual.logits, expected.logits, strict=False), alike - longest + 1):
                error = logit_error(left[row], right[row])
                if error > case.tolerance.differs:
                    return Check(case.spec, about, promise, "broken", error, detail="logits of rows that accept more drafts than others")
        detail = f"{compared} tokens: texts alone and in a padded batch, with an end and without"
        if ties:
            detail += f"; {ties} texts part where two logits are closer than rounding in {case.proof.dtype}"
        return Check(case.spec, about, promise, "kept", detail=detail)

    case.check(about, promise, run)


def _parting(
    case: Case, view: Any, expected: torch.Tensor, actual: torch.Tensor, prompt: int, eos: int | None, options: dict[str, Any]
) -> str | bool:
    """Whether a text parts from the expected one at a near tie; in words what is wrong if it parts elsewhere.

    After that the texts are two, and each further token has to be the likeliest or nearly so after its own text.
    """
    first = _first_difference(expected, actual)
    if first is None:
        return False
    ends = [text[prompt:].tolist().index(eos) + prompt + 1 if eos in text[prompt:].tolist() else len(text) for text in (expected, actual)]
    if first >= ends[0] or first >= ends[1]:
        return f"one ends after {ends[1] - prompt} new tokens, the other after {ends[0] - prompt}"
    logits = view(input_ids=actual[None, : ends[1]]).logits[0, first - 1 : -1].float()
    if options:
        penalty = RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])
        logits = torch.cat([penalty(actual[None, : first + i], row[None].clone()) for i, row in enumerate(logits)])
    noise = 2 * case.tolerance.logits * max(1.0, logits.abs().max().item() / 10)
    best = logits.max(1).values
    gaps = best - logits.gather(1, actual[first : ends[1], None])[:, 0]
    gaps[0] = torch.maximum(gaps[0], best[0] - logits[0, expected[first]])
    if bool((gaps > noise).any()):
        return f"new token {first - prompt} differs, and a logit is {gaps.max().item():.3g} below the best"
    return True


def _first_difference(expected: torch.Tensor, actual: torch.Tensor) -> int | None:
    shortest = min(len(expected), len(actual))
    wrong = (expected[:shortest] != actual[:shortest]).nonzero()
    if len(wrong):
        return int(wrong[0])
    return None if len(expected) == len(actual) else shortest
