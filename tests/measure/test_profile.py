"""The profile: its phases, its sums against the profiler's own, and the trace. No assertion about a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from patchkit import PatchError, parse_spec
from patchkit.cli import app
from patchkit.measure.profile import run_profile
from patchkit.testing import assert_restored, snapshot, tiny_model

IDS = torch.arange(3, 43)


def test_phases_hold_what_ran_in_them(tmp_path: Path) -> None:
    model = tiny_model("llama").train()
    before = snapshot(model)
    trace = tmp_path / "trace.json"
    phases = run_profile(model, parse_spec("streaming(sinks=2, window=6) + mlp_int8"), IDS, 5, trace)
    assert_restored(before, model)
    assert [(phase.variant, phase.name) for phase in phases] == [
        (way, name) for way in ("unpatched", "patched") for name in ("prefill", "decode")
    ]
    for phase in phases:
        costs = {op.name: op for op in phase.ops}
        assert sum(op.share for op in phase.ops) == pytest.approx(1) and sum(op.ms for op in phase.ops) == pytest.approx(phase.ops_ms)
        assert [op.ms for op in phase.ops] == sorted((op.ms for op in phase.ops), reverse=True)
        # one embedding per forward: one in prefill, five in decoding
        assert costs["aten::embedding"].calls == (1 if phase.name == "prefill" else 5)
    # two layers of q, k, v, o, gate, up, down, and the head; int8 takes the three of the feed-forward layer
    linears = {(phase.variant, phase.name): next(op.calls for op in phase.ops if op.name == "aten::linear") for phase in phases}
    assert linears["unpatched", "prefill"] == 15 and linears["unpatched", "decode"] == 5 * 15 and linears["patched", "decode"] == 5 * 9
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert all(names.count(f"{phase.variant}: {phase.name}") == 1 for phase in phases)
    assert "[memory]" in names


def test_memory_is_counted(tmp_path: Path) -> None:
    prefill = run_profile(tiny_model("llama"), [], IDS, 1, tmp_path / "trace.json")[0]
    embedded = next(op.bytes for op in prefill.ops if op.name == "aten::index_select")
    assert embedded == 40 * 64 * 4


def test_what_acts_in_generate_is_profiled_there(tmp_path: Path) -> None:
    phases = run_profile(tiny_model("llama"), parse_spec("speculative(k=2)"), IDS, 4, tmp_path / "trace.json")
    assert [phase.name for phase in phases] == ["prefill", "generate"] * 2


def test_a_position_table_that_ends_and_a_bad_path_are_said(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="position table ends"):
        run_profile(tiny_model("gpt2"), [], IDS.repeat(13)[:510], 9, tmp_path / "trace.json")
    with pytest.raises(PatchError, match="cannot be written"):
        run_profile(tiny_model("llama"), [], IDS, 1, tmp_path / "no" / "trace.json")
    with pytest.raises(PatchError, match="512 positions"):
        run_profile(tiny_model("llama"), parse_spec("streaming(window=600)"), IDS, 1, tmp_path / "refused.json")
    assert not (tmp_path / "refused.json").exists()


def test_the_command(model_dir: Path, tmp_path: Path) -> None:
    arguments = ["profile", str(model_dir), "--context", "40", "--tokens", "3", "--out", str(tmp_path / "trace.json")]
    plain = CliRunner().invoke(app, [*arguments, "--patches", "streaming(window=8)", "--top", "3"])
    assert plain.exit_code == 0, plain.output
    assert all(word in plain.stdout for word in ("prefill:", "decode:", "patched", "aten::", "perfetto"))
    found = json.loads(CliRunner().invoke(app, [*arguments, "--top", "3", "--json"]).stdout)
    assert [len(phase["ops"]) for phase in found["phases"]] == [3, 3] and found["environment"]["torch"]
    wrong = CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "none" / "trace.json")])
    assert wrong.exit_code == 1 and "does not exist" in wrong.stderr
