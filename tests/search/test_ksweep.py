from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from patchkit.cli import app
from patchkit.measure.perplexity import TextError
from patchkit.models import load_model
from patchkit.search import ksweep
from patchkit.testing import tiny_model

PROMPTS = ["import os\timport sys\timport os", "def join(a, b): return a + b", "for name in names: print(name)"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


def test_ksweep(model_dir: Path, prompts: Path, tmp_path: Path) -> None:
    out, trace = tmp_path / "out", tmp_path / "trace.json"
    options = ("--ks", "0,1,3", "--prompts", prompts, "--n-prompts", 2, "--new-tokens", 20, "--iterations", 2, "--out", out)
    result = run("ksweep", model_dir, "--draft", model_dir, *options, "--trace", trace, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["identical"] is True and [row["k"] for row in found["rows"]] == [None, 0, 1, 3]
    assert [row["runs"] for row in found["rows"]] == [row["identical"] for row in found["rows"]] == [4] * 4
    # the model drafts for itself: it is always right
    assert [row["statistics"]["acceptance_rate"] for row in found["rows"][1:]] == [None, 1.0, 1.0]
    assert found["rows"][3]["statistics"]["predicted_speedup"] > 0
    written = json.loads((out / "ksweep.json").read_text())
    assert written["rows"] == found["rows"] and written["environment"]["torch"] == torch.__version__
    with (out / "ksweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 2 and {line["k"] for line in lines} == {"plain", "0", "1", "3"}
    assert {line["identical"] for line in lines} == {"True"}
    for name in ("throughput.png", "acceptance.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads(trace.read_text())["traceEvents"]


def test_ksweep_with_prompts_of_the_library_and_a_table(model_dir: Path, tmp_path: Path) -> None:
    options = ("--ks", "2", "--n-prompts", 2, "--prompt-tokens", 16, "--new-tokens", 12, "--iterations", 1, "--out", tmp_path / "out")
    result = run("ksweep", model_dir, "--draft", "prompt_lookup", *options)
    assert result.exit_code == 0, result.stderr
    assert "plain" in result.stdout and "2/2" in result.stdout and "best: K = " in result.stdout


def test_another_text_than_plain_decoding_is_said_and_is_exit_code_1(
    model_dir: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ksweep._generate

    def wrong(model: object, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float]:
        text, seconds = right(model, prompt, new_tokens)  # type: ignore[arg-type]
        if hasattr(model, "_patchkit_speculative") and len(prompt[0]) == longest:
            text[-1] += 1
        return text, seconds

    longest = max(prompt.shape[1] for prompt in ksweep.encoded_prompts(str(prompts), load_model(model_dir)[1], 3, 0))
    monkeypatch.setattr(ksweep, "_generate", wrong)
    options = ("--ks", "1", "--prompts", prompts, "--new-tokens", 8, "--iterations", 1, "--out", tmp_path / "out")
    result = run("ksweep", model_dir, "--draft", "prompt_lookup", *options)
    assert result.exit_code == 1 and "1 of 6 texts differ" in result.stderr
    assert "2/3" in result.stdout and "3/3" in result.stdout
    assert json.loads((tmp_path / "out" / "ksweep.json").read_text())["identical"] is False


def test_the_model_itself_stays_unpatched() -> None:
    model = tiny_model("llama")
    before = dict(vars(model))
    result = ksweep.run_ksweep(model, "prompt_lookup", [2], [torch.arange(1, 9)[None]], new_tokens=4, iterations=1)
    assert result.identical and vars(model).keys() == before.keys() and "generate" not in vars(model)
    assert result.rows[0].speedup == 1 and result.rows[0].statistics is None
    json.dumps(result.to_dict(), allow_nan=False)


def test_std_is_over_iterations_and_speedup_is_prompt_by_prompt() -> None:
    runs = [
        ksweep.TimedCall(k, prompt, iteration, 10, seconds, True)
        for k, prompt, iteration, seconds in [
            *((None, 0, 0, 2.0), (None, 1, 0, 3.0), (4, 0, 0, 1.0), (4, 1, 0, 1.0)),
            *((None, 0, 1, 4.0), (None, 1, 1, 4.0), (4, 0, 1, 2.0), (4, 1, 1, 1.0)),
        ]
    ]
    row = ksweep.result_of(4, runs, None)
    throughputs = torch.tensor([20 / 2.0, 20 / 3.0])
    speedups = torch.tensor([2.5, 3.0])
    assert row.tokens_per_s == pytest.approx(throughputs.mean().item()) and row.speedup == pytest.approx(speedups.mean().item())
    assert row.tokens_per_s_std == pytest.approx(throughputs.std().item()) and row.speedup_std == pytest.approx(speedups.std().item())
    assert row.identical == row.runs == 4
    assert not ksweep.KSweep("x", 1, [row], [dataclasses.replace(runs[0], identical=False)]).identical


def test_prompts_of_a_json_list_may_hold_several_lines(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_model(model_dir)[1]
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(["def f():\n    pass", "x = 1"]))
    first, second = ksweep.encoded_prompts(str(path), tokenizer, 8, 0)
    assert tokenizer.decode(first[0], skip_special_tokens=True) == "def f():\n    pass" and second.ndim == 2
    path.write_text('{"a": 1}')
    with pytest.raises(TextError, match="list of texts"):
        ksweep.encoded_prompts(str(path), tokenizer, 8, 0)


@pytest.mark.parametrize(
    "arguments, code, says",
    [
        (("--ks", "2,-1"), 2, "give at least 0"),
        (("--ks", "two"), 2, "whole numbers"),
        (("--new-tokens", "0"), 2, "new-tokens"),
        (("--prompts", "DIR/none.txt"), 1, "no such text file"),
        (("--out", "DIR/none/out"), 1, "does not exist"),
        (("--trace", "DIR/none/trace.json"), 1, "does not exist"),
        (("--draft", "DIR/none"), 1, "no such model directory"),
    ],
)
def test_bad_calls(arguments: tuple[str, ...], code: int, says: str, model_dir: Path, tmp_path: Path) -> None:
    words = [word.replace("DIR", str(tmp_path)) for word in arguments]
    defaults = [] if "--out" in words else ["--out", tmp_path / "out"]
    result = run("ksweep", model_dir, "--draft", "prompt_lookup", *defaults, *words)
    assert result.exit_code == code and says in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr and not (tmp_path / "out").exists()
