"""What is promised about `generate`: it says what forwards say, and ends where it has to."""

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
# A processor, with which patches that judge tokens do it another way.
PENALTY: dict[str, Any] = {"repetition_penalty": 1.3}


def prompts(case: Case) -> list[torch.Tensor]:
    """Texts to continue; a part of each comes twice, so that there is something to copy."""
    length = 24 if case.longest is None else max(1, min(24, case.longest - NEW_TOKENS))
    texts = [case.text(length, number) for number in range(3)]
    return [torch.cat([text, text[:, : length // 2]], 1) for text in texts[:2]] + texts[2:]


def padded_prompts(case: Case) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The prompts as a padded batch, and its mask; None where the patches refuse padding or the unpatched model counts it."""
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
    for way in ([], [batch.shape[1] - 1, 1]):
        for row, text in zip(torch.cat(list(fed(case.plain, batch, way, mask)), 1), prompts(case), strict=True):
            if logit_error(row[None, -text.shape[1] :], next(fed(case.plain, text, []))) > case.tolerance.differs:
                return None
    return batch, mask


def generated(
    case: Case, view: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, eos: int | list[int] | None = None, **options: Any
) -> Any:
    """What greedy `generate` gives for ids [B, T]: [B, T + new tokens], or what ``options`` ask for."""
    mask = torch.ones_like(ids) if mask is None else mask
    out: Any = view.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, eos_token_id=eos, **options)
    return out


def step_logits(
    view: Any, text: torch.Tensor, prompt: int, mask: torch.Tensor | None = None, start: int | None = None
) -> Iterator[torch.Tensor]:
    """Scores [B, V] in float32 of each new token of texts [B, T] after ``prompt`` tokens, in forwards as `generate` makes them.

    Args:
        mask: [B, prompt], of the prompts.
        start: the first new token that is wanted, by its place in the text.
    """
    count = text.shape[1] - prompt
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), count - 1)], 1)
    at = torch.arange((prompt if start is None else start) - 1, text.shape[1] - 1)
    for piece in fed(view, text[:, :-1], [prompt, *[1] * (count - 1)], mask, at=at):
        yield piece[:, -1].float()


def margin_of(scores: torch.Tensor, tokens: torch.Tensor) -> float:
    """How far logits [B, V] have to be off for ``tokens`` [B] to be the likeliest: half of what they are below the best.

    Relative to a tenth of the largest logit where that exceeds 10, as differences of logits are; infinite if not a number.
    """
    below = scores.max(-1).values - scores.gather(-1, tokens[:, None])[:, 0]
    found = (below / 2 / (scores.abs().amax(-1) / 10).clamp(min=1.0)).max().item()
    return found if math.isfinite(found) else math.inf


def greedy(case: Case) -> None:
    """Every new token is the likeliest of the patched model's own forwards over the text so far."""
    promise = "generate says what forwards say"

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
    """A text ends at its end token and not before, also where that comes in the middle of what is accepted at once."""
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
                    said = f"{len(new)} new tokens, where the end comes as number {count}" if end in new else f"{len(new)} new tokens"
                    return Check(case.spec, "all", promise, "broken", detail=f"{said} ({options or 'greedy'})")
        # Here the end comes in the middle of what a patch may draft and accept at once.
        prompt, end = case.cycle.repeat(3)[None], int(case.cycle[-2])
        with going_round(case.cycle, case.full):
            new = generated(case, case.full, prompt, None, end)[0, prompt.shape[1] :].tolist()
        ended, compared = ended + (end in new), compared + 1
        if end in new[:-1]:
            return Check(case.spec, "all", promise, "broken", detail=f"{len(new)} new tokens, the end is number {new.index(end) + 1}")
        if not ended:
            raise NotJudged("no text came to its end token")
        return Check(case.spec, "all", promise, "kept", detail=f"{ended} of {compared} texts came to an end token")

    case.check("all", promise, run)


@contextlib.contextmanager
def going_round(cycle: torch.Tensor, *views: Any) -> Iterator[None]:
    """Make the successor in ``cycle`` [n] of each of its tokens the likeliest, so that a text which holds them repeats itself."""

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
