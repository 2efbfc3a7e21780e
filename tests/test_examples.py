"""Every example runs from outside the repository, on a tiny model where it takes one, and stays short."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import fast_first

from patchkit import available_patches
from patchkit.speculation import Drafter

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
SAYS = {
    "grpo.py": ["rewards:", "16 verdicts, all signed", "speculative(draft=suffix)"],
    "quickstart.py": ["streaming(window=60): 2 attention layers", "tokens evicted", "bit by bit"],
    "bench_linear_attention.py": ["tokens: naive", "tokens per second"],
    "speculate.py": ["prompt_lookup:", "stdlib-1m-draft:", "the same text every time"],
    "transformers_serve.py": ["drafts prompt_lookup", "accepted"],
    "write_a_drafter.py": ["tokens per step and row", "drafts accepted"],
    "write_a_patch.py": ["nearest: ", "hotter(temperature=4.0): 1 language-model heads", "top token, unpatched"],
    "streaming_chat.py": ["tokens so far", "MiB of cache"],
}
# Instead of a model's folder.
TAKES = {
    "grpo.py": ["bundled", "2"],
    "bench_linear_attention.py": [".", "--lengths", "16", "40", "--rounds", "1", "--stack", "64", "2", "8", "4"],
}


# Times until its interval is narrow, which is long on a busy machine.
TIMED = "gate_a_patch.py"


def as_a_program(name: str, arguments: list[str], said: str, tmp_path: Path) -> str:
    """What the example prints in a process of its own, in a folder that is not the repository's."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        input=said,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str, list[str], str], str]:
    """`run(name, arguments, said)`: what the example prints, in this process; what it registers is forgotten afterwards."""

    def run(name: str, arguments: list[str], said: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(said))
        monkeypatch.setattr("patchkit.patch._registry", dict(available_patches()))
        monkeypatch.setattr(Drafter, "_classes", dict(Drafter.available()))
        monkeypatch.chdir(tmp_path)
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run


# The chat says past_key_values, which every supported transformers takes.
@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
@pytest.mark.parametrize("name", fast_first(EXAMPLES, lambda name: name != TIMED))
def test_example_runs(name: str, model_dir: Path, run: Callable[[str, list[str], str], str]) -> None:
    if name == "transformers_serve.py":
        pytest.importorskip("fastapi", reason="transformers' server is not installed: pip install 'transformers[serving]'")
    if name == "grpo.py":
        pytest.importorskip("trl", reason="TRL is not installed: pip install 'patchkit[rl]'")
    printed = run(name, TAKES.get(name, [str(model_dir)]), "def first():\nimport os\nclass Second:\n\n")
    assert all(words in printed for words in SAYS.get(name, [])), printed


def test_the_first_example_runs_as_a_program(model_dir: Path, tmp_path: Path) -> None:
    printed = as_a_program("quickstart.py", [str(model_dir)], "", tmp_path)
    assert all(words in printed for words in SAYS["quickstart.py"]), printed


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_the_chat_keeps_constant_memory(model_dir: Path, run: Callable[[str, list[str], str], str]) -> None:
    printed = run("streaming_chat.py", [str(model_dir), "20"], "a b c d e f g h\n" * 4 + "\n")
    sizes = [line.split(", ")[1] for line in printed.splitlines() if "MiB of cache" in line]
    assert len(sizes) == 4 and len(set(sizes[1:])) == 1


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    lines = (ROOT / "examples" / name).read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= (120 if name.startswith("bench_") else 40)
