"""Bounds on the difference between two computations of the same logits.

A difference is accepted if it is within one of these bounds, tried in this order:

| applies to | largest allowed difference |
|---|---|
| float32, float64 | the dtype's row of `patchkit.tolerance.TOLERANCES` |
| float16, bfloat16 | 3 x the unpatched model's difference from the same weights in float32 |
| patches that round | 3 x their definition's difference from itself when the inputs of rounded modules move by some last bits |
| any | 3 x the unpatched model's difference from itself in the same test |
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.definitions import NoDefinition
from patchkit.prove.checks.case import Case
from patchkit.prove.checks.compare import Difference, Pieces, difference
from patchkit.prove.checks.feeding import NotJudged, fed
from patchkit.prove.proof import Check

# Called with a model: pairs of its logits that should be equal.
Pairs = Callable[[Any], Iterable[tuple[Pieces, Pieces]]]

# A patched model may differ by this multiple of the noise that was measured.
_OWN_NOISE = 3.0
SIXTEEN_BITS = (torch.float16, torch.bfloat16)
# Length of the sequences on which the noise of rounding is measured, their number, and draws of each.
_NOISE_TOKENS = 64
_NOISE_TEXTS = 2
_NOISE_DRAWS = 2


@dataclass(frozen=True)
class Bound:
    """Largest allowed difference, and a description of its origin; if ``typical`` is given, half of all positions must be within that."""

    value: float
    why: str
    typical: float | None = None


def largest(pairs: Iterable[tuple[Pieces, Pieces]]) -> Difference:
    """Largest difference over all pairs."""
    found = Difference()
    for actual, expected in pairs:
        this = difference(actual, expected)
        found = Difference(max(found.largest, this.largest), max(found.position, this.position), max(found.typical, this.typical))
    return found


def size(case: Case, found: Difference) -> float:
    """The difference to judge: in 16 bits the root mean square at the worst position, because single logits are too noisy."""
    return found.position if case.model.dtype in SIXTEEN_BITS else found.largest


def judged(found: float, bounds: Iterable[Bound]) -> tuple[bool, Bound]:
    """Return whether ``found`` is within one of the bounds, and the bound that decided: the first that holds, else the largest."""
    most = Bound(-math.inf, "")
    for bound in bounds:
        if math.isfinite(found) and found <= bound.value:
            return True, bound
        most = max(most, bound, key=lambda each: each.value)
    return False, most


def same(
    case: Case,
    about: str,
    promise: str,
    pairs: Pairs,
    detail: str,
    of_any_view: bool = True,
    noise: Callable[[], Bound] | None = None,
) -> None:
    """Check that the pairs of logits of the patched model are equal within bounds.

    Args:
        of_any_view: the unpatched model promises the same, so that its own ``pairs`` show the effect of rounding.
        noise: the bound for patches that round; `rounding_noise` by default.
    """

    def run() -> Check:
        difference, compared = largest(pairs(case.full)), detail
        found = size(case, difference)
        kept, bound = judged(found, _bounds(case, pairs, of_any_view, detail, noise))
        if kept and bound.typical is not None and difference.typical > bound.typical:
            kept, found, bound = False, difference.typical, Bound(bound.typical, f"{bound.why}, half of the text")
        others = [patch for patch in case.patches if patch not in case.rounding]
        if kept and bound.value > case.tolerance.differs and case.rounding and others and of_any_view:
            # A bound this wide could hide errors that are not due to rounding, so the other patches are checked alone.
            compared = f"{detail}; without {listed_specs(case.rounding)}"
            found = size(case, largest(pairs(case.view(others))))
            kept, bound = judged(found, [tight(case), *_own(case, pairs, detail)])
        return Check(case.spec, about, promise, "kept" if kept else "broken", found, bound.value, bound.why, compared)

    case.check(about, promise, run)


def _bounds(case: Case, pairs: Pairs, of_any_view: bool, detail: str, noise: Callable[[], Bound] | None) -> Iterator[Bound]:
    yield tight(case)
    if case.rounding:  # before bounds that cost more to compute
        yield noise() if noise is not None else rounding_noise(case)
    yield from _own(case, pairs, detail) if of_any_view else own_of_feeding(case)


def _own(case: Case, pairs: Pairs, detail: str) -> Iterator[Bound]:
    found = largest(pairs(case.plain))
    if size(case, found) > case.tolerance.differs:
        raise NotJudged(f"the unpatched model itself differs by {size(case, found):.2g} ({detail})")
    yield Bound(_OWN_NOISE * size(case, found), f"{_OWN_NOISE:g} x unpatched, same test")


def own_of_feeding(case: Case) -> Iterator[Bound]:
    """Bound: 3 x the unpatched model's difference between chunkings; none in 16 bits, where it is below `tight`."""
    if case.model.dtype not in SIXTEEN_BITS:
        yield Bound(_OWN_NOISE * case.own, f"{_OWN_NOISE:g} x unpatched, by feeding")


def tight(case: Case) -> Bound:
    """Bound: the row of `TOLERANCES`; in 16 bits 3 x the unpatched model's difference from the same weights in float32."""
    if case.model.dtype not in SIXTEEN_BITS:
        return Bound(case.tolerance.logits, f"rounding of {case.proof.dtype}")
    if "tight" not in case.once:
        exact: Any = copy.deepcopy(case.plain).float()
        at = case.watched(case.probe)
        texts = [case.sequence(case.probe, number) for number in range(3)]
        found = largest((fed(case.plain, ids, [], at=at), fed(exact, ids, [], at=at)) for ids in texts)
        case.once["tight"] = _OWN_NOISE * found.position
    return Bound(case.once["tight"], f"{_OWN_NOISE:g} x unpatched, to float32")


def for_logits(case: Case) -> Iterator[Bound]:
    """Bounds for single logits instead of whole positions."""
    yield Bound(case.tolerance.logits, f"rounding of {case.proof.dtype}")
    yield Bound(_OWN_NOISE * case.own, f"{_OWN_NOISE:g} x unpatched, by feeding")
    if case.rounding:
        yield rounding_noise(case, single_logits=True)


def rounding_noise(case: Case, single_logits: bool = False) -> Bound:
    """Bound: 3 x the effect of last bits of inputs on the logits of the patches that round, by their definition.

    Raises:
        NotJudged: a patch has no definition.
    """
    if "noise" not in case.once:
        case.once["noise"] = largest(_unsure(case))
    found: Difference = case.once["noise"]
    return noise_bound(found.largest if single_logits else size(case, found))


def noise_bound(found: float, typical: float | None = None) -> Bound:
    """Bound: 3 x the difference of a definition from itself."""
    return Bound(_OWN_NOISE * found, f"{_OWN_NOISE:g} x its own last bits", None if typical is None else _OWN_NOISE * typical)


def _unsure(case: Case) -> Iterator[tuple[Pieces, Pieces]]:
    for patch in case.rounding:
        definition = case.promises[patch].definition
        if definition is None or not takes(definition, "unsure"):
            raise NotJudged(f"{patch.spec} rounds, and has no definition that shows how far the last bits of its inputs move logits")
        definition_of: Any = definition
        for number in range(_NOISE_TEXTS):
            ids, facts = case.sequence(_NOISE_TOKENS, number), case.facts(patch)
            try:
                sure = definition_of(case.plain, ids, facts)
                for draw in range(_NOISE_DRAWS):
                    unsure = torch.Generator().manual_seed(_NOISE_DRAWS * number + draw)
                    yield [definition_of(case.plain, ids, facts, unsure=unsure)], [sure]
            except NoDefinition as reason:
                raise NotJudged(f"the effect of last bits where {patch.spec} rounds is not known: {reason}") from reason


def takes(definition: Any, option: str) -> bool:
    """Whether a definition takes this keyword argument."""
    return option in inspect.signature(definition).parameters


def listed_specs(patches: Iterable[Any]) -> str:
    """The specs of patches, joined for a message."""
    return " and ".join(patch.spec for patch in patches)
