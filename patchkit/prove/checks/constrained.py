"""Check that text under a grammar stays the same with a patch."""

from __future__ import annotations

import functools
from typing import Any

import torch

from patchkit.grammar.library import is_installed
from patchkit.grammar.processor import Grammar
from patchkit.grammar.vocabulary import Vocabulary, vocabulary_of_bytes
from patchkit.prove.checks.bounds import for_logits, judged
from patchkit.prove.checks.case import Case, NotJudged
from patchkit.prove.checks.generating import generated, padded_prompts, prompts
from patchkit.prove.checks.same_tokens import DivergentText, divergence
from patchkit.prove.proof import Check

PROMISE = "constrained text equals constrained plain text"
# Choices, and between them text that is forced.
_PATTERN = "[a-m]{3,9}forced[b-y]{2,5}(on|off)again[a-z]{1,4}end"
_LETTERS = 26


def constrained(case: Case) -> None:
    """Greedy texts of a patched model under a grammar are those of the model without the patch."""
    for patch, promise in case.promises.items():
        if promise.same_tokens:
            case.check(patch.spec, PROMISE, functools.partial(_same, case, patch.spec, case.without(patch)))


def _same(case: Case, about: str, other: Any) -> Check:
    if not is_installed():
        raise NotJudged("llguidance is not installed: pip install 'patchkit[grammar]'")
    grammar = Grammar.regex(_PATTERN, _words(case.vocabulary, case.pad))
    calls: list[tuple[torch.Tensor, torch.Tensor | None]] = [(prompt, None) for prompt in prompts(case)[:2]]
    batch = padded_prompts(case)
    calls += [batch] if batch else []
    worst, compared, diverged = 0.0, 0, 0
    try:
        for ids, mask in calls:
            expected, actual = (generated(case, view, ids, mask, case.pad, logits_processor=[grammar]) for view in (other, case.full))
            compared += expected.numel() - ids.numel()
            for row in range(len(ids)):
                pads = 0 if mask is None else int((mask[row] == 0).sum())
                masked = functools.partial(_masked, grammar, ids.shape[1] - pads)
                texts = expected[row, pads:], actual[row, pads:]
                margin = divergence(case, other, "a text under a grammar", *texts, ids.shape[1] - pads, case.pad, masked)
                worst, diverged = max(worst, margin or 0.0), diverged + (margin is not None)
    except DivergentText as wrong:
        allowed = None if wrong.bound is None else wrong.bound.value
        return Check(
            case.spec, about, PROMISE, "broken", wrong.measured, allowed, "" if wrong.bound is None else wrong.bound.why, str(wrong)
        )
    _, bound = judged(worst, for_logits(case))
    detail = f"{compared} tokens under a regular expression, alone and in a padded batch; {diverged} texts diverge at near ties"
    return Check(case.spec, about, PROMISE, "kept", worst, bound.value, bound.why, detail)


def _words(size: int, end: int) -> Vocabulary:
    """Every token of a model as a word of letters, all different: no tokenizer is needed to compare texts."""
    words = []
    for i in range(size):
        letters = ""
        while i >= 0:
            letters, i = chr(ord("a") + i % _LETTERS) + letters, i // _LETTERS - 1
        words.append(letters.encode())
    words[end] = b"<end>"
    return vocabulary_of_bytes(words, [end])


def _masked(grammar: Grammar, prompt: int, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Scores [1, V] as the grammar leaves them; forbidden tokens get the lowest finite score there is."""
    found = grammar.for_row(0, 1, prompt)(ids, scores)
    return found.masked_fill(found.isinf(), float(scores.min()))
