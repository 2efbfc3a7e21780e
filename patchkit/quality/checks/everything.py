"""All checks of one set of patches, in order."""

from __future__ import annotations

import torch

from patchkit.patch import Patch, Promises
from patchkit.quality.checks.case import BEYOND, Case
from patchkit.quality.checks.feeding import WAYS, fed, ways
from patchkit.quality.checks.generating import ends, greedy
from patchkit.quality.checks.logits import any_feeding, causal, defined, padded_rows, same_logits
from patchkit.quality.checks.removal import acted, bounded, restored
from patchkit.quality.checks.rounding import no_overflow
from patchkit.quality.checks.same_text import same_tokens
from patchkit.quality.checks.traces import interleaved, not_mixed, taken_back


def run(case: Case) -> None:
    """All checks of this set of patches."""
    first = first_logits(case)
    for patch, promise in case.promises.items():
        _of_one(case, patch, promise)
    if not case.patches:
        same_logits(case, "all", case._twin())
        same_tokens(case, "all", case._twin())
    causal(case)
    if case.patches:
        any_feeding(case)
        padded_rows(case)
        taken_back(case)
        greedy(case)
        ends(case)
        bounded(case)
        interleaved(case)
    if first is not None:
        not_mixed(case, first)
    if case.patches:
        acted(case)
        restored(case)


def first_logits(case: Case) -> torch.Tensor | None:
    """Logits of the first text that the patched model ever sees; None if it cannot run, which is a broken promise."""
    found: list[torch.Tensor] = []

    def run() -> None:
        found.append(case.full(input_ids=case.text(case.reach + BEYOND, 1)).logits)

    case.check("all", "the patched model runs", run)
    return found[0] if found else None


def _of_one(case: Case, patch: Patch, promise: Promises) -> None:
    if promise.same_logits:
        same_logits(case, patch.spec, case.without(patch))
    if promise.same_tokens:
        same_tokens(case, patch.spec, case.without(patch))
    if promise.same_up_to:
        fits = case.text(promise.same_up_to)
        case.same(
            patch.spec,
            "short texts are unpatched",
            lambda _: ((fed(case.full, fits, way), fed(case.without(patch), fits, way)) for way in ways(case, fits.shape[1])),
            f"{fits.shape[1]} tokens, {WAYS}, with the patch and without",
            own_noise=False,
        )
    if promise.definition is not None:
        defined(case, patch, promise)
    if promise.rounds:
        no_overflow(case, patch)
