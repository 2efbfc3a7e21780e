"""The full matrix of the bundled model: every registered patch and three combinations, on five offline tasks, with the baseline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from patchkit import available_patches
from patchkit.cli import app

RESULTS = Path(__file__).resolve().parents[2] / "evals" / "results"
COMBINATIONS = ("streaming(window=252) + mlp_int8", "streaming(window=252) + compile", "streaming(window=252) + speculative(k=4)")


def test_matrix_of_the_bundled_model(benchmark: Any, record: Callable[..., None], tmp_path: Path) -> None:
    line = ["eval", "bundled", "--tasks", "patchkit_*", "--every-patch", "--baseline", "--out", str(tmp_path), "--json"]
    line += [word for spec in COMBINATIONS for word in ("--patches", spec)]
    done = benchmark.pedantic(CliRunner().invoke, args=(app, line), rounds=1, iterations=1)
    assert done.exit_code == 0, done.stderr
    cells = json.loads(done.stdout)["cells"]
    (RESULTS / "matrix.md").write_text((tmp_path / "table.md").read_text(encoding="utf-8"), encoding="utf-8")
    minutes = benchmark.stats.stats.max / 60
    record(
        "matrix",
        minutes,
        "<= 15 minutes",
        what="minutes for every registered patch, three combinations and the unpatched model on five offline tasks, in one command",
        cells=[{"spec": c["spec"], "task": c["task"], "error": c["error"], **c["results"].get("results", {})} for c in cells],
    )
    assert len(cells) == 5 * (1 + len(available_patches()) + len(COMBINATIONS))
    assert minutes <= 15
