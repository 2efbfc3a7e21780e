"""Bounds of a gate, and its result."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from patchkit.errors import PatchError
from patchkit.measure.environment import environment
from patchkit.measure.latency import Timings, median_ms
from patchkit.measure.paired import Interval
from patchkit.measure.perplexity import perplexity_of

UNPATCHED, PATCHED = "unpatched", "patched"

Hits = dict[str, Counter[str]]


class GateError(PatchError):
    """A gate, or a comparison of two runs, could measure nothing; the message says why."""


@dataclass(frozen=True)
class Bounds:
    """Bounds that a gate demands.

    Attributes:
        min_speedup: least unpatched time / patched time. 0.9 lets the patch be up to 11 % slower.
        max_ppl_increase: largest patched perplexity / unpatched perplexity - 1: 0.03 is 3 %.

    Raises:
        GateError: no bound, or a number that bounds nothing.
    """

    min_speedup: float | None = None
    max_ppl_increase: float | None = None

    def __post_init__(self) -> None:
        if self.min_speedup is None and self.max_ppl_increase is None:
            raise GateError("a gate without a bound cannot fail: give min_speedup=, max_ppl_increase=, or both")
        for name, above in (("min_speedup", 0), ("max_ppl_increase", -1)):
            bound = getattr(self, name)
            if bound is not None and (isinstance(bound, bool) or not isinstance(bound, int | float) or not above < bound < math.inf):
                raise GateError(f"{name}={bound!r} bounds nothing: give a finite number above {above}")


@dataclass(frozen=True)
class PerplexityIncrease:
    """Increase of the perplexity of documents by a patch.

    Attributes:
        increase: patched perplexity / unpatched perplexity - 1 over all tokens, with its interval over documents.
        tokens: number of predictions in each document.
        unpatched_nll, patched_nll: mean nats per token of each document.
    """

    increase: Interval
    tokens: list[int]
    unpatched_nll: list[float]
    patched_nll: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the perplexity of all tokens, unpatched and patched."""
        total = sum(self.tokens)
        by_variant = {UNPATCHED: self.unpatched_nll, PATCHED: self.patched_nll}
        nll = {name: sum(n * each for n, each in zip(self.tokens, nlls, strict=True)) / total for name, nlls in by_variant.items()}
        return {**vars(self), "increase": vars(self.increase), **{name: perplexity_of(each) for name, each in nll.items()}}


@dataclass(frozen=True)
class Gate:
    """The result of a gate: its measurements and its verdict.

    Attributes:
        patches: their specs.
        model: class, size and precision.
        context: tokens before the timed ones.
        timed: "decode": steps of one token; "generate": whole calls, prompt included.
        rounds_ms: milliseconds per token by variant, one entry per round.
        speedup: unpatched / patched, median over rounds.
        cache_bytes: by variant, after the last round.
        acceptance: share of accepted drafts; None if nothing drafts.
        hits: by patch, how far its run-time counters rose in the timed rounds.
        perplexity: None without a bound on it.
        failures: why the gate fails; empty if it passes.
    """

    patches: str
    model: str
    context: int
    timed: Literal["decode", "generate"]
    bounds: Bounds
    rounds_ms: Timings
    speedup: Interval
    cache_bytes: dict[str, int]
    acceptance: float | None
    hits: Hits
    perplexity: PerplexityIncrease | None
    failures: list[str]

    @property
    def ms_per_token(self) -> dict[str, float]:
        """Medians over rounds."""
        return {name: median_ms(self.rounds_ms, name) for name in self.rounds_ms}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, with the machine; `patchkit.gates.runs` reads it."""
        return {
            **vars(self),
            "bounds": vars(self.bounds),
            "speedup": vars(self.speedup),
            "ms_per_token": self.ms_per_token,
            "tokens_per_s": {name: 1000 / ms for name, ms in self.ms_per_token.items()},
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "passed": not self.failures,
            "environment": environment(),
        }

    def __str__(self) -> str:
        times = " / ".join(f"{ms:.3g}" for ms in self.ms_per_token.values())
        parts = [f"speed-up {self.speedup} ({times} ms per token, {self.timed} at context {self.context})"]
        if self.acceptance is not None:
            parts.append(f"{self.acceptance:.0%} of drafts accepted")
        if self.perplexity is not None:
            parts.append(f"perplexity increase {self.perplexity.increase} over {len(self.perplexity.tokens)} documents")
        return f"{self.patches}: {'; '.join(parts)}"


def violations(bounds: Bounds, speedup: Interval, increase: Interval | None) -> list[str]:
    """Messages about the bounds that the intervals do not keep. NaN keeps none."""
    found = []
    if bounds.min_speedup is not None and not speedup.low >= bounds.min_speedup:
        noisy = speedup.value >= bounds.min_speedup
        remedy = ": too noisy to tell, give more rounds= or a quieter machine" if noisy else ""
        found.append(f"speed-up {speedup}: its lower end is below min_speedup={bounds.min_speedup}{remedy}")
    if bounds.max_ppl_increase is not None and not (increase is not None and increase.high <= bounds.max_ppl_increase):
        noisy = increase is not None and increase.value <= bounds.max_ppl_increase
        remedy = ": too few documents to tell, give more with documents=" if noisy else ""
        found.append(f"perplexity increase {increase}: its upper end is above max_ppl_increase={bounds.max_ppl_increase}{remedy}")
    return found
