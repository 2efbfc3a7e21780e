"""Gates on the bundled model through `patch_gate`, and the gate itself on a real clock: false alarms, and slowdowns that it catches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.gates.gate import time_interleaved
from patchkit.gates.result import PATCHED, UNPATCHED, Bounds, violations
from patchkit.measure.latency import DecodeStream, filled_cache
from patchkit.measure.paired import median_ratio
from patchkit.models import load_model
from patchkit.pytest_plugin import PatchGate
from patchkit.views import twin

RUNS, SLOWER, BAR = 20, 1.2, 0.9


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("bundled")


def test_streaming(patch_gate: PatchGate, bundled: Any) -> None:
    patch_gate(bundled[0], "streaming(window=252)", context=16384, min_speedup=3, max_ppl_increase=0.03)


def test_mlp_int8(patch_gate: PatchGate, bundled: Any) -> None:
    # On a model of this size there is little to gain: the gate is that nothing is lost.
    patch_gate(bundled[0], "mlp_int8", min_speedup=0.9, max_ppl_increase=0.01)


def test_speculative(patch_gate: PatchGate, bundled: Any) -> None:
    patch_gate(bundled[0], "speculative(draft='stdlib-1m-draft')", context=128, min_speedup=1.3)


@dataclass
class Slowed(DecodeStream):
    """Every step spins for a share of its own time."""

    slower: float

    def step(self) -> float:
        ms = super().step()
        started = time.perf_counter()
        while 1000 * (time.perf_counter() - started) < (self.slower - 1) * ms:
            pass
        return ms + 1000 * (time.perf_counter() - started)


def test_the_gate_on_a_real_clock(benchmark: Any, record: Callable[..., None], bundled: Any) -> None:
    """The same model both ways, and slowed by 20 %."""
    model = bundled[0]

    def alarms(slower: float) -> tuple[int, list[float]]:
        found, widths = 0, []

        def ways() -> dict[str, DecodeStream]:
            first, second = (DecodeStream(twin(model), filled_cache(model, 256)) for _ in range(2))
            return {UNPATCHED: first, PATCHED: Slowed(second.model, second.cache, slower)}

        for _ in range(RUNS):
            timings = time_interleaved(ways).rounds_ms
            ratio = median_ratio(timings[UNPATCHED], timings[PATCHED])
            found += bool(violations(Bounds(min_speedup=BAR), ratio, None))
            widths.append(ratio.high - ratio.low)
        return found, widths

    (false, widths), (caught, _) = benchmark.pedantic(lambda: (alarms(1.0), alarms(SLOWER)), rounds=1, iterations=1)
    record(
        "gate_on_a_real_clock",
        caught,
        f">= {0.95 * RUNS:g} of {RUNS} slowdowns of 20 % caught, 0 false alarms",
        what=f"runs in which a gate with min_speedup={BAR} fails, stdlib-7m, one way slowed by 20 %",
        false_alarms=false,
        runs=RUNS,
        width_of_the_interval=statistics.median(widths),
    )
    assert false == 0 and caught >= 0.95 * RUNS
