"""How `prove` is used: some promises only, what it says on the way, and what is left when it is interrupted."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import fast_first, matrix
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.models import load_model
from patchkit.prove import texts
from patchkit.prove.checks.plan import PROMISES, STEPS, UnknownPromise
from patchkit.prove.checks.quality import BEYOND_THE_WINDOW, NOT_TOO_GOOD
from patchkit.prove.proof import Proof
from patchkit.prove.prove import prove, reach_of
from patchkit.spec import parse_spec
from patchkit.testing import tiny_model

STREAMING = "streaming(sinks=2, window=10)"


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 100, (120,), generator=generator) for _ in range(3)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prove", *map(str, arguments)])


# -- some promises only ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("promise", fast_first([each for each in PROMISES if each != BEYOND_THE_WINDOW], ["it acted", NOT_TOO_GOOD]))
def test_every_promise_can_be_checked_alone(promise: str) -> None:
    spec = {"no overflow in 16 bits": "mlp_int8", "memory is bounded": STREAMING, "short texts are unpatched": STREAMING}
    spec |= {"logits are those of the definition": STREAMING}
    chosen = spec.get(promise, "speculative(k=4)")
    proof = Proof(chosen, "float32")
    prove(proof, tiny_model("llama"), parse_spec(chosen), documents(), only=[promise])
    assert {check.promise for check in proof.checks} == {promise}
    assert proof.passed and proof.only == [promise] and not proof.not_checked and not proof.speed
    assert all(check.status == "kept" for check in proof.checks)


def test_quality_alone_can_say_that_a_text_is_too_short() -> None:
    proof = Proof("streaming", "float32")
    prove(proof, tiny_model("llama"), parse_spec("streaming(window=200)"), documents(), only=[BEYOND_THE_WINDOW])
    assert [check.status for check in proof.checks] == ["not judged"] and not proof.passed


def test_an_unknown_promise_is_refused_with_the_list() -> None:
    with pytest.raises(UnknownPromise, match=r"'causal'.*no token sees a later one; any chunking"):
        prove(Proof("", "float32"), tiny_model("llama"), [], documents(), only=["causal"])
    with pytest.raises(UnknownPromise, match="did you mean 'it acted'"):
        prove(Proof("", "float32"), tiny_model("llama"), [], documents(), only=["it acts"])
    with pytest.raises(UnknownPromise, match="no promise is named"):
        prove(Proof("", "float32"), tiny_model("llama"), [], documents(), only=[])


def test_what_no_patch_promises_is_no_success() -> None:
    with pytest.raises(UnknownPromise, match="mlp_int8 makes none of the requested promises"):
        prove(Proof("mlp_int8", "float32"), tiny_model("llama"), parse_spec("mlp_int8"), documents(), only=["memory is bounded"])


def test_the_command_checks_only_what_is_asked_for(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    only = "it acted, no token sees a later one"
    result = run(model_dir, "--patches", STREAMING, "--tokens", 64, "--only", only, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["only"] == ["no token sees a later one", "it acted"] and printed["perplexity"] is None
    assert {check["promise"] for check in printed["checks"]} == set(printed["only"])
    wrong = run(model_dir, "--only", "speed", "--out", tmp_path / "none")
    assert wrong.exit_code == 1 and "no promise is called 'speed'" in wrong.stderr and "it acted" in wrong.stderr
    assert not (tmp_path / "none").exists()


# -- progress ----------------------------------------------------------------------------------------------------------------


def test_lines_say_what_was_done_where_there_is_no_terminal(model_dir: Path, tmp_path: Path) -> None:
    only = "no token sees a later one,memory is bounded"
    result = run(model_dir, "--patches", STREAMING, "--tokens", 64, "--only", only, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    # transformers has a bar of its own while it loads.
    lines = [line for line in result.stderr.splitlines() if re.match(r" +\d+ s ", line)]
    assert re.fullmatch(r" +\d+ s  2 checks, about \d+ seconds by the time of one forward", lines[0])
    pattern = r" +\d+ s  kept +\d+\.\d s  {} \[streaming\(sinks=2, window=10\)\]"
    assert re.fullmatch(pattern.format("no token sees a later one"), lines[1])
    assert re.fullmatch(pattern.format("memory is bounded"), lines[2])


class Forwards:
    """Counts forwards by the check that makes them, as `Work` does: those that wait for the weights, and tokens of the others."""

    # Tokens in the time of which the weights could be read, on a processor.
    FEW = 16

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[str, list[int]] = {}
        self.what = ""
        forward = LlamaForCausalLM.forward

        def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = int(kwargs["input_ids"].numel())
            count = self.counts.setdefault(self.what, [0, 0])
            count[tokens > self.FEW] += 1 if tokens <= self.FEW else tokens
            return forward(model, *args, **kwargs)

        # With the signature of the original, which says what a model takes.
        counted.__signature__ = __import__("inspect").signature(forward)  # type: ignore[attr-defined]
        monkeypatch.setattr(LlamaForCausalLM, "forward", counted)

    def advance(self, what: str) -> None:
        self.what = what


@pytest.mark.parametrize(
    ("spec", "fast"),
    [
        ("mlp_int8", True),
        *(matrix(spec, True) for spec in ("streaming(window=508)", "speculative")),
        *(matrix(spec, False) for spec in ("streaming(window=508)", "mlp_int8", "speculative")),
    ],
)
def test_the_estimate_counts_the_work_that_is_done(spec: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In units of one step: 16 tokens of a longer forward take about as long."""
    predicted: dict[str, float] = {}
    from patchkit.prove import prove as module

    def noted(step: Any) -> Any:
        def work(case: Any) -> Any:
            found = step.work(case)
            predicted[f"{case.spec}: {step.promise}"] = found.steps + found.tokens / Forwards.FEW
            return found

        return type(step)(step.promise, step.run, step.applies, work)

    monkeypatch.setattr(module, "STEPS", tuple(noted(step) for step in STEPS))
    forwards = Forwards(monkeypatch)
    proof = Proof(spec, "float32")
    prove(
        proof,
        tiny_model("llama"),
        parse_spec(spec),
        documents(),
        fast=fast,
        advance=forwards.advance,
        only=[step.promise for step in STEPS],
    )
    done = {what: few + many / Forwards.FEW for what, (few, many) in forwards.counts.items() if what in predicted}
    ratios = {what: predicted[what] / done[what] for what in done if done[what] > 20}
    assert len(ratios) >= 5 and all(0.4 < ratio < 2.5 for ratio in ratios.values()), ratios
    assert 0.75 < sum(predicted.values()) / sum(done.values()) < 1.35
    assert proof.estimated_seconds is not None and math.isfinite(proof.estimated_seconds)


def test_documents_are_longer_than_what_is_kept() -> None:
    model, tokenizer = load_model("bundled")
    reach = reach_of(model, parse_spec("streaming(window=508)"))
    assert reach == 512
    assert max(map(len, texts.documents(tokenizer, None, 4096))) == 512
    assert max(map(len, texts.documents(tokenizer, None, 4096, reach))) == 768
    # Four documents at least: intervals are over documents.
    assert max(map(len, texts.documents(tokenizer, None, 4096, 4096))) == 1024


# -- interruptions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), matrix(signal.SIGINT, "SIGINT")])
def test_an_interrupted_run_leaves_a_report_that_says_what_was_not_checked(
    number: signal.Signals, name: str, model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "patchkit.cli", "prove", str(model_dir), "--patches", STREAMING, "--tokens", "64", "--fast"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [*command, "--out", str(out), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        # The first line that says that a promise was kept.
        while "kept" not in (line := process.stderr.readline()):
            assert line or process.poll() is None, "it ended before anything was checked"
        process.send_signal(number)
        printed = json.loads(process.stdout.read())
        assert process.wait() == 128 + number
    written = json.loads((out / "report.json").read_text())
    assert printed["checks"] == written["checks"] != []
    assert not written["passed"] and not written["complete"] and written["interrupted"] == name
    assert written["verdict"].startswith(f"incomplete: interrupted by {name} after")
    assert "nothing is left when removed [streaming(sinks=2, window=10)]" in written["not_checked"]
    done = {check["promise"] for check in written["checks"]}
    assert done and not any(promise.startswith(tuple(done)) for promise in written["not_checked"])
    page = (out / "report.html").read_text()
    assert "Not checked:" in page and f"interrupted by {name}" in page


@pytest.mark.parametrize("found", [float("inf"), float("nan")])
def test_no_noise_is_large_enough_for_an_infinite_difference(found: float) -> None:
    from patchkit.prove.checks.bounds import Bound, judged

    noise = [Bound(1e-4, "rounding"), Bound(float("inf"), "noise")]
    assert not judged(found, noise)[0] and judged(1.0, noise)[0]
