"""Result of `patchkit prove`, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from patchkit.measure import paired

Status = Literal["kept", "broken", "not judged"]


@dataclass(frozen=True)
class Check:
    """One promise and its verdict.

    Attributes:
        patches: the spec that was checked.
        about: spec of the patch whose promise it is, or "all".
        measured, allowed: the largest difference found, and the bound that it was compared with; of logits unless ``bound`` names
            another quantity (in 16 bits, root mean square at the worst position); None if the promise is not about a size.
        bound: origin of ``allowed``.
        detail: the comparison, and the reason if it was not judged.
        seconds: duration of the check.
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
    """Share of the passkeys that were completed correctly, ``distance`` tokens after they were stated."""

    distance: int
    unpatched: float
    patched: float
    trials: int


@dataclass(frozen=True)
class Perplexity:
    """Streamed perplexity of all documents, and patched / unpatched with its interval over documents.

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
        generate_ms: milliseconds per new token of a whole call of `generate`; measured if a patch changes `generate`.
        weight_bytes, cache_bytes: bytes that a step has to read.
        bandwidth_share: the time in which this machine could read these bytes / the time of the step.
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
    """The result of `patchkit prove`, filled in while it runs.

    Attributes:
        near_tie_rate: share of positions whose two likeliest tokens are closer than one step of the logits' dtype.
        only: names of the requested promises; None for all.
        not_checked: requested checks that were not done yet, as "promise [patches]".
        interrupted: name of the signal that interrupted the run, such as "SIGTERM"; None if none did.
        complete: all requested checks were done.
        estimated_seconds: duration of all checks, estimated from the time of one forward; `seconds`: the actual duration.
        speedup, generate_speedup: unpatched time / patched time of a step, and of `generate`, with the interval over pairs.
        bandwidth_gb_s: GB/s read and written by a copy on this machine.
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
        """Add a check and its duration."""
        self.checks.append(dataclasses.replace(check, seconds=round(seconds, 3)))

    @property
    def broken(self) -> list[Check]:
        """Checks of promises that were not kept."""
        return [check for check in self.checks if check.status == "broken"]

    @property
    def passed(self) -> bool:
        """Whether everything was checked, at least one promise is kept, and none is broken."""
        return self.complete and not self.broken and any(check.status == "kept" for check in self.checks)

    @property
    def verdict(self) -> str:
        """One sentence with the verdict and the numbers of checks."""
        counts = {status: sum(check.status == status for check in self.checks) for status in ("kept", "broken", "not judged")}
        judged = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        if not self.complete:
            by = "" if self.interrupted is None else f" by {self.interrupted}"
            return f"incomplete: interrupted{by} after {len(self.checks)} checks ({judged or 'none'}), {len(self.not_checked)} not checked"
        asked = "" if self.only is None else ", of those asked for"
        return f"{'passed' if self.passed else 'FAILED'}: of {len(self.checks)} promises checked{asked}, {judged or 'none judged'}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"passed": self.passed, "verdict": self.verdict, **dataclasses.asdict(self)}
