"""`prove` passes what is healthy, on models of several anatomies, and finds every seeded bug by the promise that it breaks."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from prove.seeded_bugs import BUGS, Bug
from support import fast_first, matrix
from typer.testing import CliRunner, Result

from patchkit import available_patches, patch_model
from patchkit.cli import app
from patchkit.errors import PatchError
from patchkit.prove import report
from patchkit.prove.proof import Proof
from patchkit.prove.prove import prove
from patchkit.spec import parse_spec
from patchkit.testing import assert_restored, snapshot, tiny_model


def documents(count: int = 3, length: int = 120) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 100, (length,), generator=generator) for _ in range(count)]


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the timing, which is the same for all families and takes as long as all else."""
    monkeypatch.setattr("patchkit.prove.prove.timed", lambda *args, **kwargs: None)


def proved(family: str, spec: str, dtype: torch.dtype = torch.float32, only: list[str] | None = None) -> Proof:
    proof = Proof(spec, str(dtype).removeprefix("torch."))
    prove(proof, tiny_model(family, dtype=dtype), parse_spec(spec) if spec else [], documents(), fast=True, only=only)
    for check in proof.checks:
        if check.measured is not None and check.status != "not judged":
            # Nobody is to read "kept" beside a difference that is larger than what is given as allowed.
            assert check.allowed is not None and check.bound and (check.measured <= check.allowed) == (check.status == "kept"), check
    return proof


def is_caught(bug: Bug, dtype: torch.dtype = torch.float32) -> bool:
    """Whether ``prove`` finds the promise broken that the bug breaks."""
    proof = Proof(bug.spec, str(dtype).removeprefix("torch."))
    prove(proof, tiny_model("llama", dtype=dtype), parse_spec(bug.spec), documents(), fast=True, only=[bug.promise])
    return bug.promise in {check.promise for check in proof.broken} and not proof.passed


@pytest.mark.parametrize("name", BUGS)
def test_a_seeded_bug_is_caught_by_the_promise_that_it_breaks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name].seed(monkeypatch)
    assert is_caught(BUGS[name])


# The example of every patch, and what else can go wrong.
HEALTHY = [
    ("llama", "streaming(sinks=2, window=10) + mlp_int8 + speculative"),
    *(("llama", cls.example) for cls in available_patches().values() if cls.__module__.startswith("patchkit.")),
    ("qwen2", "linear(sinks=2, window=10, min_length=20)"),
    ("gpt_neox", "streaming(sinks=2, window=10, positions=true)"),
    ("gemma2", "streaming(sinks=0, window=10)"),
    ("gpt2", "mlp_int8(mode=dynamic)"),
    ("llama", "streaming(sinks=2, window=10) + mlp_int8(mode=dynamic)"),
    ("mixtral", "mlp_int8"),
    ("gpt2", "int4(scope='all+head', group=128, mode=weight_only)"),
    ("llama", "streaming(sinks=2, window=10) + int4(symmetric=True, mode=dynamic)"),
    ("mixtral", "int4(mode=weight_only)"),
]


@pytest.mark.parametrize(("family", "spec"), fast_first(HEALTHY, [HEALTHY[0], ("gemma2", "streaming(sinks=0, window=10)")]))
def test_healthy_patches_pass(family: str, spec: str, untimed: None) -> None:
    found = proved(family, spec)
    assert found.passed, [f"{check.promise}: {check.detail}" for check in found.broken]
    assert {check.about for check in found.checks} > {"all"}


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        ("streaming(sinks=2, window=10)", torch.bfloat16),
        matrix("streaming(sinks=2, window=10)", torch.float16),
        matrix("mlp_int8(mode=weight_only)", torch.bfloat16),
        matrix("mlp_int8(mode=dynamic) + speculative", torch.bfloat16),
        matrix("int4(mode=weight_only)", torch.bfloat16),
        matrix("int4(mode=dynamic)", torch.float16),
        ("mlp_int8(mode=dynamic) + speculative", torch.float16),
    ],
)
def test_sixteen_bits_pass_within_their_tolerance(spec: str, dtype: torch.dtype, untimed: None) -> None:
    found = proved("llama", spec, dtype)
    assert found.passed, [f"{check.promise}: {check.detail}" for check in found.broken]
    assert found.near_tie_rate is not None and found.near_tie_rate > 0


@pytest.mark.parametrize(("name", "dtype"), [("window off by one", torch.bfloat16), ("EOS ignored", torch.float16)])
def test_sixteen_bits_do_not_hide_a_bug(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    BUGS[name].seed(monkeypatch)
    assert is_caught(BUGS[name], dtype)


def test_unpatched_beside_unpatched_is_zero_everywhere(untimed: None) -> None:
    found = proved("qwen3", "")
    assert found.passed and found.perplexity is not None
    assert all(check.measured in (None, 0.0) for check in found.checks)
    assert (found.perplexity.ratio.value, found.perplexity.ratio.low, found.perplexity.ratio.high) == (1, 1, 1)


def test_the_model_is_left_as_it_was(untimed: None) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    proof = Proof("mlp_int8", "float32")
    prove(proof, model, parse_spec("mlp_int8(keep_original=False)"), documents(), fast=True)
    assert_restored(before, model)
    assert [check.status for check in proof.checks if check.promise == "nothing is left when removed"] == ["not judged"]


def test_a_refusal_comes_before_any_work() -> None:
    proof = Proof("streaming", "float32")
    with pytest.raises(PatchError, match="streaming"):
        prove(proof, tiny_model("gpt2"), parse_spec("streaming"), documents())
    assert not proof.checks and not proof.passed


def test_a_patch_that_never_acts_is_found(monkeypatch: pytest.MonkeyPatch, untimed: None) -> None:
    monkeypatch.setattr("patchkit.streaming.rule.LayerRule.count", lambda *args: None)
    found = proved("llama", "streaming(sinks=2, window=10)", only=["it acted"])
    assert "it acted" in {check.promise for check in found.broken}


def test_a_leak_is_suspicious(monkeypatch: pytest.MonkeyPatch, untimed: None) -> None:
    """A patch that knows the next token has a better perplexity than the model itself."""
    from patchkit.prove.checks import quality as module

    right = module.stream_nll
    calls = iter(range(100))
    # The patched model's documents come after the unpatched one's.
    monkeypatch.setattr(module, "stream_nll", lambda *args, **kw: right(*args, **kw) * (0.5 if next(calls) >= 3 else 1))
    found = proved("llama", "mlp_int8")
    assert [check.promise for check in found.broken] == ["not suspiciously better"]


def test_reports_are_whole_after_an_interruption(tmp_path) -> None:
    proof = Proof("streaming(sinks=2, window=10)", "float32")

    def stop(what: str) -> None:
        if "padded" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(proof, tiny_model("llama"), parse_spec(proof.patches), documents(), advance=stop)
    report.write(proof, tmp_path, "tiny", "patchkit prove tiny")
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["checks"] and not written["passed"] and written["verdict"].startswith("incomplete")
    assert "incomplete" in (tmp_path / "report.html").read_text()


def test_the_page_needs_nothing_else(tmp_path) -> None:
    proof = proved("gpt_neox", "streaming(sinks=2, window=10)")
    report.write(proof, tmp_path, "<b>tiny</b>", "patchkit prove tiny")
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import", re.sub(r"base64,[^\"]*", "", page))
    assert "data:image/png;base64," in page and "<b>tiny" not in page and proof.verdict in page
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] and written["environment"]["torch"] and written["command"] == "patchkit prove tiny"
    assert written["speed"]["patched"]["cache_bytes"] < written["speed"]["unpatched"]["cache_bytes"]


def test_weight_bytes_counts_int8_as_it_is_kept() -> None:
    from patchkit.prove.checks.speed import weight_bytes

    model = tiny_model("llama")
    before = weight_bytes(model)
    embedding = model.get_input_embeddings().weight
    assert before == sum(parameter.nbytes for parameter in model.parameters()) - embedding.nbytes
    linears = sum(p.nbytes for name, p in model.named_parameters() if ".mlp." in name)
    patch_model(model, "mlp_int8", verbose=False)
    assert before - linears < weight_bytes(model) < before - 0.7 * linears


# -- the command -----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prove", *map(str, arguments)])


def test_the_command_writes_reports_and_passes(model_dir: Path, tmp_path: Path, untimed: None) -> None:
    text = tmp_path / "text.py"
    text.write_text("import os\n\n\ndef join(*parts):\n    return os.sep.join(parts)\n" * 20)
    result = run(model_dir, "--patches", "mlp_int8", "--text", text, "--tokens", 1024, "--fast", "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    printed, written = json.loads(result.stdout), json.loads((tmp_path / "out" / "report.json").read_text())
    assert printed["passed"] and printed["checks"] == written["checks"]
    assert printed["perplexity"]["documents"] > 1 and printed["passkey"]


def test_the_command_fails_when_a_promise_is_broken(
    model_dir: Path, tmp_path: Path, untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = BUGS["scale of another channel"]
    bug.seed(monkeypatch)
    result = run(model_dir, "--patches", bug.spec, "--tokens", 64, "--fast", "--only", bug.promise, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "FAILED" in result.stderr and "broken" in result.stdout
    assert not json.loads((tmp_path / "out" / "report.json").read_text())["passed"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--patches", "streaming(window=5000)"], "window"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--out", "no/such/folder"], "does not exist"),
    ],
)
def test_the_command_says_what_is_wrong_before_any_work(model_dir: Path, tmp_path: Path, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(model_dir, *arguments)
    assert result.exit_code == 1 and message in result.stderr and not list(tmp_path.iterdir())
