"""List of all checks: the name of the promise, when it applies, and its cost."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from patchkit.errors import PatchError
from patchkit.prove.checks.case import LONG, Case
from patchkit.prove.checks.constrained import PROMISE as CONSTRAINED
from patchkit.prove.checks.constrained import constrained
from patchkit.prove.checks.defined import defined
from patchkit.prove.checks.feeding import ONE_BY_ONE
from patchkit.prove.checks.generating import NEW_TOKENS, ends, greedy
from patchkit.prove.checks.logits import any_feeding, causal, padded_rows, same_logits, short_texts
from patchkit.prove.checks.quality import BEYOND_THE_WINDOW, NOT_TOO_GOOD, SAME_PERPLEXITY
from patchkit.prove.checks.removal import acted, bounded, restored
from patchkit.prove.checks.rounding import no_overflow
from patchkit.prove.checks.same_tokens import same_tokens
from patchkit.prove.checks.traces import interleaved, not_mixed, rolled_back
from patchkit.prove.checks.work import Work


class UnknownPromise(PatchError):
    """No promise of this name is checked; the message lists those that are."""


@dataclass(frozen=True)
class Step:
    """A check.

    Attributes:
        promise: its name in the report.
        applies: returns whether a set of patches promises it.
        work: returns its approximate cost.
    """

    promise: str
    run: Callable[[Case], None]
    applies: Callable[[Case], bool]
    work: Callable[[Case], Work]


def _fed(case: Case, length: int) -> Work:
    """Cost of a sequence in all chunkings."""
    if length <= ONE_BY_ONE:
        return Work(length * 1.2 + 2, 0)
    return Work(40, 4 * length)


def _singles(length: int) -> int:
    """Number of single-token forwards of a sequence that is fed one by one."""
    return length if length <= ONE_BY_ONE else 26


def _long(case: Case) -> int:
    return max(case.reach, case.wrap) if case.longest is None and max(case.reach, case.wrap) <= LONG else 0


def _patched(case: Case) -> bool:
    return bool(case.patches)


def _text(texts: float = 1) -> Work:
    return Work(texts * (NEW_TOKENS + 1), 0)


STEPS = (
    Step(
        "logits stay the same",
        same_logits,
        lambda case: not case.patches or any(promise.same_logits for promise in case.promises.values()),
        lambda case: _fed(case, case.probe) + _fed(case, case.probe) + _fed(case, case.probe),
    ),
    Step(
        "greedy text stays the same",
        same_tokens,
        lambda case: not case.patches or any(promise.same_tokens for promise in case.promises.values()),
        lambda case: _text(14),
    ),
    Step(
        CONSTRAINED,
        constrained,
        lambda case: any(promise.same_tokens for promise in case.promises.values()),
        lambda case: _text(6),
    ),
    Step(
        "short texts are unpatched",
        short_texts,
        lambda case: any(promise.same_up_to for promise in case.promises.values()),
        lambda case: _fed(case, case.probe) + _fed(case, case.reach) + _fed(case, case.reach),
    ),
    Step(
        "logits are those of the definition",
        defined,
        lambda case: any(promise.definition is not None for promise in case.promises.values()),
        # A definition that rounds is computed for every chunking, and is the first check that measures the unpatched model's own noise.
        lambda case: _fed(case, case.probe) + (Work(1.2 * case.probe + 8) if case.rounding else Work(4, 41 * case.reach)),
    ),
    Step("no overflow in 16 bits", no_overflow, lambda case: bool(case.rounding), lambda case: Work(10)),
    Step("no token sees a later one", causal, lambda case: True, lambda case: Work(0.46 * case.probe, 10 * case.probe)),
    Step(
        "any chunking gives the same logits",
        any_feeding,
        lambda case: _patched(case) and all(promise.any_feeding for promise in case.promises.values()),
        lambda case: _fed(case, case.probe) + (Work(70, 2 * (4 if case.thorough else 3) * _long(case)) if _long(case) else Work(0)),
    ),
    Step("a padded row is the row alone", padded_rows, _patched, lambda case: Work(9, 8.5 * case.probe)),
    Step("rolled back tokens leave no trace", rolled_back, _patched, lambda case: Work(40, 3 * _long(case) + 4 * case.probe)),
    Step(
        "generate agrees with forwards",
        greedy,
        lambda case: _patched(case) and all(promise.greedy for promise in case.promises.values()),
        lambda case: _text(8),
    ),
    Step("a text ends where it has to", ends, _patched, lambda case: _text(4)),
    Step(
        "memory is bounded",
        bounded,
        lambda case: (
            any(promise.bounded for promise in case.promises.values()) and (case.longest is None or 3 * case.reach + 40 <= case.longest)
        ),
        lambda case: Work(10, 3 * case.reach),
    ),
    Step("interleaved texts do not mix", interleaved, _patched, lambda case: Work(case.probe, 4 * case.probe)),
    Step(
        "a text after others is as in a fresh model",
        not_mixed,
        lambda case: True,
        lambda case: Work(_singles(case.probe) if case.reach else 3, _long(case) + 2 * case.probe),
    ),
    Step("it acted", acted, _patched, lambda case: Work(0)),
    Step("nothing is left when removed", restored, _patched, lambda case: Work(4)),
)
# Judged from measurements of the given patches on any documents.
MEASURED = (BEYOND_THE_WINDOW, NOT_TOO_GOOD, SAME_PERPLEXITY)
PROMISES = (*(step.promise for step in STEPS), *MEASURED)


def wanted(only: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the promises to check, in the order of the report; all for None.

    Raises:
        UnknownPromise: a name is unknown, or ``only`` is empty.
    """
    if only is None:
        return PROMISES
    for name in only:
        if name not in PROMISES:
            near = difflib.get_close_matches(name, PROMISES, n=1, cutoff=0.4)
            hint = f", did you mean {near[0]!r}?" if near else ":"
            raise UnknownPromise(f"no promise is called {name!r}{hint} available: {'; '.join(PROMISES)}")
    if not only:
        raise UnknownPromise(f"no promise is named: give at least one of: {'; '.join(PROMISES)}")
    return tuple(name for name in PROMISES if name in only)
