"""evals/peers: what is computed of answers, and that a way which fails or kills its process becomes a row with the reason."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PEERS = Path(__file__).resolve().parents[1] / "evals" / "peers"
FAKE = """
import os
from peer import Answer, Way

def ways(made):
    def good(prompt, new_tokens):
        return Answer([7] * new_tokens, 10.0, 2.0 * (new_tokens - 1), new_tokens - 1, (new_tokens - 1) // 2, 1000 * new_tokens)
    def dies(prompt, new_tokens):
        os._exit(9) if len(prompt) > 4 else None
        return good(prompt, new_tokens)
    def refuses(prompt, new_tokens):
        if len(prompt) > 4:
            raise ValueError("no more than 4")
        return good(prompt, new_tokens)
    def cannot():
        raise ImportError("no such instruction")
    return {
        "good": lambda: Way(good, 500, 10, "float32", 6, None, lambda prompt: 10 * len(prompt)),
        "cannot": cannot,
        "dies": lambda: Way(dies, 500, 10, "float32"),
        "refuses": lambda: Way(refuses, 500, 10, "float32"),
    }
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for folder in (PEERS.parent, PEERS):
        monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("run")
    for name in ("run", "peer", "real"):
        sys.modules.pop(name, None)


def test_ways_that_fail_are_rows_with_the_reason(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = run.Made(**{name: tmp_path for name in ("model", "gguf", "draft", "folder", "heads", "spec")}, ends=(0,))
    family = run.Family("fake", Path(sys.executable), made)
    prompts = [run.Prompt("story 1", [1] * 4, 9), run.Prompt("edit 1", [1] * 5, 9), run.Prompt("long", [1] * 20, 3)]
    try:
        rows = list(run.rows_of([family], [[1, 2], [1, 2, 3]], lambda text: None))
        run.measure(rows, prompts, first=1)
        run.measure_caches(rows, [1] * 9, lambda text: None)
    finally:
        family.stop()
    found = {row.way: row for _, row in rows}
    assert found["cannot"].reasons == ["ImportError: no such instruction"]
    assert found["dies"].reasons == ["edit 1: its process ended with status 9"] and len(found["dies"].answers["story 1"]) == 1
    assert found["refuses"].reasons == ["edit 1: ValueError: no more than 4"]
    # The others went on in the process that was started anew.
    good = found["good"]
    assert good.reasons == [] and {name: len(answers) for name, answers in good.answers.items()} == {"story 1": 1, "edit 1": 1, "long": 1}
    assert good.cache_bytes == {"1000": 90, "8000": 90}  # the text is shorter than that

    figures = run.figures(good, good, prompts, bandwidth=1e6)
    assert figures["story"]["ms_per_token"] == 2.0 and figures["story"]["plain_over_this"]["value"] == 1.0
    # 4 passes in 8 tokens, each over the weights and at most 6 tokens of context; 8 of the 9 tokens' drafts fall into the timed part.
    read = 2 * (4 * (500 + 6 * 10) + 9000 * 8 / 9)
    assert figures["bytes_per_token"] == pytest.approx(read / 16) and figures["passes_per_token"] == 0.5
    assert figures["share_of_copy_bandwidth"] == pytest.approx(read / 0.032 / 1e6)
    assert figures["identical"] == 2 and run.figures(found["refuses"], good, prompts, 1e6)["identical"] == 1

    shown = run.table({"rows": [{**vars(row), "figures": run.figures(row, good, prompts, 1e6)} for row in found.values()]})
    assert "fake: cannot | | cannot run: ImportError: no such instruction" in shown
    assert all(line.count("|") == shown.splitlines()[0].count("|") for line in shown.splitlines())
