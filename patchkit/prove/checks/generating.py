"""Checks of `generate`: it agrees with forwards, and stops at the end token."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import PatchError
from patchkit.prove.checks.bounds import for_logits, judged
from patchkit.prove.checks.case import Case, NotJudged
from patchkit.prove.checks.feeding import fed, padded
from patchkit.prove.proof import Check
from patchkit.tolerance import logit_error

NEW_TOKENS = 32
# A logits processor, which makes speculation judge tokens by a different code path.
PENALTY: dict[str, Any] = {"repetition_penalty": 1.3}


def prompts(case: Case) -> list[torch.Tensor]:
    """Prompts to continue; in two of them a part is repeated, so that there is something to copy."""
    length = 24 if case.longest is None else max(1, min(24, case.longest - NEW_TOKENS))
    texts = [case.sequence(length, number) for number in range(3)]
    return [torch.cat([text, text[:, : length // 2]], 1) for text in texts[:2]] + texts[2:]


def padded_prompts(case: Case) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prompts as a padded batch, and its mask; None if the patches refuse padding or it changes the unpatched model's logits."""
    if "batch" not in case.once:
        case.once["batch"] = _padded_prompts(case)
    found: tuple[torch.Tensor, torch.Tensor] | None = case.once["batch"]
    return found


def _padded_prompts(case: Case) -> tuple[torch.Tensor, torch.Tensor] | None:
    batch, mask = padded(prompts(case), max(prompt.shape[1] for prompt in prompts(case)))
    try:
        list(fed(case.full, batch, [batch.shape[1] - 1, 1], mask))
    except PatchError:
        return None
    for chunks in ([], [batch.shape[1] - 1, 1]):
        for row, text in zip(torch.cat(list(fed(case.plain, batch, chunks, mask)), 1), prompts(case), strict=True):
            if logit_error(row[None, -text.shape[1] :], next(fed(case.plain, text, []))) > case.tolerance.differs:
                return None
    return batch, mask


def generated(
    case: Case, view: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, eos: int | list[int] | None = None, **options: Any
) -> Any:
    """Output of greedy `generate` for ids [B, T]: ids [B, T + new tokens], or another output as ``options`` ask."""
    mask = torch.ones_like(ids) if mask is None else mask
    out: Any = view.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=eos, **options)
    return out


def step_logits(
    view: Any, text: torch.Tensor, prompt: int, mask: torch.Tensor | None = None, start: int | None = None
) -> Iterator[torch.Tensor]:
    """Logits [B, V] in float32 for each new token of sequences [B, T] after ``prompt`` tokens, by the forwards of plain `generate`.

    Args:
        mask: [B, prompt], of the prompts.
        start: index in the sequence of the first new token that is wanted.
    """
    count = text.shape[1] - prompt
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), count - 1)], 1)
    at = torch.arange((prompt if start is None else start) - 1, text.shape[1] - 1)
    for piece in fed(view, text[:, :-1], [prompt, *[1] * (count - 1)], mask, at=at):
        yield piece[:, -1].float()


def margin_of(scores: torch.Tensor, tokens: torch.Tensor) -> float:
    """Least error of logits [B, V] with which ``tokens`` [B] would be the likeliest: half of their distance from the best.

    Relative to a tenth of the largest logit if that exceeds 10, as in `logit_error`; infinite instead of NaN.
    """
    below = scores.max(-1).values - scores.gather(-1, tokens[:, None])[:, 0]
    found = (below / 2 / (scores.abs().amax(-1) / 10).clamp(min=1.0)).max().item()
    return found if math.isfinite(found) else math.inf


def greedy(case: Case) -> None:
    """Check that every new token is the likeliest of the patched model's own forwards over the sequence so far."""
    promise = "generate agrees with forwards"

    def run() -> Check:
        worst, count, alike = 0.0, 0, 0
        batch = padded_prompts(case)
        for ids, mask in [*((prompt, None) for prompt in prompts(case)), *([batch] if batch else [])]:
            texts = generated(case, case.full, ids, mask)
            for number, scores in enumerate(step_logits(case.full, texts, ids.shape[1], mask)):
                tokens = texts[:, ids.shape[1] + number]
                worst = max(worst, margin_of(scores, tokens))
                count, alike = count + len(tokens), alike + int((scores.argmax(-1) == tokens).sum())
        kept, bound = judged(worst, for_logits(case))
        detail = f"{alike} of {count} new tokens, in a padded batch too, are the likeliest of the same forwards"
        if alike < count:
            detail += "; the others are the likeliest if logits are off by the difference given"
        return Check(case.spec, "all", promise, "kept" if kept else "broken", worst, bound.value, bound.why, detail)

    case.check("all", promise, run)


def ends(case: Case) -> None:
    """Check that a sequence ends at its end token and not before, even if that is in the middle of accepted drafts."""
    promise = "a text ends where it has to"

    def run() -> Check:
        batch, mask = padded_prompts(case) or (prompts(case)[0], None)
        ended = compared = 0
        for options in (dict[str, Any](), PENALTY):
            free = generated(case, case.full, batch, mask, **options)[:, batch.shape[1] :].tolist()
            if any(len(new) != NEW_TOKENS for new in free):
                return Check(case.spec, "all", promise, "broken", detail=f"{len(free[0])} new tokens instead of {NEW_TOKENS}")
            end = max(free[0], key=free[0].index)
            never = next(token for token in itertools.count() if token not in {*itertools.chain(*free), case.pad})
            for new in generated(case, case.full, batch, mask, [never, end], **options)[:, batch.shape[1] :].tolist():
                count = new.index(end) + 1 if end in new else NEW_TOKENS
                ended, compared = ended + (end in new), compared + 1
                if any(token != case.pad for token in new[count:]) or len(new[:count]) < count:
                    found = f"{len(new)} new tokens, although the end is number {count}" if end in new else f"{len(new)} new tokens"
                    return Check(case.spec, "all", promise, "broken", detail=f"{found} ({options or 'greedy'})")
        # Here the end token is in the middle of the drafts that a patch may accept at once.
        prompt, end = case.cycle.repeat(3)[None], int(case.cycle[-2])
        with repeating(case.cycle, case.full):
            new = generated(case, case.full, prompt, None, end)[0, prompt.shape[1] :].tolist()
        ended, compared = ended + (end in new), compared + 1
        if end in new[:-1]:
            return Check(case.spec, "all", promise, "broken", detail=f"{len(new)} new tokens, the end is number {new.index(end) + 1}")
        if not ended:
            raise NotJudged("no sequence reached its end token")
        return Check(case.spec, "all", promise, "kept", detail=f"{ended} of {compared} sequences reached an end token")

    case.check("all", promise, run)


@contextlib.contextmanager
def repeating(cycle: torch.Tensor, *views: Any) -> Iterator[None]:
    """Make the successor in ``cycle`` [n] of each of its tokens the likeliest, so that a sequence with these tokens repeats itself."""

    def prefer(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        logits = output.logits.clone()
        for token, successor in zip(cycle, cycle.roll(-1), strict=True):
            logits[..., successor] += 1000.0 * (ids[:, -logits.shape[1] :] == token)
        output.logits = logits

    hooks = [view.register_forward_hook(prefer, with_kwargs=True) for view in views]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
