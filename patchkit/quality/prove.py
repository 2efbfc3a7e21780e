"""Whether patches keep what they promise, on this model and these texts: `patchkit prove`.

A patch says what it promises (`patchkit.patch.Promises`); nothing here knows which patches there are. Every promise is checked beside
the same model without that one patch, in the same process and over the same weights. What every patched model has to keep is checked
for all patches together: no token sees a later one, rows and texts do not mix, what is taken back leaves no trace, nothing is left
when the patches are removed.

Two sets of patches are checked: the given ones, and where these only act on long texts, the same with options under which all happens
in a short one (`Patch.exercised`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from patchkit.patch import Patch
from patchkit.quality.checks.case import Advance, Case, spec_of
from patchkit.quality.checks.everything import run
from patchkit.quality.checks.quality import Quality
from patchkit.quality.checks.speed import timed
from patchkit.quality.perplexity import TextError
from patchkit.quality.proof import Proof


def prove(
    proof: Proof,
    model: PreTrainedModel,
    patches: Sequence[Patch],
    documents: Sequence[Sequence[int] | torch.Tensor],
    passkeys: Callable[[int, int], tuple[list[int], int]] | None = None,
    fast: bool = False,
    advance: Advance = lambda what: None,
) -> None:
    """Check everything and fill ``proof``, which holds what was found so far if this is interrupted.

    Args:
        model: unpatched, in evaluation mode; it is left as it is. Patched are other views of the same weights.
        patches: none compares the model with itself.
        documents: token ids of texts that belong together, each scored through one cache.
        passkeys: of a distance in tokens and the number of a trial, the ids of a text that ends in a passkey given that far before, and
            the number of ids that are the passkey.
        fast: check patches only with options for short texts, and time less.
        advance: called with what is being done.

    Raises:
        PatchError: the model cannot be patched with these patches.
        TextError: no document has two tokens.
    """
    texts = [torch.as_tensor(ids, dtype=torch.long).flatten().cpu() for ids in documents]
    texts = [ids for ids in texts if len(ids) > 1]
    if not texts:
        raise TextError("no document has two tokens: give a longer text")
    with torch.no_grad():
        cases = [Case(proof, model, list(patches), texts, advance)]
        exercised = [patch.exercised() for patch in patches]
        if spec_of(exercised) != spec_of(patches):
            cases.append(Case(proof, model, exercised, texts, advance))
        for case in cases[-1:] if fast else cases:
            run(case)
        given = cases[0]
        given.check("all", "quality is measured", Quality(given, texts, passkeys).run)
        given.check("all", "speed is measured", functools.partial(timed, given, advance, rounds=15 if fast else 40))
    proof.complete = True
