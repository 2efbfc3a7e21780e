"""The gate: how often its verdict is right under noise, what it refuses to measure, and how two runs are compared. No real clock."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

from patchkit import Patch, PatchError, Stage, patch, patch_model, register_patch
from patchkit.cli import app
from patchkit.gates.gate import BLOCK, perplexity_increase, run_gate, time_interleaved
from patchkit.gates.result import PATCHED, UNPATCHED, Bounds, GateError, violations
from patchkit.gates.runs import compare, speedup_change
from patchkit.measure import calls
from patchkit.measure.latency import DecodeStream, Timings, decode_latency
from patchkit.measure.paired import Interval, median_ratio
from patchkit.patches.speculative import Speculative
from patchkit.testing import assert_restored, snapshot, tiny_model
from patchkit.views import twin

pytest_plugins = ["pytester"]

SLOWER = 1.2
PLUGINS = ("-p", "pytest_benchmark.plugin", "-p", "patchkit.pytest_plugin")


# -- the self-test: a simulated clock ---------------------------------------------------------------------------------------


class Machine:
    """A clock of a shared machine: its speed wanders and swings, other tenants come and go, single steps have outliers without a mean."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.drift, self.spent, self.crowd = 0.0, 0.0, 1.0
        self.phase = self.random.uniform(0, 2 * np.pi)

    def spend(self, ms: float) -> float:
        self.drift = 0.98 * self.drift + self.random.normal(0, 0.03)
        swing = 0.3 * np.sin(2 * np.pi * self.spent / 3000 + self.phase)
        if self.crowd > 1 and self.random.random() < 0.15:
            self.crowd = 1.0
        elif self.random.random() < 0.03:
            self.crowd = self.random.uniform(1.3, 4)
        outlier = 1 + self.random.pareto(1) if self.random.random() < 0.05 else 1.0
        took = ms * np.exp(self.drift + swing + self.random.normal(0, 0.07)) * self.crowd * outlier
        self.spent += took
        return float(took)


@dataclass
class Simulated(DecodeStream):
    machine: Machine
    ms: float

    def step(self) -> float:
        return self.machine.spend(self.ms)


@functools.cache
def simulated(seed: int, slower: float = 1.0, speedup: float = 1.0) -> Timings:
    machine = Machine(seed)
    ways = {UNPATCHED: Simulated(None, None, machine, 10.0), PATCHED: Simulated(None, None, machine, 10.0 / speedup * slower)}
    return time_interleaved(lambda: ways).rounds_ms


def fails(timings: Timings, bar: float) -> bool:
    return bool(violations(Bounds(min_speedup=bar), median_ratio(timings[UNPATCHED], timings[PATCHED]), None))


@pytest.mark.parametrize("speedup", [1.0, 4.0])
def test_a_gate_has_one_false_alarm_in_100_and_catches_95_slowdowns_of_20_percent(speedup: float) -> None:
    assert sum(fails(simulated(seed, 1.0, speedup), 0.9 * speedup) for seed in range(100)) <= 1
    assert sum(fails(simulated(seed, SLOWER, speedup), 0.9 * speedup) for seed in range(100)) >= 95


def test_two_runs_have_one_false_alarm_in_100_and_show_95_slowdowns_of_20_percent() -> None:
    def alarms(slower: float) -> int:
        found = (compare({"a": entry(simulated(seed))}, {"a": entry(simulated(1000 + seed, slower))}) for seed in range(100))
        return sum(bool(comparison.problems) for comparison in found)

    assert alarms(1.0) <= 1
    assert alarms(SLOWER) >= 95


def test_without_turns_the_same_clock_raises_false_alarms() -> None:
    """The noise is such that timing one way after the other would not do."""

    def one_after_the_other(seed: int) -> Timings:
        machine = Machine(seed)
        return {name: decode_latency({name: Simulated(None, None, machine, 10.0)}, BLOCK)[name] for name in (UNPATCHED, PATCHED)}

    assert sum(fails(one_after_the_other(seed), 0.9) for seed in range(100)) > 20


def test_the_worse_end_of_the_interval_counts() -> None:
    bounds = Bounds(min_speedup=2, max_ppl_increase=0.03)
    assert violations(bounds, Interval(2.5, 2.0, 3.0), Interval(0.01, -0.1, 0.03)) == []
    speed, quality = violations(bounds, Interval(2.5, 1.99, 3.0), Interval(0.01, -0.1, 0.031))
    assert "min_speedup=2" in speed and "too noisy" in speed and "max_ppl_increase=0.03" in quality and "too few documents" in quality
    assert len(violations(bounds, Interval(*[float("nan")] * 3), Interval(*[float("nan")] * 3))) == 2
    assert len(violations(bounds, Interval(3, 2.5, 3.5), None)) == 1


# -- what is measured -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(3, 128, (40 + 5 * index,), generator=random).tolist() for index in range(6)]


def test_a_gate_measures_and_leaves_the_model_alone(documents: list[list[int]]) -> None:
    model = tiny_model("llama").train()
    before, state = snapshot(model), torch.get_rng_state()
    bounds = Bounds(min_speedup=1e-6, max_ppl_increase=1e6)
    found = run_gate(model, "streaming(sinks=2, window=6) + mlp_int8", bounds, context=48, rounds=20, documents=documents)
    assert found.failures == []
    assert_restored(before, model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert found.timed == "decode" and {name: len(times) for name, times in found.rounds_ms.items()} == {UNPATCHED: 20, PATCHED: 20}
    assert found.hits["streaming"]["tokens evicted"] == found.hits["mlp_int8"]["forwards"] == 20
    assert found.cache_bytes[UNPATCHED] > 3 * found.cache_bytes[PATCHED]
    assert found.perplexity is not None and found.perplexity.tokens == [min(len(each), 48) - 1 for each in documents]
    assert found.perplexity.increase.value != 0
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["passed"] and plain["environment"]["torch"] and plain["tokens_per_s"][PATCHED] > 0


def test_what_acts_in_generate_is_timed_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "NEW_TOKENS", 4)
    patches = Speculative(draft=tiny_model("llama", seed=1), k=2)
    found = run_gate(
        tiny_model("llama"),
        patches,
        Bounds(min_speedup=1e-6),
        context=32,
        rounds=20,
        documents=[list(range(first, first + 100)) for first in range(3, 7)],
    )
    hits = found.hits["speculative"]
    assert found.timed == "generate" and found.failures == [] and hits["tokens"] >= 20 * 3
    assert found.acceptance == hits["accepted"] / hits["proposed"]


def test_the_increase_is_that_of_the_definition(documents: list[list[int]]) -> None:
    """Against logits of one forward without a cache; the unpatched model starts anew every 16 tokens."""
    model = tiny_model("llama")
    view = patch_model(twin(model), "mlp_int8", verbose=False)
    texts = [torch.tensor(each) for each in documents]
    found = perplexity_increase(model, view, texts, limit=16)

    def nll(each: Any, ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = each(input_ids=ids[None], use_cache=False).logits[0, :-1]
        return -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]

    for text, plain, patched in zip(texts, found.unpatched_nll, found.patched_nll, strict=True):
        pieces = torch.cat([nll(model, text[start : start + 17]) for start in range(0, len(text) - 1, 16)])
        assert len(pieces) == len(text) - 1
        assert plain == pytest.approx(pieces.mean().item(), abs=1e-4) and patched == pytest.approx(nll(view, text).mean().item(), abs=1e-4)
    total = sum(n * (b - a) for n, a, b in zip(found.tokens, found.unpatched_nll, found.patched_nll, strict=True)) / sum(found.tokens)
    assert found.increase.value == pytest.approx(np.expm1(total)) and found.increase.low < found.increase.high


@pytest.mark.parametrize(
    "options, says",
    [
        (
            dict(patches="streaming(sinks=2, window=60)", context=16),
            "streaming never acted while it was timed: no count of 'tokens evicted'",
        ),
        (dict(patches="speculative(k=0)", context=16), "speculative never acted while it was timed: no count of 'proposed'"),
        (
            dict(patches="streaming(sinks=2, window=44)", context=48, max_ppl_increase=9.0),
            "streaming never acted while perplexity was measured",
        ),
    ],
)
def test_a_patch_that_did_not_act_fails(
    options: dict[str, Any], says: str, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "NEW_TOKENS", 2)
    bounds = Bounds(1e-9, options.pop("max_ppl_increase", None))
    given = documents if bounds.max_ppl_increase is None else [each[:40] for each in documents]
    found = run_gate(tiny_model("llama"), bounds=bounds, rounds=20, documents=given, **options)
    assert [failure for failure in found.failures if says in failure], found.failures


def test_a_patch_that_counts_nothing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_registry", dict(patch.available_patches()))

    @register_patch("uncounted")
    @dataclass(frozen=True)
    class Uncounted(Patch):
        stage = Stage.WEIGHTS
        note: list[int] = field(default_factory=list)

        def apply(self, target: Any, handle: Any) -> None:
            handle.record.changed("nothing")

    assert run_gate(tiny_model("llama"), "uncounted", Bounds(1e-9), rounds=20).failures == [
        "uncounted never acted while it was timed: no count of anything"
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(bounds={}), "a gate without a bound cannot fail"),
        (dict(bounds=dict(min_speedup=0)), "min_speedup=0 bounds nothing"),
        (dict(bounds=dict(min_speedup=float("nan"))), "min_speedup=nan bounds nothing"),
        (dict(bounds=dict(max_ppl_increase=float("inf"))), "max_ppl_increase=inf bounds nothing"),
        (dict(bounds=dict(min_speedup=True)), "min_speedup=True bounds nothing"),
        (dict(rounds=5), "rounds=5 are too few"),
        (dict(rounds=20.5), "rounds=20.5: give a whole number"),
        (dict(context="48"), "context='48': give a whole number"),
        (dict(context=0), "context=0"),
        (dict(patches="straming"), "did you mean 'streaming'"),
        (dict(patches="compile(backend=eager)", bounds=dict(max_ppl_increase=0.1)), "leaves every logit as it is"),
        (dict(patches="mlp_int8", bounds=dict(max_ppl_increase=0.1)), "no tokenizer next to"),
        (dict(patches="mlp_int8", bounds=dict(max_ppl_increase=0.1), documents=[[5, 6, 7]]), "1 of 1 documents"),
        (dict(patches="mlp_int8", bounds=dict(max_ppl_increase=0.1), documents=[[5, 6, 7]] * 9), "1 of 9 documents differ"),
        (dict(patches="speculative", documents=[[5, 6, 7]] * 9, context=8), "0 of 9 documents differ and have 8 tokens"),
        (dict(model="bundled"), "'bundled' is not a model"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(arguments: dict[str, Any], says: str) -> None:
    given = {"model": tiny_model("llama"), "patches": "streaming(sinks=1, window=4)", **arguments}
    with pytest.raises(PatchError, match=None) as error:
        bounds = Bounds(**given.pop("bounds", dict(min_speedup=1)))
        run_gate(bounds=bounds, **given)
    assert says in str(error.value)


def test_a_patched_model_and_a_short_position_table_are_refused() -> None:
    model = patch_model(tiny_model("llama"), "mlp_int8", verbose=False)
    with pytest.raises(PatchError, match="already patched with mlp_int8"):
        run_gate(model, "streaming(window=4)", Bounds(1))
    with pytest.raises(PatchError, match="position table ends"):
        run_gate(tiny_model("gpt2"), "mlp_int8", Bounds(1), context=2000)


# -- the plug-in ------------------------------------------------------------------------------------------------------------

GATE = """
def test_gate(patch_gate):
    from patchkit.testing import tiny_model
    patch_gate(tiny_model("llama"), "streaming(sinks=2, window=6)", context=48, rounds=20, {bounds})
"""
PASSING, FAILING = GATE.format(bounds="min_speedup=1e-6"), GATE.format(bounds="min_speedup=1e6")

Inner = Callable[..., pytest.RunResult]


@pytest.fixture
def inner(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Inner:
    """Run a test file under the plug-in and pytest-benchmark, and no other plug-in."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the inner run is not one of xdist's, whatever runs this test

    def run(source: str, *options: str, plugins: tuple[str, ...] = PLUGINS) -> pytest.RunResult:
        pytester.makepyfile(source)
        return pytester.runpytest_inprocess(*plugins, *options)

    return run


def test_a_gate_passes_and_fails_in_pytest(inner: Inner, tmp_path: Path) -> None:
    inner(PASSING, f"--benchmark-json={tmp_path / 'run.json'}").assert_outcomes(passed=1)
    (saved,) = json.loads((tmp_path / "run.json").read_text())["benchmarks"]
    figures = saved["extra_info"]["patch_gate"]
    assert figures["passed"] and figures["patches"] == "streaming(sinks=2, window=6)" and figures["bounds"]["min_speedup"] == 1e-6
    assert saved["stats"]["rounds"] == 20 and saved["stats"]["median"] == pytest.approx(figures["ms_per_token"][PATCHED] / 1000)
    result = inner(FAILING, f"--benchmark-json={tmp_path / 'run.json'}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*its lower end is below min_speedup=1000000.0*"])
    assert json.loads((tmp_path / "run.json").read_text())["benchmarks"][0]["extra_info"]["patch_gate"]["passed"] is False


@pytest.mark.parametrize(
    "options, says",
    [
        (("--benchmark-disable",), "measured nothing, because benchmarks are disabled"),
        (("--benchmark-skip",), "measured nothing, because of --benchmark-skip"),
        (("-p", "xdist.plugin", "-n", "1"), "measured nothing, because benchmarks are disabled"),
    ],
)
def test_a_gate_that_measures_nothing_is_not_green(inner: Inner, options: tuple[str, ...], says: str) -> None:
    result = inner("def test_gate(patch_gate):\n    patch_gate(None, 'mlp_int8', min_speedup=1)\n", *options)
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"*{says}*"])


def test_a_gate_needs_the_benchmark_plugin_and_says_so(inner: Inner) -> None:
    result = inner(PASSING, plugins=("-p", "patchkit.pytest_plugin"))
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*pip install patchkit*gates*"])


@pytest.mark.parametrize(
    "body, says",
    [
        ("pass", "never called it"),
        ('patch_gate(None, "mlp_int8")', "a gate without a bound cannot fail"),
        ('patch_gate(None, "mlp_int8", min_speedup=1)', "None is not a model"),
    ],
)
def test_a_wrong_use_fails(inner: Inner, body: str, says: str) -> None:
    result = inner(f"def test_gate(patch_gate):\n    {body}\n")
    assert result.ret == 1
    result.stdout.fnmatch_lines([f"*{says}*"])


def test_a_second_gate_in_a_test_fails(inner: Inner) -> None:
    result = inner(PASSING + PASSING.splitlines()[-1])
    assert result.ret == 1
    result.stdout.fnmatch_lines(["*one gate per test*"])


def test_an_explicit_skip_stays_a_skip_and_others_notice_nothing(inner: Inner) -> None:
    skipped = "import pytest\ndef test_a(patch_gate):\n    pytest.skip('no GPU')\n"
    source = skipped + "def test_b():\n    pass\ndef test_c(benchmark):\n    benchmark(int)\n"
    inner(source).assert_outcomes(passed=2, skipped=1)
    inner(source, "--benchmark-skip", "-k", "test_b or test_c").assert_outcomes(passed=1, skipped=1)


def test_the_plugin_is_installed_and_light(pytester: pytest.Pytester) -> None:
    assert [entry.value for entry in entry_points(group="pytest11") if entry.value.startswith("patchkit")] == ["patchkit.pytest_plugin"]
    code = "import sys, patchkit.pytest_plugin; sys.exit(bool({'torch', 'transformers', 'numpy', 'pytest_benchmark'} & set(sys.modules)))"
    assert pytester.runpython_c(code).ret == 0


# -- two runs ---------------------------------------------------------------------------------------------------------------


def entry(timings: Timings, **other: Any) -> dict[str, Any]:
    """What `Gate.to_dict` has, with these times."""
    return {
        "patches": "streaming",
        "model": "a model",
        "context": 1024,
        "timed": "decode",
        "rounds_ms": timings,
        "speedup": vars(median_ratio(timings[UNPATCHED], timings[PATCHED])),
        "cache_bytes": {UNPATCHED: 1000, PATCHED: 100},
        "perplexity": {"tokens": [10, 20], "increase": {"value": 0.01}},
        "failures": [],
        "environment": dict.fromkeys(("cpu", "cores", "threads", "gpu", "platform", "python", "torch", "transformers", "patchkit"), "x"),
        **other,
    }


def saved(path: Path, run: dict[str, Any]) -> Path:
    content = [{"fullname": name, "extra_info": {"patch_gate": each}} for name, each in run.items()]
    path.write_text(json.dumps({"benchmarks": [*content, {"fullname": "other", "extra_info": {}}]}))
    return path


@pytest.fixture
def runs() -> tuple[dict[str, Any], dict[str, Any]]:
    return {"t.py::a": entry(simulated(0))}, {"t.py::a": entry(simulated(1))}


def gate(tmp_path: Path, before: dict[str, Any], now: dict[str, Any], *options: str) -> Result:
    arguments = ["gate", "--baseline", saved(tmp_path / "before.json", before), saved(tmp_path / "now.json", now), *options]
    return CliRunner().invoke(app, [str(each) for each in arguments])


def test_runs_that_agree_pass(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result = gate(tmp_path, *runs)
    assert result.exit_code == 0, result.output
    assert "streaming" in result.stdout and "ok" in result.stdout
    found = json.loads(gate(tmp_path, *runs, "--json").stdout)
    assert found["passed"] and found["rows"][0]["change"]["low"] < 1 < found["rows"][0]["change"]["high"]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda now: now.update(rounds_ms={**now["rounds_ms"], PATCHED: [1.2 * ms for ms in now["rounds_ms"][PATCHED]]}),
            "the speed-up is 0.8",
        ),
        (lambda now: now.update(rounds_ms={way: ms[:3] for way, ms in now["rounds_ms"].items()}), "3 rounds now are too few"),
        (lambda now: now.update(rounds_ms={UNPATCHED: [1.0, 3.0, 9.0] * 10, PATCHED: [3.0] * 30}), "too noisy to tell"),
        (lambda now: now["perplexity"]["increase"].update(value=0.02), "perplexity is 1.01 of what it was"),
        (lambda now: now.update(perplexity=None), "perplexity was measured, and is not any more"),
        (lambda now: now["perplexity"].update(tokens=[10, 21]), "on other documents"),
        (lambda now: now.update(cache_bytes={UNPATCHED: 1000, PATCHED: 120}), "the cache grew from 0.1 to 0.12"),
        (lambda now: now.update(context=512), "context was 1024 and is 512: not the same gate"),
        (lambda now: now.update(failures=["its bar"]), "failed: its bar"),
    ],
)
def test_what_got_worse_is_named(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]], change: Change, says: str) -> None:
    before, now = runs
    change(now["t.py::a"])
    result = gate(tmp_path, before, now)
    assert result.exit_code == 1 and says in result.stderr, result.output
    assert "worse" in result.stdout
    assert json.loads(gate(tmp_path, before, now, "--json").stdout)["passed"] is False


def test_other_machines_are_refused_unless_asked_for(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, now = runs
    now["t.py::a"]["environment"] |= {"cpu": "another", "torch": "9"}
    now["t.py::a"]["rounds_ms"] = {way: [3 * ms for ms in times] for way, times in now["t.py::a"]["rounds_ms"].items()}
    refused = gate(tmp_path, before, now)
    assert refused.exit_code == 1 and "different machines (cpu: x -> another)" in refused.stderr
    allowed = gate(tmp_path, before, now, "--across-machines")
    assert allowed.exit_code == 0 and "cpu: x -> another" in allowed.stderr and "torch: x -> 9" in allowed.stderr
    assert "own speed" not in allowed.stderr
    now["t.py::a"]["environment"]["cpu"] = "x"
    same = gate(tmp_path, before, now)
    assert same.exit_code == 0 and "the machine's own speed has changed" in same.stderr


def test_missing_and_new_gates_are_named(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, now = runs
    now["t.py::new"] = copy.deepcopy(now["t.py::a"])
    result = gate(tmp_path, before, now)
    assert result.exit_code == 0 and "t.py::new: new, not compared" in result.stderr
    before["t.py::gone"] = before["t.py::a"]
    result = gate(tmp_path, before, now)
    assert result.exit_code == 1 and "t.py::gone: missing in the newer run" in result.stderr
    result = gate(tmp_path, {"t.py::b": before["t.py::a"]}, now)
    assert result.exit_code == 1 and "no gate is in both runs: t.py::b before, t.py::a, t.py::new now" in result.stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"benchmarks": [{}]}', '{"benchmarks": []}'])
def test_files_that_are_no_runs_are_refused(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]], content: str) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text(content)
    result = CliRunner().invoke(app, ["gate", "--baseline", str(broken), str(saved(tmp_path / "now.json", runs[1]))])
    assert result.exit_code == 1 and "--benchmark-json=FILE" in result.stderr
    missing = CliRunner().invoke(app, ["gate", "--baseline", str(tmp_path / "none.json"), str(broken)])
    assert missing.exit_code == 1 and "cannot be read" in missing.stderr


def test_a_run_beside_itself_and_a_tolerance_of_nothing_are_refused(tmp_path: Path, runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, now = runs
    same = gate(tmp_path, before, before)
    assert same.exit_code == 1 and "same measurement of t.py::a" in same.stderr
    with pytest.raises(GateError, match="no share of a speed-up"):
        compare(before, now, tolerance=float("nan"))


def test_broken_figures_are_refused(runs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    before, now = runs
    del now["t.py::a"]["rounds_ms"]
    with pytest.raises(GateError, match="missing or broken"):
        compare(before, now)


def test_the_change_of_a_speedup() -> None:
    before = {UNPATCHED: [2.0] * 20, PATCHED: [1.0] * 20}
    now = {UNPATCHED: [30.0] * 20, PATCHED: [20.0] * 20}
    assert speedup_change(before, now) == Interval(0.75, 0.75, 0.75)
