"""Comparison of two saved runs of gates: has a patch become slower, worse or larger?

Speed-ups are compared, not times, because a machine's own speed differs from day to day by more than most regressions. The bounds of
each gate were checked in its own run. Here a loss counts if it is beyond the interval; an interval too wide to show one fails too.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchkit.gates.gate import LEAST_ROUNDS
from patchkit.gates.result import PATCHED, UNPATCHED, GateError
from patchkit.measure.latency import Timings, median_ms
from patchkit.measure.paired import Interval

# Share of a speed-up by which two processes of one commit may differ.
TOLERANCE = 0.05

# An interval whose lower end is below this would hide the loss of a third.
_BLIND = 0.7
# Beyond rounding, on the same texts and at the same length.
_PERPLEXITY, _BYTES = 0.005, 0.01
# Changes of a machine's speed that are worth a remark.
_SPEED = 1.25
_MACHINE = ("cpu", "cores", "threads", "gpu", "platform")
_VERSIONS = ("python", "torch", "transformers", "patchkit")
_SAME = ("patches", "model", "context", "timed")
_RESAMPLES = 2000

SavedRun = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class GateChange:
    """One gate in both runs.

    Attributes:
        before, now: the speed-ups.
        change: `now / before`, with its interval of 99 %.
        ppl_change: perplexity now / before, both relative to the unpatched model; None where it was not measured twice.
        problems: messages about what got worse; empty if nothing did.
    """

    name: str
    patches: str
    before: float
    now: float
    change: Interval
    ppl_change: float | None
    problems: list[str]


@dataclass(frozen=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        rows: gates that are in both runs.
        missing, new: names of gates that are only in the older, and only in the newer run.
        remarks: differences of machines and versions.
    """

    rows: list[GateChange]
    missing: list[str]
    new: list[str]
    remarks: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Reasons to reject the newer run; empty if there are none. A missing gate is one: it may have crashed."""
        return [f"{row.name}: {problem}" for row in self.rows for problem in row.problems] + [
            f"{name}: missing in the newer run" for name in self.missing
        ]


def read_run(path: str | Path) -> SavedRun:
    """The gates of a file written by `pytest --benchmark-json=FILE` (or `--benchmark-save`), by test name.

    Raises:
        GateError: no such file, not JSON, or no gate in it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        run = {
            entry["fullname"]: entry["extra_info"]["patch_gate"] for entry in content["benchmarks"] if "patch_gate" in entry["extra_info"]
        }
    except OSError as error:
        raise GateError(f"{path} cannot be read ({error.strerror}): give a file written by pytest --benchmark-json=FILE") from error
    except (ValueError, KeyError, TypeError) as error:
        raise GateError(f"{path} was not written by pytest --benchmark-json=FILE ({type(error).__name__}: {error})") from error
    if not run:
        raise GateError(f"{path} holds no figures of patch_gate: run the gates with --benchmark-json=FILE")
    return run


def compare(before: SavedRun, now: SavedRun, tolerance: float = TOLERANCE, across_machines: bool = False) -> Comparison:
    """Compare every gate of an older run with the same gate of a newer one.

    Args:
        tolerance: share of a speed-up that may be lost.
        across_machines: compare ratios only, on any machines; else they must be the same, and changes of their speed are reported.

    Raises:
        GateError: nothing matches, the machines differ, figures are missing, or both runs are one.
    """
    common = [name for name in before if name in now]
    if not common:
        raise GateError(f"no gate is in both runs: {', '.join(before)} before, {', '.join(now)} now. Compare runs of the same tests")
    if not 0 <= tolerance < 1:
        raise GateError(f"tolerance={tolerance} is no share of a speed-up: give a number from 0 to 0.99")
    try:
        repeated = [name for name in common if before[name]["rounds_ms"] == now[name]["rounds_ms"]]
        if repeated:
            raise GateError(
                f"both runs hold the same measurement of {', '.join(repeated)}, to the last digit: give the file of a newer run"
            )
        machines = _differences(before, now, common, _MACHINE)
        if machines and not across_machines:
            raise GateError(f"the runs are from different machines ({'; '.join(machines)}): use --across-machines to compare ratios only")
        rows = [_row(name, before[name], now[name], tolerance) for name in common]
        remarks = machines + _differences(before, now, common, _VERSIONS)
        if not across_machines:
            remarks += [remark for name in common for remark in _speeds(name, before[name], now[name])]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise GateError(f"figures of patch_gate are missing or broken ({type(error).__name__}: {error}): run both again") from error
    return Comparison(rows, [name for name in before if name not in now], [name for name in now if name not in before], remarks)


def speedup_change(before: Timings, now: Timings, seed: int = 0) -> Interval:
    """Speed-up now over speed-up before, the medians over rounds, with the bootstrap interval over the rounds of both."""
    random = np.random.default_rng(seed)
    medians, resampled = [], []
    for timings in (before, now):
        ratios = np.asarray(timings[UNPATCHED], dtype=float) / np.asarray(timings[PATCHED], dtype=float)
        medians.append(float(np.median(ratios)))
        resampled.append(np.median(ratios[random.integers(len(ratios), size=(_RESAMPLES, len(ratios)))], axis=1))
    low, high = np.quantile(resampled[1] / resampled[0], [0.005, 0.995])
    return Interval(medians[1] / medians[0], float(low), float(high))


def _row(name: str, before: dict[str, Any], now: dict[str, Any], tolerance: float) -> GateChange:
    problems = [f"{what} was {before[what]!r} and is {now[what]!r}: not the same gate" for what in _SAME if before[what] != now[what]]
    problems += [f"failed: {failure}" for failure in now["failures"]]
    for when, each in (("before", before), ("now", now)):
        rounds = len(each["rounds_ms"][PATCHED])
        if rounds < LEAST_ROUNDS:
            problems.append(f"{rounds} rounds {when} are too few for an interval, at least {LEAST_ROUNDS} are needed")
    change = speedup_change(before["rounds_ms"], now["rounds_ms"])
    if change.high < 1 and change.value < 1 - tolerance:
        problems.append(f"the speed-up is {change} of what it was")
    elif not change.low >= _BLIND:
        problems.append(f"the speed-up is {change} of what it was: too noisy to tell, give more rounds= or a quieter machine")
    ppl_change = _ppl_change(before["perplexity"], now["perplexity"])
    if ppl_change is not None and not ppl_change <= 1 + _PERPLEXITY:
        problems.append(f"perplexity is {ppl_change:.4g} of what it was")
    if before["perplexity"] is not None and ppl_change is None:
        problems.append("perplexity was measured, and is not any more, or on other documents")
    sizes = [each["cache_bytes"][PATCHED] / each["cache_bytes"][UNPATCHED] for each in (before, now)]
    if sizes[1] > sizes[0] * (1 + _BYTES):
        problems.append(f"the cache grew from {sizes[0]:.4g} to {sizes[1]:.4g} of the unpatched one")
    return GateChange(name, now["patches"], before["speedup"]["value"], now["speedup"]["value"], change, ppl_change, problems)


def _ppl_change(before: dict[str, Any] | None, now: dict[str, Any] | None) -> float | None:
    """Ratio of perplexities; exact, without an interval, because the documents are the same."""
    if before is None or now is None or before["tokens"] != now["tokens"]:
        return None
    return (1 + float(now["increase"]["value"])) / (1 + float(before["increase"]["value"]))


def _speeds(name: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    changes = {name: median_ms(now["rounds_ms"], name) / median_ms(before["rounds_ms"], name) for name in (UNPATCHED, PATCHED)}
    if all(1 / _SPEED < change < _SPEED for change in changes.values()):
        return []
    slower = ", ".join(f"{change:.3g} times as long {variant}" for variant, change in changes.items())
    return [f"{name}: a token takes {slower}: the machine's own speed has changed"]


def _differences(before: SavedRun, now: SavedRun, names: list[str], facts: tuple[str, ...]) -> list[str]:
    found = []
    for fact in facts:
        old, new = ({str(run[name]["environment"][fact]) for name in names} for run in (before, now))
        if old != new:
            found.append(f"{fact}: {', '.join(sorted(old))} -> {', '.join(sorted(new))}")
    return found
