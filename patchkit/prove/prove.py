"""`patchkit prove`: check that patches keep their promises, on this model and these documents.

* A patch declares its promises (`patchkit.patch.Promises`); nothing here depends on a particular patch.
* Each promise is checked against the same model without that one patch, in the same process and over the same weights.
* What every patched model has to keep is checked for all patches together: causality, no mixing of rows and sequences, exact rollback,
  and complete removal.
* Two sets of patches are checked: the given ones and, if these act on long sequences only, the same patches with options under which
  they act on short ones (`Patch.exercised`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from patchkit.anatomy.target import Target
from patchkit.api import patch_model
from patchkit.measure.perplexity import TextError
from patchkit.patch import Patch
from patchkit.prove.checks.case import Advance, Case, spec_of
from patchkit.prove.checks.feeding import cache_after, fed
from patchkit.prove.checks.plan import STEPS, UnknownPromise, wanted
from patchkit.prove.checks.quality import Quality
from patchkit.prove.checks.speed import timed, timing_work
from patchkit.prove.checks.traces import runs
from patchkit.prove.checks.work import Work
from patchkit.prove.proof import Proof

# Tokens of the forward that is timed for the estimate.
_TIMED_TOKENS = 256


def prove(
    proof: Proof,
    model: PreTrainedModel,
    patches: Sequence[Patch],
    documents: Sequence[Sequence[int] | torch.Tensor],
    passkeys: Callable[[int, int], tuple[list[int], int]] | None = None,
    fast: bool = False,
    advance: Advance = lambda what: None,
    only: Sequence[str] | None = None,
) -> None:
    """Check everything and fill ``proof``; after an interruption it holds the checks that were done, and the names of the others.

    Args:
        model: unpatched, in evaluation mode; it is not changed, because views of the same weights are patched.
        patches: none compares the model with itself.
        documents: token ids of each document; each is scored through one cache.
        passkeys: called with a distance in tokens and the number of a trial; returns the ids of a sequence that ends in a passkey which
            was stated that far before, and the number of ids of the passkey.
        fast: check patches only with options for short sequences, use fewer chunks of long ones, and measure less.
        advance: called with a description of the work; ``proof`` holds all earlier results.
        only: names of promises in the report; nothing else is checked, and nothing is timed.

    Raises:
        PatchError: the model cannot be patched with these patches.
        TextError: no document has two tokens.
        UnknownPromise: ``only`` has a name that is not checked, or none that these patches promise.
    """
    names = wanted(only)
    proof.only = None if only is None else list(names)
    texts = [torch.as_tensor(ids, dtype=torch.long).flatten().cpu() for ids in documents]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise TextError("no document has two tokens: give a longer text")
    started = time.perf_counter()
    with torch.no_grad():
        given = Case(proof, model, list(patches), texts, advance, thorough=not fast)
        exercised = [patch.exercised() for patch in patches]
        cases = [given]
        if spec_of(exercised) != spec_of(patches):
            if fast:
                given.before, cases = None, []  # it is only measured, and a snapshot is as large as the model
            cases.append(Case(proof, model, exercised, texts, advance, thorough=not fast))
        try:
            _run(given, cases, names, Quality(given, texts, passkeys))
        finally:
            proof.seconds = round(time.perf_counter() - started, 1)
    proof.complete = True


def reach_of(model: PreTrainedModel, patches: Sequence[Patch]) -> int:
    """Number of tokens beyond which every patch acts on this model.

    Raises:
        PatchError: the model cannot be patched with these patches.
    """
    target = Target(model, tuple(patches), lambda view, chosen: patch_model(view, *chosen, verbose=False))
    for patch in patches:
        patch.check(target)
    return max((patch.promises(target).same_up_to for patch in patches), default=0)


def _run(given: Case, cases: list[Case], names: Sequence[str], quality: Quality) -> None:
    proof = given.proof
    planned = [(case, step) for case in cases for step in STEPS if step.promise in names and step.applies(case)]
    measured = [name for name in quality.promises if name in names]
    if not planned and not measured:
        raise UnknownPromise(f"{given.spec} makes none of the requested promises ({'; '.join(names)}): leave `only` out, or ask for more")
    proof.not_checked = [_named(case, step.promise) for case, step in planned] + [_named(given, name) for name in measured]
    work = sum((step.work(case) for case, step in planned), quality.work if measured else Work(0))
    if proof.only is None:
        work += timing_work(given) + (Work(0) if quality.passkeys is None else quality.passkey_work)
    given.advance("estimating how long this takes")
    proof.estimated_seconds = _seconds(given, work)
    for case in cases:
        runs(case)
    for case, step in planned:
        step.run(case)
        proof.not_checked.remove(_named(case, step.promise))
    if measured:
        given.check("all", "quality is measured", lambda: quality.run(measured))
        proof.not_checked = []
    if proof.only is None:
        if quality.passkeys is not None:
            given.check("all", "passkeys are measured", quality.measure_passkeys)
        given.check("all", "speed is measured", lambda: timed(given))


def _named(case: Case, promise: str) -> str:
    return f"{promise} [{case.spec}]"


def _seconds(case: Case, work: Work) -> float:
    """Estimate seconds of work from the time of a forward of one token, and of one of many."""
    one, many = (_forward_seconds(case, length) for length in (1, _TIMED_TOKENS))
    return round(work.steps * one + work.tokens * many / _TIMED_TOKENS, 1)


def _forward_seconds(case: Case, length: int) -> float:
    ids = case.sequence(length)
    list(fed(case.plain, ids[:, :1], []))  # the first one is slower
    started = time.perf_counter()
    cache_after(case.plain, ids)
    return time.perf_counter() - started
