"""The search on simulated machines with known best specs, and the measurer on a tiny model. No clock is compared with anything."""

from __future__ import annotations

import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import matrix
from typer.testing import CliRunner

from patchkit import patch_model, patched, report
from patchkit.anatomy.target import Target
from patchkit.cli import app
from patchkit.errors import PatchConflict, PatchError, SpecError, UnsupportedModel
from patchkit.gates.gate import perplexity_increase
from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import TextError
from patchkit.models import load_model
from patchkit.patch import Patch, Stage, available_patches
from patchkit.patches.mlp_int8 import MLPInt8
from patchkit.patches.speculative import Speculative
from patchkit.patches.streaming import StreamingLLM
from patchkit.search import measurer as measurer_module
from patchkit.search import tune as quality
from patchkit.search.budget import OutOfTime
from patchkit.search.candidate import Candidate, Lost
from patchkit.spec import parse_spec
from patchkit.testing import assert_restored, snapshot, tiny_model

BOUND = 0.01


# -- a simulated machine ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option(Patch):
    """An option of a patch that exists only here: its speed-up and its nats per token are known."""

    stage = Stage.WEIGHTS
    patch: str = "a"
    number: int = 0

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.patch

    @property
    def spec(self) -> str:
        return f"{self.patch}{self.number}"


@dataclass
class Machine:
    """Speeds multiply and nats add, but for ``together``; times drift and have noise; documents differ. Measuring takes time."""

    speeds: dict[str, float]
    nats: dict[str, float] = field(default_factory=dict)
    together: dict[frozenset[str], float] = field(default_factory=dict)
    plain_nats: float = 0.0
    raises: dict[str, Callable[[], BaseException]] = field(default_factory=dict)
    seed: int = 0
    noise: float = 0.1
    setup_s: float = 2.0
    documents: int = 16
    rounds: int = 6
    now: float = 0.0
    held: set[str] = field(default_factory=set)
    timed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def clock(self) -> float:
        return self.now

    def speed(self, names: Iterable[str]) -> float:
        names = frozenset(names)
        factors = [factor for group, factor in self.together.items() if group <= names]
        return math.prod(self.speeds[name] for name in names) * math.prod(factors)

    def cost(self, names: Iterable[str]) -> float:
        return self.plain_nats + sum(self.nats.get(name, 0.0) for name in names)

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        names = [patch.spec for patch in patches]
        self.timed.append("+".join(names))
        for name in names:
            if name in self.raises:
                raise self.raises[name]()
        if "+".join(names) not in self.held:
            self.held.add("+".join(names))
            self.now += self.setup_s
        count = max(4, min(rounds, int(seconds)))
        self.now += count
        drift = 10 * np.exp(self.random.normal(0, 0.3, count))
        noise = np.exp(self.random.normal(0, self.noise, (2, count)))
        return list(drift * noise[0]), list(drift / self.speed(names) * noise[1])

    def increase(self, patches: tuple[Patch, ...], documents: int) -> Interval:
        self.now += 0.1 * documents
        names = [patch.spec for patch in patches]
        spread = np.random.default_rng(len("".join(names))).normal(0, 0.004, self.documents) if self.cost(names) else np.zeros(16)
        own = (self.cost(names) + spread - spread.mean())[:documents]
        difference = mean_difference(list(own), [0.0] * documents)
        return Interval(*(math.expm1(nats) for nats in (difference.value, difference.low, difference.high)))

    def idle(self, patches: tuple[Patch, ...]) -> list[str]:
        return []

    def drop(self, patches: tuple[Patch, ...]) -> None:
        self.held.discard("+".join(patch.spec for patch in patches))


def options(machine: Machine) -> list[Option]:
    return [Option(name[0], int(name[1:])) for name in machine.speeds]


def searched(machine: Machine, seconds: float = 2000, bound: float = BOUND) -> tuple[quality.Search, Candidate]:
    search = quality.Search(machine, bound, seconds, machine.clock)
    return search, search.run(options(machine))


def names_of(row: Candidate) -> list[str]:
    return [patch.spec for patch in row.patches]


def landscape(seed: int) -> Machine:
    """Four patches of up to four options; some options cost quality, one pair gains less together."""
    random = np.random.default_rng(seed)
    speeds = {f"{name}{i}": float(random.uniform(0.8, 1.7)) for name in "abcd" for i in range(random.integers(1, 5))}
    nats = {name: float(random.choice([0.0, 0.001, 0.004, 0.03])) for name in speeds}
    pair = frozenset(random.choice(list(speeds), 2, replace=False))
    return Machine(speeds, nats, {pair: 0.7}, seed=seed)


def best_speed(machine: Machine) -> float:
    """By trying everything, without noise; quality by its interval on all documents, as the search must."""
    groups: dict[str, list[str]] = {}
    for name in machine.speeds:
        groups.setdefault(name[0], []).append(name)
    found = 1.0
    for chosen in itertools.product(*([None, *group] for group in groups.values())):
        spec = [name for name in chosen if name]
        if machine.increase(tuple(Option(name[0], int(name[1:])) for name in spec), 16).high <= BOUND:
            found = max(found, machine.speed(spec))
    return found


@pytest.mark.parametrize("count", [8, matrix(20)])
def test_finds_the_best_of_known_landscapes(count: int) -> None:
    shares = []
    for seed in range(count):
        machine = landscape(seed)
        _, best = searched(machine)
        assert best.increase is not None and best.increase.high <= BOUND
        shares.append(machine.speed(names_of(best)) / best_speed(machine))
    assert np.median(shares) >= 0.99 and np.mean(np.array(shares) >= 0.95) >= 0.9


def test_without_noise_and_limit_it_is_the_best_itself() -> None:
    machine = Machine({"a0": 1.5, "a1": 1.2, "b0": 1.3, "c0": 0.95, "d0": 0.5}, {"a1": 0.001}, noise=0.0, seed=1)
    search, best = searched(machine)
    assert names_of(best) == ["a0", "b0"] and best.lost is None
    lost = {row.spec: row.lost for row in search.candidates if row is not best}
    assert all(lost.values()) and lost["c0"].kind == lost["d0"].kind == "slower" and lost["a1"].kind == "beaten"
    assert "0.95" in lost["c0"].why and lost["none"].kind == "beaten" and "1.95" in lost["a1"].why
    # what is hopeless alone is in no combination; what is only a little slower is tried
    assert not any("d0" in row.spec and len(row.patches) > 1 for row in search.candidates) and "a0 + c0" in lost
    assert machine.held == {
        "+".join(names_of(row)) for row in search.candidates if row.patches and not (row.lost and row.lost.kind == "slower")
    }


def test_a_pair_that_does_not_go_together_loses_to_another_option() -> None:
    machine = Machine({"a0": 1.5, "a1": 1.45, "b0": 1.5}, together={frozenset({"a0", "b0"}): 0.6}, noise=0.01)
    _, best = searched(machine)
    assert names_of(best) == ["a1", "b0"]


def test_quality_beyond_the_bound_never_wins() -> None:
    machine = Machine({"a0": 3.0, "a1": 2.0, "b0": 1.5, "b1": 1.2}, {"a0": 0.05, "a1": 0.006, "b0": 0.006, "b1": 0.001})
    search, best = searched(machine)
    assert names_of(best) == ["a1", "b1"] or names_of(best) == ["a1"]
    rows = {row.spec: row for row in search.candidates}
    assert rows["a0"].lost is not None and rows["a0"].lost.kind == "beyond the bound" and "+5." in rows["a0"].lost.why
    assert rows["a1 + b0"].lost is not None and rows["a1 + b0"].lost.kind == "beyond the bound"


def test_an_interval_that_reaches_over_the_bound_is_beyond_it() -> None:
    machine = Machine({"a0": 2.0, "b0": 1.2}, {"a0": 0.0099})
    search, best = searched(machine)
    row = next(row for row in search.candidates if row.spec == "a0")
    assert row.increase is not None and row.increase.value < BOUND < row.increase.high and row.documents == 16
    assert names_of(best) == ["b0"] and row.lost is not None and row.lost.kind == "beyond the bound"


def test_when_nothing_pays_no_patch_is_chosen() -> None:
    machine = Machine({"a0": 0.9, "b0": 1.0, "c0": 5.0}, {"c0": 1.0})
    search, best = searched(machine)
    assert best.spec == "none" and best is search.candidates[0]
    assert {row.spec: row.lost.kind for row in search.candidates if row.lost}["c0"] == "beyond the bound"
    assert all(row.lost for row in search.candidates if row is not best)


def test_beyond_the_models_positions_what_mends_the_quality_wins_even_if_slower() -> None:
    """There no patch is beyond the bound itself, and so is a patch that alone changes nothing about that."""
    machine = Machine({"a0": 0.95, "b0": 1.5}, {"a0": -2.0, "b0": 0.002}, plain_nats=2.0, noise=0.01)
    search, best = searched(machine)
    assert names_of(best) == ["a0", "b0"]
    assert search.candidates[0].lost is not None and search.candidates[0].lost.kind == "beyond the bound"
    assert names_of(searched(Machine({"a0": 0.95}, {"a0": -2.0}, plain_nats=2.0))[1]) == ["a0"]
    assert searched(Machine({"b0": 1.5}, {"b0": 0.002}, plain_nats=2.0))[1].spec == "none"


@pytest.mark.parametrize("seconds", [3, 10, 40, 120, 400])
def test_nothing_is_begun_after_the_time(seconds: float) -> None:
    machine = landscape(4)
    search, best = searched(machine, seconds)
    longest = machine.setup_s + 4 + 1.6
    assert machine.now <= seconds + longest
    untried = [row for row in search.candidates if not row.patched_ms and row.patches and row.lost and row.lost.kind == "no time"]
    assert bool(untried) == (seconds <= 120) and best.lost is None


def test_what_a_candidate_raises_is_its_reason() -> None:
    errors: dict[str, Callable[[], BaseException]] = {
        "a0": lambda: UnsupportedModel("this one is refused"),
        "b0": lambda: RuntimeError("broke"),
        "c0": lambda: PatchConflict("not beside that"),
        "d0": lambda: OutOfTime("patching took over 9 s"),
    }
    machine = Machine(dict.fromkeys(["a0", "b0", "c0", "d0", "e0"], 1.5), raises=errors)
    search, best = searched(machine)
    assert names_of(best) == ["e0"]
    lost = {row.spec: (row.lost.kind, row.lost.why) for row in search.candidates if row.lost and row.patches}
    assert lost == {
        "a0": ("refused", "this one is refused"),
        "b0": ("error", "RuntimeError: broke"),
        "c0": ("conflict", "not beside that"),
        "d0": ("no time", "patching took over 9 s"),
    }


@dataclass
class Jealous(Machine):
    """Two of its patches do not go together."""

    def time(self, patches: tuple[Patch, ...], rounds: int, seconds: float) -> tuple[list[float], list[float]]:
        if {"a0", "b0"} <= {patch.spec for patch in patches}:
            self.timed.append("+".join(patch.spec for patch in patches))
            raise PatchConflict("not these two")
        return super().time(patches, rounds, seconds)


def test_what_fails_in_a_pair_is_not_tried_in_a_larger_combination() -> None:
    machine = Jealous({"a0": 1.5, "b0": 1.4, "c0": 0.97}, noise=0.001)  # the pair promises more than the three
    search, best = searched(machine)
    lost = {row.spec: row.lost for row in search.candidates}
    assert lost["a0 + b0"] == Lost("conflict", "not these two")
    assert lost["a0 + b0 + c0"] == Lost("conflict", "holds a0 + b0: not these two") and "a0+b0+c0" not in machine.timed
    assert names_of(best) == ["a0"]


def test_ctrl_c_keeps_what_is_known() -> None:
    machine = Machine({"a0": 1.5, "b0": 1.2, "c0": 2.0}, raises={"c0": KeyboardInterrupt})
    search, best = searched(machine)
    assert search.stopped and names_of(best) == ["a0"]
    assert [row.lost.kind for row in search.candidates if row.lost] == ["beaten", "beaten", "no time"]
    with pytest.raises(KeyboardInterrupt):
        searched(Machine({"a0": 1.5}, raises={"a0": KeyboardInterrupt}))


def test_the_same_measurements_give_the_same_search() -> None:
    first, second = (searched(landscape(7))[0] for _ in range(2))
    assert [row.to_dict() for row in first.candidates] == [row.to_dict() for row in second.candidates]


def test_of_equals_the_one_with_fewer_patches() -> None:
    assert names_of(searched(Machine({"a0": 1.5, "b0": 1.001}, noise=0.0))[1]) == ["a0"]


# -- the measurer ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def texts(length: int, count: int = 4) -> list[torch.Tensor]:
    return list(torch.randint(4, 100, (count, length), generator=torch.Generator().manual_seed(1)))


def measurer(model: Any, length: int = 90, objective: quality.Objective = "decode", seconds: float = 600) -> quality.ModelMeasurer:
    return quality.ModelMeasurer(model, texts(length), 40, objective, seconds)


def test_quality_is_that_of_the_gate(model: Any) -> None:
    before, measured = snapshot(model), measurer(model)
    patches = (StreamingLLM(2, 20), MLPInt8("weight_only"))
    for count in (2, 4):  # the second time only two documents more are scored
        view = patch_model(tiny_model("llama"), *patches, verbose=False)
        expected = perplexity_increase(tiny_model("llama"), view, texts(90)[:count]).increase
        found = measured.increase(patches, count)
        assert vars(found) == pytest.approx(vars(expected), rel=1e-5) and abs(found.value) > 1e-4
    assert measured.increase((), 4) == Interval(0.0, 0.0, 0.0) and measured.reference == "the unpatched model"
    assert_restored(before, model)


def test_beyond_its_positions_the_reference_starts_anew() -> None:
    short = tiny_model("llama")
    short.config.max_position_embeddings = 32
    measured = measurer(short)
    assert "restarted every 32 tokens" in measured.reference
    expected = perplexity_increase(tiny_model("llama"), tiny_model("llama"), texts(90), 32).increase
    assert vars(measured.increase((), 4)) == pytest.approx(vars(expected), rel=1e-5) and abs(expected.value) > 1e-4


def test_patches_that_promise_the_same_logits_cost_no_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measurer(model, objective="generate")
    expected = measured.increase((MLPInt8(),), 4)
    monkeypatch.setattr(measurer_module, "stream_nll", None)
    assert measured.increase((MLPInt8(), Speculative()), 4) == expected
    with pytest.raises(UnsupportedModel, match=r"topk_agree.*changes what generate writes"):
        measured.increase((Speculative(acceptance="topk_agree(2)"),), 4)


@pytest.mark.parametrize("objective", ["decode", "generate"])
def test_times_are_pairs(model: Any, objective: quality.Objective) -> None:
    before, measured = snapshot(model), measurer(model, objective=objective)
    patches = (StreamingLLM(2, 20),)
    unpatched, own = measured.time(patches, 6, 60.0)
    assert len(unpatched) == len(own) == 6 and min(unpatched + own) > 0
    assert len(measured.time(patches, 100, 0.0)[0]) == 2
    assert measured.idle(patches) == [] and len(measured.views) == 1
    assert measured.idle((StreamingLLM(2, 400),)) == ["streaming"]
    measured.drop(patches)
    assert len(measured.views) == 1
    assert_restored(before, model)


def test_setting_up_is_cut_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = measurer(model)
    measured.setup_s = 0.05
    monkeypatch.setattr(measured, "_view", lambda patches: time.sleep(60))
    with pytest.raises(OutOfTime, match="patching and warming up took over 0 s"):
        measured.time((MLPInt8(),), 4, 1.0)
    measured.deadline = 0.0
    with pytest.raises(OutOfTime, match="the time was over while scoring"):
        measured.increase((), 4)


def test_a_verdict_says_that_the_time_ran_out() -> None:
    scored, few = Interval(0.0, 0.0, 0.0), parse_spec("compile + speculative")
    rows = [Candidate((), increase=scored), Candidate((few[0],), lost=Lost("no time", "not tried"))]
    settings = {"max_ppl_increase": 0.01}
    made = quality.Tuning(rows[0], rows, {}, settings, 1.0, False)
    assert "time ran out" in made.summary and "1 were not measured" in made.summary
    rows[1].lost = Lost("slower", "0.9 times the unpatched speed")
    assert made.summary.startswith("nothing pays")


def test_candidates_come_from_the_patches() -> None:
    target = Target(tiny_model("llama"))
    tried, untried = quality.single_patches(target, "generate", parse_spec("linear(window=8)"), ["compile"])
    assert {patch.name for patch in tried} | set(untried) == set(available_patches())
    assert {patch.name for patch in tried[:2]} == {"gemv", "speculative"} and "linear(window=8)" in [patch.spec for patch in tried]
    assert untried.pop("prefix_cache").startswith("it declares nothing to try")
    assert untried == {"compile": "left out (--without)"}
    for patch in tried:
        assert parse_spec(patch.spec) == [patch]
    assert {"linear", "speculative"} <= set(quality.single_patches(target, "decode")[1])
    everything = quality.single_patches(target, "generate")[0]
    assert [patch.stage is Stage.COMPILE for patch in everything[:8]] == [False] * 7 + [True]  # first options, compilation last
    short, why = quality.single_patches(target, "generate", tokens=20)
    assert not any(patch.name == "streaming" for patch in short) and "20 tokens" in why["streaming"]
    assert {patch.name for patch in short} == {patch.name for patch in everything} - {"streaming", "memory"}
    limit = target.position_limit or math.inf
    assert all(patch.capacity <= limit for patch in tried if isinstance(patch, StreamingLLM))
    with pytest.raises(SpecError, match="unknown patch 'streeming'"):
        quality.single_patches(target, "decode", without=["streeming"])
    with pytest.raises(SpecError, match="cannot be written in a spec file"):
        quality.single_patches(target, "decode", [Speculative(draft=tiny_model("llama"))])


def test_only_the_bundled_model_is_tried_with_what_was_trained_for_it() -> None:
    assert [patch.spec for patch in Speculative.candidates(Target(tiny_model("llama")))] == ["speculative"]
    bundled = Speculative.candidates(Target(load_model("bundled")[0]))
    drafts = ("draft=eagle", "draft=medusa", "draft='stdlib-1m-draft'")
    assert [patch.spec for patch in bundled] == ["speculative", *(f"speculative({draft})" for draft in drafts)]


# -- the whole -------------------------------------------------------------------------------------------------------------------


def tuned(model_dir: Path, out: Path, *arguments: str) -> Any:
    quick = ("--minutes", "0.25", "--context", "24", "--without", "compile", "--objective", "decode")
    return CliRunner().invoke(app, ["tune", str(model_dir), "--out", str(out), *quick, *arguments])


def test_the_command_writes_a_spec_that_patch_model_reads(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.spec"
    result = tuned(model_dir, out, "--max-ppl-increase", "500%", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["max_ppl_increase"] == 5 and found["environment"]["torch"] and found["context"] == 24
    assert [row["spec"] for row in found["rows"] if row["lost"] is None] == [found["best"]["spec"]]
    assert all(row["lost"]["why"] for row in found["rows"] if row["lost"])
    assert found["untried"].keys() == {"compile", "linear", "prefix_cache", "speculative"}
    with patched(load_model(model_dir)[0], out, verbose=False) as model:
        assert [entry.spec for entry in report(model).patches] == [patch.spec for patch in parse_spec(found["best"]["spec"])]


def test_what_is_printed(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.py"
    text.write_text("import os\n\n\ndef join(*parts):\n    return os.sep.join(parts)\n" * 60)
    shown = tuned(model_dir, tmp_path / "tuned.spec", "--text", str(text))
    assert shown.exit_code == 0, shown.stderr
    assert "chosen" in shown.stdout and "none" in shown.stdout and "not tried: linear: " in shown.stdout and "written to" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text", "missing.txt"), "no such text file"),
        (("--text", "SHORT"), r"documents of \d+ tokens.*longer text, or a smaller --context"),
        (("--max-ppl-increase", "much"), "is not a share such as 1%"),
        (("--also", "streeming"), "unknown patch"),
        (("--without", "streeming"), "unknown patch"),
        (("--out", "missing/tuned.spec"), "does not exist"),
    ],
)
def test_bad_input_ends_in_a_line(arguments: tuple[str, str], message: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("import os\n")
    given = [str(tmp_path / "short.txt") if word == "SHORT" else word for word in arguments]
    result = tuned(model_dir, tmp_path / "tuned.spec", *given)
    assert result.exit_code in (1, 2) and "Traceback" not in result.stderr
    assert re.search(message, " ".join(result.stderr.replace("│", " ").split()))
    assert not list(tmp_path.glob("*.spec"))


def test_a_position_table_that_ends_and_a_patched_model() -> None:
    gpt2 = tiny_model("gpt2")
    with pytest.raises(UnsupportedModel, match="position table ends"):
        quality.ModelMeasurer(gpt2, texts(2000), 1900, "decode", 60)
    with pytest.raises(PatchConflict, match="already patched"):
        measurer(patch_model(tiny_model("llama"), MLPInt8(), verbose=False))
    with pytest.raises(PatchError, match="give more --minutes"):
        quality.Search(measurer(tiny_model("llama"), seconds=1e-9), BOUND, 1.0).run([])
    with pytest.raises(TextError, match="longer --text"):
        quality.documents(load_model("bundled")[1], "stdlib", 10**6)
