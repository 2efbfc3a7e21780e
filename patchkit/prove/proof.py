"""What `patchkit prove` finds, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from patchkit.measure import paired

Status = Literal["kept", "broken", "not judged"]


@dataclass(frozen=True)
class Check:
    """One promise, judged.

    Attributes:
        patches: the spec that was checked.
        about: the patch whose promise it is, or "all".
        measured, allowed: the largest difference found, and the very bound that it was held to; of logits unless ``bound`` says otherwise
            (in 16 bits, root mean square at the worst position); None where the promise is not about a size.
        bound: where ``allowed`` comes from.
        detail: what was compared, and why it was not judged or how it was explained.
        seconds: that the check took.
    """

    patches: str
    about: str
    promise: str
    status: Status
    measured: float | None = None
    allowed: float | None = None
    bound: str = ""
    detail: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Passkey:
    """Share of the passkeys that were completed correctly, ``distance`` tokens after they were given."""

    distance: int
    unpatched: float
    patched: float
    trials: int


@dataclass(frozen=True)
class Perplexity:
    """Streamed perplexity of all documents, and the ratio patched / unpatched with its interval over documents.

    Attributes:
        curve: position, perplexity unpatched and patched.
    """

    documents: int
    tokens: int
    unpatched: float
    patched: float
    ratio: paired.Interval
    curve: list[tuple[float, float, float]]


@dataclass(frozen=True)
class Speed:
    """One side of the timing, after ``context`` tokens.

    Attributes:
        ttft_ms: milliseconds from a prompt of ``prompt`` tokens to the logits of its last.
        ms_per_token, p95_ms: of one step, median and 95th percentile.
        generate_ms: milliseconds per new token of `generate`, all told; measured where a patch changes `generate`.
        weight_bytes, cache_bytes: what a step has to read.
        bandwidth_share: the time in which this machine could read that, over the time that the step takes.
    """

    context: int
    prompt: int
    ttft_ms: float
    ms_per_token: float
    p95_ms: float
    generate_ms: float | None
    weight_bytes: int
    cache_bytes: int
    bandwidth_share: float


@dataclass
class Proof:
    """What was found, filled in as it is found.

    Attributes:
        near_tie_rate: share of positions whose two likeliest tokens are closer than one step of the logits' dtype.
        only: the promises that were asked for; None for all.
        not_checked: what was asked for and not checked yet, as "promise [patches]".
        interrupted: what broke the run off, such as "SIGTERM"; None if nothing did.
        complete: everything that was asked for was checked.
        estimated_seconds: how long all of it takes, from the time of one forward; `seconds`: how long it did take.
        speedup: time of a step unpatched over patched, with the interval over pairs; `generate_speedup` the same of `generate`.
        bandwidth_gb_s: of a copy on this machine, read and written.
    """

    patches: str
    dtype: str
    checks: list[Check] = field(default_factory=list)
    perplexity: Perplexity | None = None
    passkey: list[Passkey] = field(default_factory=list)
    speed: dict[str, Speed] = field(default_factory=dict)
    speedup: paired.Interval | None = None
    generate_speedup: paired.Interval | None = None
    bandwidth_gb_s: float | None = None
    near_tie_rate: float | None = None
    only: list[str] | None = None
    not_checked: list[str] = field(default_factory=list)
    interrupted: str | None = None
    complete: bool = False
    estimated_seconds: float | None = None
    seconds: float = 0.0

    def add(self, check: Check, seconds: float) -> None:
        """Add what was found and how long that took."""
        self.checks.append(dataclasses.replace(check, seconds=round(seconds, 3)))

    @property
    def broken(self) -> list[Check]:
        """The promises that were not kept."""
        return [check for check in self.checks if check.status == "broken"]

    @property
    def passed(self) -> bool:
        """Everything was checked, something was judged, and no promise is broken."""
        return self.complete and not self.broken and any(check.status == "kept" for check in self.checks)

    @property
    def verdict(self) -> str:
        """In a sentence."""
        counts = {status: sum(check.status == status for check in self.checks) for status in ("kept", "broken", "not judged")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        if not self.complete:
            by = "" if self.interrupted is None else f" by {self.interrupted}"
            return f"incomplete: interrupted{by} after {len(self.checks)} checks ({said or 'none'}), {len(self.not_checked)} not checked"
        asked = "" if self.only is None else ", of those asked for"
        return f"{'passed' if self.passed else 'FAILED'}: of {len(self.checks)} promises checked{asked}, {said or 'none judged'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
