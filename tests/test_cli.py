from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from typer.testing import CliRunner, Result

from patchkit import available_patches, patch_model
from patchkit.cli import app
from patchkit.cli.tables import tables
from patchkit.kernels import available_ops
from patchkit.measure import demo as show
from patchkit.measure import demo_plan
from patchkit.models import load_model
from patchkit.testing import TOLERANCES

STREAMING = "streaming(sinks=2, window=30)"
PROMPT = "def read(path):\n    with open(path) as file:\n        return"


def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def run_json(*arguments: str | Path) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.py"
    path.write_text("import os\n\n\ndef join(*parts):\n    return os.sep.join(parts)\n" * 12)
    return path


def test_patches_lists_every_registered_patch() -> None:
    listed = run_json("patches")
    assert set(listed) == set(available_patches())
    assert listed["streaming"]["options"] == {
        "sinks": 4,
        "window": 1020,
        "positions": "cache",
        "layers": None,
        "refresh": None,
        "kv": "model",
    }
    assert listed["speculative"]["options"] == {"draft": "prompt_lookup", "k": "cost_model", "acceptance": "exact"}
    plain = run("patches").stdout
    assert all(name in plain for name in listed)


def test_patches_prints_and_writes_the_table_of_the_documents(tmp_path: Path) -> None:
    printed = run("patches", "--markdown").stdout
    assert printed == tables()["patches"] and all(f"| `{name}` |" in printed for name in available_patches())
    page = tmp_path / "page.md"
    page.write_text("<!-- table: patches -->\n<!-- end of table -->\n")
    assert run("patches", "--markdown", page).exit_code == 0 and printed in page.read_text()
    assert "add it to rewrite" in run("patches", page).stderr


def test_kernels_says_what_runs_and_why_not() -> None:
    found = run_json("kernels")
    assert set(found) == set(available_ops())
    for entry in found.values():
        assert entry["runs"] == next((name for name, reason in entry["refusals"].items() if reason is None), "reference")
    plain = run("kernels").stdout
    assert all(name in plain for name in found) and "PATCHKIT_KERNELS" in plain


def test_inspect(model_dir: Path) -> None:
    found = run_json("inspect", model_dir)
    assert found["class"] == "LlamaForCausalLM" and len(found["attention_layers"]) == 2 and found["feed_forward_linears"] == 6
    assert set(found["patches"]) == set(available_patches())
    # 4 + 1020 tokens do not fit the 512 positions of this model
    assert found["patches"]["streaming"]["applies"] is False and "window=508" in found["patches"]["streaming"]["reason"]
    plain = run("inspect", model_dir)
    assert plain.exit_code == 0 and "LlamaForCausalLM" in plain.stdout and "0-1" in plain.stdout


def test_generate_prints_what_generate_gives(model_dir: Path) -> None:
    plain = run("generate", model_dir, "--prompt", PROMPT, "--patches", STREAMING, "--max-new-tokens", "40")
    assert plain.exit_code == 0, plain.stderr
    found = run_json("generate", model_dir, "--prompt", PROMPT, "--patches", STREAMING, "--max-new-tokens", "40")
    model, tokenizer = load_model(model_dir)
    patch_model(model, STREAMING, verbose=False)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(expected, skip_special_tokens=True)
    assert found["text"] == text and found["new_tokens"] == len(expected)
    assert plain.stdout.rstrip("\n") == text.rstrip("\n")
    assert "tokens/s" in plain.stderr and "streaming(sinks=2, window=30)" in plain.stderr
    assert found["patches"][0]["name"] == "streaming"


def test_generate_reads_stdin_and_streams_a_shorter_window_differently(model_dir: Path) -> None:
    options = ("--max-new-tokens", "40")
    piped = run("generate", model_dir, "--prompt", "-", *options, "--json", stdin=PROMPT)
    assert json.loads(piped.stdout)["text"] == run_json("generate", model_dir, "--prompt", PROMPT, *options)["text"]
    assert json.loads(piped.stdout)["patches"] == []
    patched = run_json("generate", model_dir, "--prompt", PROMPT, "--patches", "streaming(sinks=0, window=2)", *options)
    assert patched["text"] != json.loads(piped.stdout)["text"]


def test_sampling_follows_the_seed(model_dir: Path) -> None:
    def sample(seed: int) -> str:
        return run_json("generate", model_dir, "--prompt", PROMPT, "--temperature", "0.9", "--seed", str(seed), "--max-new-tokens", "12")[
            "text"
        ]

    assert sample(1) == sample(1) != sample(2)


def test_ppl_with_baseline(model_dir: Path, text_file: Path) -> None:
    found = run_json("ppl", model_dir, "--text", text_file, "--patches", STREAMING, "--baseline", "--chunk", "50")
    unpatched, patched = found["results"]["unpatched"], found["results"]["patched"]
    assert unpatched["tokens"] == patched["tokens"] == found["tokens"] > 100
    assert found["patched_over_unpatched"] == pytest.approx(patched["perplexity"] / unpatched["perplexity"])
    assert abs(patched["nll"] - unpatched["nll"]) > TOLERANCES[torch.float32].differs
    assert unpatched["patches"] == [] and patched["patches"][0]["spec"] == STREAMING
    assert sum(bucket["tokens"] for bucket in patched["by_position"]) == patched["tokens"]
    plain = run("ppl", model_dir, "--text", text_file, "--patches", STREAMING, "--baseline")
    assert plain.exit_code == 0 and "unpatched" in plain.stdout and "all" in plain.stdout


def test_ppl_of_a_wide_window_is_the_unpatched_one(model_dir: Path, text_file: Path) -> None:
    found = run_json("ppl", model_dir, "--text", text_file, "--patches", "streaming(window=508)", "--baseline", "--max-tokens", "200")
    results = found["results"]
    assert found["tokens"] == 199
    assert results["patched"]["nll"] == pytest.approx(results["unpatched"]["nll"], abs=TOLERANCES[torch.float32].logits)


def test_ppl_without_patches_scores_the_model_as_it_is(model_dir: Path, text_file: Path) -> None:
    found = run_json("ppl", model_dir, "--text", text_file, "--max-tokens", "50")
    assert list(found["results"]) == ["unpatched"] and found["patched_over_unpatched"] is None


def test_demo(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_plan, "CONTEXTS", (64, 160))
    out = tmp_path / "picture.png"
    arguments = ("demo", "--model", model_dir, "--tokens", "600", "--windows", "60,20", "--out", out)
    found = run_json(*arguments)
    assert [row["name"] for row in found["rows"]] == ["unpatched", show.REFERENCE, "streaming 4+60", "streaming 4+20"]
    assert found["environment"]["torch"] == torch.__version__ and found["picture"] == str(out)
    assert out.read_bytes().startswith(b"\x89PNG")
    plain = run(*arguments)
    assert plain.exit_code == 0 and "streaming 4+20" in plain.stdout and str(out) in plain.stdout


def test_version_and_help() -> None:
    assert run("--version").stdout.startswith("patchkit ")
    help_text = run("--help").stdout
    assert all(command in help_text for command in ("demo", "inspect", "generate", "ppl", "patches"))


GENERATE = ("generate", "MODEL", "--prompt", PROMPT, "--max-new-tokens", "4")

BAD_CALLS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown patch": ((*GENERATE, "--patches", "streming"), "did you mean 'streaming'"),
    "unknown option": ((*GENERATE, "--patches", "streaming(windw=8)"), "did you mean 'window'"),
    "bad syntax": ((*GENERATE, "--patches", "streaming(window="), "cannot read the spec"),
    "window 0": ((*GENERATE, "--patches", "streaming(window=0)"), "window"),
    "negative sinks": ((*GENERATE, "--patches", "streaming(sinks=-1)"), "sinks"),
    "window too large": ((*GENERATE, "--patches", "streaming(window=509)"), "508"),
    "the same patch twice": ((*GENERATE, "--patches", "streaming(window=8) + streaming(window=9)"), "give it once"),
    "empty prompt": (("generate", "MODEL", "--prompt", " \n"), "prompt is empty"),
    "no such device": ((*GENERATE, "--device", "nowhere"), "--device cpu"),
    "missing text": (("ppl", "MODEL", "--text", "DIR/none.txt"), "no such text file"),
    "empty text": (("ppl", "MODEL", "--text", "DIR/empty.txt"), "is empty"),
    "binary text": (("ppl", "MODEL", "--text", "DIR/binary.txt"), "not UTF-8"),
    "text is a directory": (("ppl", "MODEL", "--text", "DIR"), "is a directory"),
    "missing model": (("inspect", "DIR/none"), "no such model directory"),
    "broken model": (("inspect", "DIR"), "no config.json"),
    "no network": (("inspect", "nobody/no-such-model"), "cannot be reached"),
    "no folder for the picture": (("demo", "--model", "MODEL", "--out", "DIR/none/demo.png"), "does not exist"),
    "demo window too large": (("demo", "--model", "MODEL", "--windows", "4000", "--out", "DIR/demo.png"), "508"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input_is_one_line_and_exit_code_1(case: str, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", no_network)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    arguments, says = BAD_CALLS[case]
    result = run(*(word.replace("MODEL", str(model_dir)).replace("DIR", str(tmp_path)) for word in arguments), "--json")
    assert result.exit_code == 1, result.stderr
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and says in lines[0] and result.stderr.rstrip().endswith(lines[0].rstrip())
    assert result.stdout == "" and "Traceback" not in result.stderr
    assert not (tmp_path / "demo.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate",),
        ("generate", "x"),
        ("generate", "x", "--prompt", "a", "--max-new-tokens", "0"),
        ("generate", "x", "--prompt", "a", "--temperature", "-1"),
        ("generate", "x", "--prompt", "a", "--dtype", "int3"),
        ("ppl", "x"),
        ("ppl", "x", "--text", "y", "--chunk", "0"),
        ("demo", "--windows", "508,zwei"),
        ("demo", "--windows", "0"),
        ("demo", "--tokens", "0"),
        ("no-such-command",),
        ("patches", "--no-such-option"),
    ],
)
def test_a_wrong_call_is_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_the_console_script_as_a_process(model_dir: Path) -> None:
    def process(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "patchkit.cli", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)

    good = process("generate", str(model_dir), "--prompt", PROMPT, "--patches", STREAMING, "--max-new-tokens", "5", "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["new_tokens"] <= 5
    bad = process("generate", str(model_dir), "--prompt", PROMPT, "--patches", "streaming(window=0)")
    assert bad.returncode == 1 and bad.stdout == "" and "Traceback" not in bad.stderr
    assert bad.stderr.startswith("error: ") and len(bad.stderr.splitlines()) == 1
