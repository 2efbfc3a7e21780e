"""Every example runs from outside the repository, on a tiny model where it takes one, and stays short."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SAYS = {
    "quickstart.py": ["streaming(window=60): 2 attention layers", "tokens evicted", "bit by bit"],
    "bench_linear_attention.py": ["tokens: naive", "tokens per second"],
    "speculate.py": ["prompt_lookup:", "stdlib-1m-draft:", "the same text every time"],
    "streaming_chat.py": ["tokens so far", "MiB of cache"],
}
# Instead of a model's folder.
TAKES = {"bench_linear_attention.py": [".", "--lengths", "16", "40", "--rounds", "1", "--stack", "64", "2", "8", "4"]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs(name: str, model_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *TAKES.get(name, [str(model_dir)])],
        input="def first():\nimport os\nclass Second:\n\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert all(words in done.stdout for words in SAYS.get(name, [])), done.stdout


def test_the_chat_keeps_constant_memory(model_dir: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "streaming_chat.py"), str(model_dir), "20"],
        input="a b c d e f g h\n" * 4 + "\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    sizes = [line.split(", ")[1] for line in done.stdout.splitlines() if "MiB of cache" in line]
    assert len(sizes) == 4 and len(set(sizes[1:])) == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    lines = (ROOT / "examples" / name).read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= (120 if name.startswith("bench_") else 40)
