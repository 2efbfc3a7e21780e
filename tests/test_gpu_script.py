"""evals/gpu/ at tiny sizes and without a GPU: the JSON that it writes, and that it fails where it must."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from evals.gpu.__main__ import main
from evals.gpu.bars import bars
from evals.gpu.correctness import check, check_alone, random_int8_linear, refused_on
from evals.gpu.decode import COMPILED, INT8_COMPILED, Decode
from evals.gpu.rows import NotMeasured
from evals.gpu.sections import LIMITS, SECTIONS
from evals.gpu.sizes import TINY
from evals.gpu.verification import against_torch
from patchkit import patch_model
from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.op import Backend, available_ops
from patchkit.kernels.verify_prefix import verify_prefix
from patchkit.measure.latency import DecodeStream

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
ON_CPU = ["--device", "cpu", "--tiny"]
OPS = available_ops()  # imported before a test lends one of them a broken backend


@pytest.fixture
def run(monkeypatch, tmp_path) -> Any:
    """`run("correctness")`: exit status and JSON of these sections."""

    def run(*sections: str) -> tuple[int, dict[str, Any]]:
        monkeypatch.setenv("OUT", str(tmp_path))
        status = main([*ON_CPU, *(["--sections", *sections] if sections else [])])
        return status, json.loads((tmp_path / "gpu_cpu.json").read_text())

    return run


def test_every_section_runs_without_a_gpu(run, capsys):
    status, result = run()
    printed = capsys.readouterr().out
    assert status == 0
    assert result["device"] == "cpu" and set(result["commands"].values()) == {"python3 -m evals.gpu --device cpu --tiny"}
    assert {"torch", "transformers", "triton", "python", "gpu"} <= result["environment"].keys()
    assert list(result["sections"]) == list(result["seconds"]) == list(SECTIONS)
    for rows in result["sections"].values():
        assert rows and {row["status"] for row in rows} <= {"passed", "not measured"}
        assert all(row["message"] for row in rows if row["status"] == "not measured")

    by_name = {name: {row["name"]: row for row in rows} for name, rows in result["sections"].items()}
    correctness, decode, smollm2, bandwidth, linear, verification = by_name.values()
    checked = {(row["op"], row["backend"]) for row in correctness.values() if row["status"] == "passed"}
    assert {name for name, backend in checked if backend in ("cpu", "native")} >= set(OPS)
    assert all(row["error"] <= row["bound"] for row in correctness.values() if "error" in row)
    assert {row["against"] for row in correctness.values() if "error" in row} == {"float64"}
    assert correctness["int8_linear triton"]["status"] == "not measured"
    timed = bandwidth["int8_linear, 1 x 64 -> 96, torch.float16"]
    assert timed["int8_launched_ms"] > 0 and timed["linear_launched_ms"] > 0
    assert timed["int8_graph_ms"] is None and "share" not in timed
    assert linear["linear_attention, 1 x 2 x 40 x 16"]["sdpa_over_linear"] > 0
    assert linear["linear_attention: two replays of a graph"]["status"] == "not measured"
    assert {row["op"] for row in verification.values()} == {"verify_prefix", "verify_prefix_sampled", "kv_append"}
    assert all(row["op_launched_ms"] > 0 and row["torch_launched_ms"] > 0 and row["error"] <= row["bound"] for row in verification.values())
    assert "need a GPU" in decode[f"{COMPILED}: ms per token"]["message"]
    assert decode["unpatched: ms per token"]["share"] > 0
    assert decode["streaming + compile: ms per token"]["other_over_this"].keys() == {"unpatched", "streaming", "streaming + int8"}
    assert decode["streaming + compile: greedy tokens"]["near_ties"] == 0
    assert smollm2["speculative: greedy answers"]["hits"]["speculative: rounds"] > 0
    timed = smollm2["streaming(window=28): ms per token"]
    assert timed["stories"]["ms_per_token"] > 0 and timed["edits"]["plain_over_this"]["value"] > 0
    assert {bar["verdict"] for bar in result["bars"]} == {"not measured"}
    assert all(bar["bar"] in printed for bar in result["bars"])


def wrong(*args: Any) -> torch.Tensor:
    return int8_linear.reference(*args) * 1.1


def incomplete(*args: Any) -> torch.Tensor:
    y = int8_linear.reference(*args)
    unwritten = torch.empty_like(y)
    unwritten.view(-1)[1:] = y.view(-1)[1:]
    return unwritten


def crashing(*args: Any) -> torch.Tensor:
    raise RuntimeError("no such kernel image")


@pytest.mark.parametrize(("broken", "message"), [(wrong, "relative RMSE"), (incomplete, "RMSE nan"), (crashing, "no such kernel image")])
def test_a_broken_backend_is_exit_status_1(broken, message, run, monkeypatch, capsys):
    good = int8_linear.backends["native"]
    monkeypatch.setitem(int8_linear.backends, "broken", Backend("broken", broken, good.refuses))
    status, result = run("correctness")
    rows = result["sections"]["correctness"]
    failed = [row for row in rows if row["status"] == "failed"]
    assert status == 1 and "FAILED int8_linear broken" in capsys.readouterr().out
    assert failed and all(row["name"].startswith("int8_linear broken") and message in row["message"] for row in failed)
    assert any(row["status"] == "passed" and row.get("backend") == "cpu" for row in rows[rows.index(failed[0]) :])


def test_a_row_that_depends_on_its_neighbours_fails():
    def neighbourly(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return int8_linear.reference(x, *rest) + x.amax()

    made = type(int8_linear).__new__(type(int8_linear))
    vars(made).update(vars(int8_linear), backends={"neighbourly": Backend("neighbourly", neighbourly, lambda *args: None)})
    made._call = made._dispatch
    _, x, *rest = next(random_int8_linear(TINY, CPU, (16,)))
    assert "alone" in check_alone(made, 1, x, *rest)["message"] and "alone" in check_alone(made, 5, x, *rest)["message"]


def test_triton_may_not_refuse_on_a_gpu():
    assert "groups of 8" in refused_on(torch.device("cuda"), "triton", "groups of 8")["message"]
    with pytest.raises(NotMeasured, match="x is on cuda"):
        refused_on(torch.device("cuda"), "cpu", "x is on cuda")


def too_long(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> Any:
    choice, accepted = verify_prefix.reference(logits, draft, counts)
    return choice, (accepted + 1).clamp(max=counts)


def one_slot_before(
    keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, offsets: Any, *rest: Any
) -> None:
    kv_append.reference(keys, values, new_keys, new_values, (offsets - 1).clamp(min=0), *rest)


@pytest.mark.parametrize(("op", "broken", "message"), [(verify_prefix, too_long, "other integers"), (kv_append, one_slot_before, "RMSE")])
def test_another_prefix_or_another_slot_fails(op, broken, message, monkeypatch):
    args = next(op.sample_inputs(CPU))[1]
    assert "message" not in check(op, "cpu", *args)
    monkeypatch.setitem(op.backends, "broken", Backend("broken", broken, lambda *args: None))
    assert message in check(op, "broken", *args)["message"]
    assert message in against_torch(op, broken, TINY, args)["message"]


def test_other_tokens_than_the_eager_ones_fail(monkeypatch):
    name = "streaming + compile"
    bench, other = Decode(TINY, CPU), Decode(TINY, CPU)
    with torch.no_grad():
        other.model.get_output_embeddings().weight.neg_()
    view = patch_model(other.model, bench.specs["streaming"], verbose=False)
    bench.streams[name] = DecodeStream(view, None)
    assert "no near ties" in bench.compare(name)["message"]
    bench.streams[name] = bench.stream("streaming")
    assert bench.compare(name)["largest_logit_error"] == 0 and "message" not in bench.compare(name)


def test_bytes_that_a_token_reads():
    bench = Decode(TINY, CPU)
    config = bench.model.config
    cache = 2 * config.num_hidden_layers * bench.context * config.hidden_size * 4
    embedding = config.vocab_size * config.hidden_size * 4
    assert bench.bytes_read(bench.model) == sum(p.nbytes for p in bench.model.parameters()) - embedding + cache
    outputs, inputs = config.intermediate_size + config.hidden_size, 2 * config.intermediate_size * config.hidden_size
    int8 = bench.stream("streaming + int8").model
    assert bench.bytes_read(bench.model) - bench.bytes_read(int8) == config.num_hidden_layers * (3 * inputs - 4 * outputs)


def test_time_that_is_used_up(run, monkeypatch):
    monkeypatch.setitem(LIMITS, "correctness", 0)
    status, result = run("correctness")
    assert status == 0 and {row["status"] for row in result["sections"]["correctness"]} == {"no time"}
    # A case that hangs is stopped, and so is nothing after the section.
    monkeypatch.setitem(LIMITS, "correctness", 1)
    monkeypatch.setitem(SECTIONS, "correctness", lambda *given: iter([("hangs", lambda: time.sleep(600))]))
    before = signal.getsignal(signal.SIGALRM)
    status, result = run("correctness")
    (row,) = result["sections"]["correctness"]
    assert row["status"] == "no time" and "stopped" in row["message"]
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0 and signal.getsignal(signal.SIGALRM) is before


def test_a_generator_that_fails_is_a_failed_row(run, monkeypatch):
    def cases(*given: Any) -> Any:
        yield "first", dict
        raise KeyError("no samples")

    monkeypatch.setitem(SECTIONS, "bandwidth", cases)
    status, result = run("bandwidth")
    assert status == 1 and [row["status"] for row in result["sections"]["bandwidth"]] == ["passed", "failed"]


def measured(share: float, ms: float, ratio: float, status: str = "passed") -> dict[str, Any]:
    return {
        "correctness": [{"name": "a", "status": status}],
        "bandwidth": [{"name": str(i), "status": "passed", "rows": 1, "share": share + i} for i in range(4)],
        "linear": [
            {"name": "512", "status": "passed", "tokens": 512, "sdpa_over_linear": 0.1},
            {"name": "2048", "status": "passed", "tokens": 2048, "sdpa_over_linear": ratio, "fla_over_linear": ratio},
        ],
        "decode": [
            {"name": f"{COMPILED}: ms per token", "status": "passed", "ms": ms},
            {"name": f"{INT8_COMPILED}: ms per token", "status": "passed", "ms": 1.0, "other_over_this": {COMPILED: ratio}},
        ],
    }


@pytest.mark.parametrize(
    ("sections", "device", "verdicts"),
    [
        (measured(0.8, 2.1, 1.2), "NVIDIA H100 80GB HBM3", ["met"] * 6),
        (measured(0.7, 2.3, 0.9, "failed"), "NVIDIA H100 80GB HBM3", ["missed"] * 6),
        (measured(0.8, 2.1, 1.2, "no time"), "NVIDIA H200", ["not measured", "met", "not measured", "met", "met", "met"]),
        ({}, "NVIDIA H100", ["not measured"] * 6),
    ],
)
def test_bars(sections, device, verdicts):
    assert [bar["verdict"] for bar in bars(sections, device)] == verdicts


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--device", "cuda"]])
def test_real_sizes_need_a_gpu(arguments, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and "--tiny" in capsys.readouterr().err


WITHOUT = """
import sys
for name in ("torchao", "typer", "rich", "matplotlib", "triton"):
    sys.modules[name] = None  # as if it were not installed
import torch
from patchkit import patch_model, report, unpatch_model
from patchkit.testing import assert_restored, snapshot, tiny_model
model = tiny_model("llama")
before = snapshot(model)
patch_model(model, "streaming(window=8) + mlp_int8")
with torch.no_grad():
    model.generate(torch.arange(3, 19)[None], max_new_tokens=8, do_sample=False)
assert all(patch.hits["forwards"] for patch in report(model).patches), report(model)
unpatch_model(model)
assert_restored(before, model)
"""


def test_patching_needs_none_of_the_optional_packages():
    done = subprocess.run([sys.executable, "-c", WITHOUT], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
