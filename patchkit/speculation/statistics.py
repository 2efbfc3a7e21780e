"""Statistics of speculative generation: one record per round, and the figures that follow from them.

The model of the speed-up is that of Leviathan et al. 2023 (arXiv 2211.17192, section 3.3): with K drafts that are each accepted with
probability a, a draft that costs c and a verification that costs v plain steps, a round yields (1 - a^(K+1)) / (1 - a) tokens in the time
of K c + v plain steps. Differs from the paper in that acceptance is taken position by position, and every cost is measured.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One round: a draft and the target forward that verifies it.

    Attributes:
        k: number of drafts that the drafter was asked for; 0 is a plain step.
        rows: number of rows of the batch that were still generating.
        proposed: drafts of each row; 0 where the drafter had nothing, the depth if they form a tree.
        accepted: accepted drafts of each row, before an end token or a length limit cuts the row.
        emitted: new tokens of all rows together.
        draft_ms, verify_ms, overhead_ms: milliseconds of the drafter, of the target forward, and of the rest of the round.
    """

    k: int
    rows: int
    proposed: tuple[int, ...]
    accepted: tuple[int, ...]
    emitted: int
    draft_ms: float
    verify_ms: float
    overhead_ms: float

    def __post_init__(self) -> None:
        if not len(self.proposed) == len(self.accepted) == self.rows:
            raise ValueError(
                f"proposed {self.proposed} and accepted {self.accepted} do not describe {self.rows} rows: give one number per row"
            )
        if any(accepted > proposed for accepted, proposed in zip(self.accepted, self.proposed, strict=True)):
            raise ValueError(f"accepted {self.accepted} exceeds proposed {self.proposed}: count drafts only, not the target's own token")

    @property
    def longest(self) -> int:
        """Largest number of drafts of a row. If 0, the target was fed one token per row: a plain step, whatever ``k`` is."""
        return max(self.proposed, default=0)

    @property
    def target_ms(self) -> float:
        """Milliseconds of the round without the drafter."""
        return self.verify_ms + self.overhead_ms

    @property
    def total_ms(self) -> float:
        """Milliseconds of the round."""
        return self.draft_ms + self.target_ms


def expected_tokens(conditional_acceptance: Sequence[float]) -> float:
    """Expected tokens of a round: 1 + a_1 + a_1 a_2 + ..., where a_i is the chance that draft i is accepted if all before it are."""
    expected = survives = 1.0
    for chance in conditional_acceptance:
        survives *= chance
        expected += survives
    return expected


def formula_speedup(acceptance: float, k: int, draft_cost: float, verify_cost: float) -> float:
    """Plain over speculative time per token by the formula (1 - a^(K+1)) / (1 - a) / (K c + v) (Leviathan et al. 2023, section 3.3).

    Args:
        acceptance: a, the probability that a draft is accepted.
        k: K, drafts per round.
        draft_cost, verify_cost: c of one draft and v of a verification, in plain steps.

    Raises:
        ValueError: a is not a probability, K is negative, or the cost is not above 0.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}: give a probability, 0 to 1")
    if k < 0:
        raise ValueError(f"k is {k}: give 0 (plain decoding) or more drafts")
    cost = k * draft_cost + verify_cost
    if cost <= 0:
        raise ValueError(f"a round costs {cost} plain steps: give costs above 0")
    return expected_tokens([acceptance] * k) / cost


@dataclass
class RunStatistics:
    """The rounds of one call of generate (or of several, `merged`) and the figures that follow from them.

    Attributes:
        steps: the rounds, in order.
        prompt_tokens: tokens of all prompts.
        prefill_ms: milliseconds until their first logits.
        near_tie_checked: in 16-bit runs, number of verified positions that were examined.
        near_ties: number of these whose two best logits are so close that the order of summation decides between them.
        forced: under a grammar, number of tokens that were the only ones allowed.
        masked: number of positions of which all logits were masked by a grammar.
        mask_us: microseconds of parsing and of making masks.
        memory_bytes: bytes of the caches and of the drafter's state.
        drafter, acceptance: names of both, as text.
        plain_ms_by_rows: rows -> milliseconds of a plain step, measured elsewhere; used where the run has no plain step itself.
    """

    steps: list[StepRecord] = field(default_factory=list)
    prompt_tokens: int = 0
    prefill_ms: float = 0.0
    near_ties: int = 0
    near_tie_checked: int = 0
    forced: int = 0
    masked: int = 0
    mask_us: float = 0.0
    memory_bytes: int = 0
    drafter: str = ""
    acceptance: str = ""
    plain_ms_by_rows: dict[int, float] = field(default_factory=dict)

    def add(self, record: StepRecord) -> None:
        """Append the record of one round."""
        self.steps.append(record)

    def absorb(self, run: RunStatistics) -> None:
        """Add another run: counts add up, and the largest memory is kept."""
        self.steps += run.steps
        for name in ("prompt_tokens", "prefill_ms", "near_ties", "near_tie_checked", "forced", "masked", "mask_us"):
            setattr(self, name, getattr(self, name) + getattr(run, name))
        self.memory_bytes = max(self.memory_bytes, run.memory_bytes)
        self.plain_ms_by_rows |= run.plain_ms_by_rows
        for name in ("drafter", "acceptance"):
            names = [*filter(None, getattr(self, name).split("; ")), *filter(None, getattr(run, name).split("; "))]
            setattr(self, name, "; ".join(dict.fromkeys(names)))

    @classmethod
    def merged(cls, runs: Iterable[RunStatistics]) -> RunStatistics:
        """Merge several runs into a new one."""
        result = cls()
        for run in runs:
            result.absorb(run)
        return result

    @property
    def proposed(self) -> int:
        """Number of drafts."""
        return sum(sum(step.proposed) for step in self.steps)

    @property
    def accepted(self) -> int:
        """Number of accepted drafts."""
        return sum(sum(step.accepted) for step in self.steps)

    @property
    def emitted(self) -> int:
        """Number of tokens that the rounds added; a token from the prompt's logits belongs to no round."""
        return sum(step.emitted for step in self.steps)

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over proposed drafts; None if there were none."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def conditional_acceptance_by_position(self) -> list[float]:
        """Share of accepted drafts at each position, among drafts whose predecessors were all accepted."""
        return self._share(lambda step, proposed, accepted, i: proposed > i and accepted >= i)

    @property
    def unconditional_acceptance_by_position(self) -> list[float]:
        """Share of accepted drafts at each position, among all drafts there."""
        return self._share(lambda step, proposed, accepted, i: proposed > i)

    @property
    def accepted_histogram(self) -> dict[int, int]:
        """Number of accepted drafts of one row in one round -> its frequency; rounds in which the row had no draft do not count."""
        return dict(sorted(Counter(accepted for proposed, accepted in self._row_rounds() if proposed).items()))

    @property
    def tokens_per_target_step(self) -> float | None:
        """Tokens per row and target forward; 1 in plain decoding."""
        forwards = sum(step.rows for step in self.steps)
        return self.emitted / forwards if forwards else None

    @property
    def draft_ms(self) -> float:
        """Milliseconds of all drafting."""
        return sum(step.draft_ms for step in self.steps)

    @property
    def verify_ms(self) -> float:
        """Milliseconds of all target forwards."""
        return sum(step.verify_ms for step in self.steps)

    @property
    def overhead_ms(self) -> float:
        """Milliseconds of all the rest of the rounds."""
        return sum(step.overhead_ms for step in self.steps)

    @property
    def plain_ms(self) -> float | None:
        """Median milliseconds of the steps that fed the target one token per row, without the drafter; None if there were none."""
        times = [step.target_ms for step in self.steps if step.longest == 0]
        return statistics.median(times) if times else None

    @property
    def predicted_speedup(self) -> float | None:
        """Speed-up that the formula predicts from measured acceptance and median costs, for the run's mix of K.

        It counts the rounds with a number of rows for which the time of a plain step is known; None if there are none.
        """
        plain = self._plain_times()
        groups: dict[tuple[int, int], list[StepRecord]] = {}
        for step in self.steps:
            if step.rows in plain:
                groups.setdefault((step.longest, step.rows), []).append(step)
        chances = self._share(lambda step, proposed, accepted, i: step.longest > i and accepted >= i)
        plain_time = time = 0.0
        for (longest, rows), steps in groups.items():
            plain_time += len(steps) * plain[rows] * expected_tokens(chances[:longest])
            time += len(steps) * sum(statistics.median(getattr(step, part) for step in steps) for part in ("draft_ms", "target_ms"))
        return plain_time / time if time else None

    @property
    def achieved_speedup(self) -> float | None:
        """Estimated time of plain decoding over the time of the rounds, without prompts, over the rounds of `predicted_speedup`."""
        plain = self._plain_times()
        steps = [step for step in self.steps if step.rows in plain]
        spent = sum(step.total_ms for step in steps)
        return sum(plain[step.rows] * step.emitted / step.rows for step in steps) / spent if spent else None

    @property
    def near_tie_rate(self) -> float | None:
        """Near ties per examined position; None if none was examined (32-bit runs)."""
        return self.near_ties / self.near_tie_checked if self.near_tie_checked else None

    def summary(self) -> dict[str, Any]:
        """Return every figure except the single rounds, as plain data."""
        return {
            "drafter": self.drafter,
            "acceptance": self.acceptance,
            "steps": len(self.steps),
            "k": dict(sorted(Counter(step.k for step in self.steps).items())),
            "prompt_tokens": self.prompt_tokens,
            "tokens": self.emitted,
            "proposed": self.proposed,
            "accepted": self.accepted,
            "acceptance_rate": self.acceptance_rate,
            "conditional_acceptance_by_position": self.conditional_acceptance_by_position,
            "unconditional_acceptance_by_position": self.unconditional_acceptance_by_position,
            "accepted_histogram": self.accepted_histogram,
            "tokens_per_target_step": self.tokens_per_target_step,
            "prefill_ms": self.prefill_ms,
            "draft_ms": self.draft_ms,
            "verify_ms": self.verify_ms,
            "overhead_ms": self.overhead_ms,
            "plain_ms": self.plain_ms,
            "predicted_speedup": self.predicted_speedup,
            "achieved_speedup": self.achieved_speedup,
            "near_ties": self.near_ties,
            "near_tie_checked": self.near_tie_checked,
            "near_tie_rate": self.near_tie_rate,
            "forced": self.forced,
            "masked": self.masked,
            "mask_us": self.mask_us,
            "memory_bytes": self.memory_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, with every round under "rounds", as plain data for JSON."""
        return {**self.summary(), "rounds": [dataclasses.asdict(step) for step in self.steps]}

    def write_json(self, path: str | Path) -> None:
        """Write `to_dict` as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")

    def write_csv(self, path: str | Path) -> None:
        """Write one line per round; numbers of several rows are separated by spaces."""
        names = [each.name for each in dataclasses.fields(StepRecord)]
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["step", *names])
            for index, step in enumerate(self.steps):
                values = (getattr(step, name) for name in names)
                writer.writerow([index, *(" ".join(map(str, value)) if isinstance(value, tuple) else value for value in values)])

    def __str__(self) -> str:
        if not self.steps:
            return "no rounds"
        parts = [f"{self.emitted} tokens in {len(self.steps)} target steps", f"{self.tokens_per_target_step:.2f} tokens per step and row"]
        if self.acceptance_rate is not None:
            parts.append(f"{100 * self.acceptance_rate:.0f} % of {self.proposed} drafts accepted")
        parts.append(f"draft {self.draft_ms:.0f} ms, verify {self.verify_ms:.0f} ms, overhead {self.overhead_ms:.0f} ms")
        if self.achieved_speedup is not None:
            parts.append(f"{self.achieved_speedup:.2f} x plain decoding ({self.predicted_speedup:.2f} x predicted)")
        if self.near_tie_rate is not None:
            parts.append(f"{100 * self.near_tie_rate:.2f} % near ties")
        if self.mask_us:
            parts.append(f"grammar: {self.forced} tokens forced, {self.masked} masks applied, {self.mask_us / 1000:.1f} ms")
        return "; ".join(parts)

    def _row_rounds(self) -> Iterable[tuple[int, int]]:
        return ((proposed, accepted) for step in self.steps for proposed, accepted in zip(step.proposed, step.accepted, strict=True))

    def _plain_times(self) -> dict[int, float]:
        own: dict[int, list[float]] = {}
        for step in self.steps:
            if step.longest == 0:
                own.setdefault(step.rows, []).append(step.target_ms)
        return self.plain_ms_by_rows | {rows: statistics.median(times) for rows, times in own.items()}

    def _share(self, counts: Callable[[StepRecord, int, int, int], bool]) -> list[float]:
        """Share of accepted drafts at each position i, among the rows of rounds for which `counts(step, proposed, accepted, i)` is true."""
        shares = []
        for i in range(max((step.longest for step in self.steps), default=0)):
            outcomes = [
                accepted > i
                for step in self.steps
                for proposed, accepted in zip(step.proposed, step.accepted, strict=True)
                if counts(step, proposed, accepted, i)
            ]
            if not outcomes:  # no round reached this position
                break
            shares.append(sum(outcomes) / len(outcomes))
        return shares
