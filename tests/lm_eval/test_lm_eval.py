from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cache_of, cached
from typer.testing import CliRunner

from patchkit import patch_model, report, unpatch_model
from patchkit.cli import app
from patchkit.cli import eval as command
from patchkit.errors import PatchConflict
from patchkit.measure.perplexity import stream_nll
from patchkit.measure.texts import encode
from patchkit.models import bundled_path, load_model
from patchkit.testing import tiny_model

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from patchkit.lm_eval.model import ANY_LENGTH, NeverActed, PatchkitLM, has_position_table  # noqa: E402

STREAMING = "streaming(sinks=2, window=30)"
INT8 = "mlp_int8(mode=weight_only)"  # what "auto" chooses depends on the clock
TEXT = "import os\n\n\ndef join(*parts):\n    return os.sep.join(parts)\n" * 40


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tasks like patchkit's own, with two short documents each."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, size in (("long", 1500), ("short", 60)):
        task = (command.task_folder() / "perplexity.yaml").read_text().replace("patchkit_perplexity", name)
        (folder / f"{name}.yaml").write_text(task + f"dataset_kwargs: {{documents: 2, characters: {size}}}\n")
    return folder


@pytest.fixture(scope="module")
def manager(small: Path) -> TaskManager:
    return TaskManager(include_path=small, include_defaults=False)


@pytest.fixture
def model(model_dir: Path) -> Any:
    return load_model(model_dir)[0]


def asked(kind: str, *arguments: tuple[Any, ...], task: str = "a task") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=each, idx=0, metadata=(task, index, 1))  # type: ignore[arg-type]
        for index, each in enumerate(arguments)
    ]


def told(lm: PatchkitLM) -> dict[str, Any]:
    return lm.get_model_info()["patchkit"]


def log_likelihood(model: Any, context: list[int], continuation: list[int]) -> float:
    """One token at a time through the cache, as it would be generated: no code is shared with the model of lm-eval."""
    cache, total = None, 0.0
    ids = context + continuation
    with torch.no_grad():
        for index, (token, following) in enumerate(itertools.pairwise(ids)):
            out = model(input_ids=torch.tensor([[token]]), **cached(cache), use_cache=True)
            cache = cache_of(out)
            if index + 1 >= len(context):
                total += out.logits[0, -1].double().log_softmax(-1)[following].item()
    return total


@pytest.mark.parametrize("spec", ["", STREAMING])
def test_long_contexts_go_in_whole_and_score_as_they_would_be_generated(model: Any, spec: str) -> None:
    """Rows of different lengths, beyond the window and beyond the model's own 512 positions."""
    alone, together = PatchkitLM(model, patches=spec, chunk=64), PatchkitLM(model, chunk=64, batch_size=3)
    contexts = [text.rstrip() for text in (TEXT, TEXT[:700], "def f(" * 30)]
    requests = asked("loglikelihood", *((context, " os.path.join(a, b)") for context in contexts))
    assert len(alone.tok_encode(TEXT)) > 512
    found = zip(contexts, alone.loglikelihood(requests, True), together.loglikelihood(requests, True), strict=True)
    for context, (value, _), (in_a_batch, _) in found:
        before = alone.tok_encode(context)
        after = alone.tok_encode(context + " os.path.join(a, b)")[len(before) :]
        expected = log_likelihood(model, before, after)
        assert value == pytest.approx(expected, abs=2e-3) and in_a_batch == pytest.approx(expected, abs=2e-3)
    if spec:  # and not as if the context had been cut to 512 tokens
        whole = alone.loglikelihood(requests[:1], True)[0][0]
        unpatch_model(model)
        assert abs(HFLM(pretrained=model).loglikelihood(requests[:1], True)[0][0] - whole) > 0.1


def test_it_scores_as_lm_eval_does_where_nothing_is_long(model: Any) -> None:
    pairs = [("import ", "os"), ("def f(x", "):\n    return x"), ("", "class A:"), ("x = [1, 2, ", "3]"), ("x = [1, 2, ", "4]")]
    requests = asked("loglikelihood", *pairs)
    expected = HFLM(pretrained=model, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    found = PatchkitLM(model, batch_size=2).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)


@pytest.mark.parametrize("spec", ["", STREAMING])
def test_streamed_perplexity_is_that_of_patchkit_ppl(model_dir: Path, tmp_path: Path, manager: TaskManager, spec: str) -> None:
    model, _ = load_model(model_dir)
    lm = PatchkitLM(model, patches=spec)
    task = manager.load(["long"])
    texts = [document["text"] for document in next(iter(task["tasks"].values())).dataset["test"]]
    results = lm_eval.evaluate(lm, task, bootstrap_iters=0)
    scored = told(lm)["tasks"]["long"]["scored"]
    said, tokens = 0.0, 0
    for text in texts:
        (tmp_path / "text.py").write_text(text)
        line = ["ppl", str(model_dir), "--text", str(tmp_path / "text.py"), "--patches", spec, "--json"]
        found = json.loads(CliRunner().invoke(app, line).stdout)["results"]["patched" if spec else "unpatched"]
        said, tokens = said + found["nll"] * found["tokens"], tokens + found["tokens"]
    assert scored["tokens scored"] == tokens
    measured = math.log(results["results"]["long"]["byte_perplexity,none"]) * sum(len(text.encode()) for text in texts)
    assert math.exp(measured / tokens) == pytest.approx(math.exp(said / tokens), rel=1e-6)
    if spec:
        assert scored["tokens scored beyond the window of streaming"] == tokens - 2 * 32


def test_generation_goes_through_the_patch_in_batches(model: Any) -> None:
    options = {"until": ["\n\n\n\n"], "max_gen_toks": 6, "do_sample": False}
    contexts = [TEXT[:900], TEXT[:300], TEXT]
    lm = PatchkitLM(model, patches=STREAMING, batch_size=3)
    found = lm.generate_until(asked("generate_until", *((context, options) for context in contexts)), disable_tqdm=True)
    for context, text in zip(contexts, found, strict=True):
        ids = torch.tensor([lm.tok_encode(context)])
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert text == lm.tokenizer.decode(expected, skip_special_tokens=True).split("\n\n\n\n")[0]
    record = told(lm)["tasks"]["a task"]
    assert record["streaming"]["tokens evicted"] > 0
    assert 0 < record["scored"]["tokens scored beyond the window of streaming"] <= record["scored"]["tokens scored"] <= 18


def test_a_patch_that_never_acted_is_an_error_and_no_score(model: Any, manager: TaskManager) -> None:
    short, long = ("import ", "os"), (TEXT, " os")
    for spec, requests, word in (
        (STREAMING, [short, ("def f(", "x")], "streaming"),
        ("speculative(k=4)", [long], "speculative"),
        (f"mlp_int8 + {STREAMING}", [short], "streaming"),
        ("compile(backend=eager)", [long], "compile"),
    ):
        lm = PatchkitLM(model, patches=spec)
        with pytest.raises(NeverActed, match=rf"{word}.*never acted in a task"):
            lm.loglikelihood(asked("loglikelihood", *requests), disable_tqdm=True)
        unpatch_model(model)
    # Padding beyond the window is no token beyond the window, and one task's tokens are not another's.
    lm = PatchkitLM(model, patches=STREAMING, batch_size=2)
    both = [*asked("loglikelihood", short, task="short"), *asked("loglikelihood", long, task="long")]
    with pytest.raises(NeverActed, match="in short"):
        lm.loglikelihood(both, disable_tqdm=True)
    lm.loglikelihood(both[1:], disable_tqdm=True)
    assert told(lm)["tasks"].keys() == {"long"}
    with pytest.raises(NeverActed, match="use_cache"):
        told(lm)
    with pytest.raises(NeverActed, match="never acted in short"):
        lm_eval.simple_evaluate(model=lm, tasks=["short"], task_manager=manager)


def test_cached_answers_of_another_model_are_refused(model: Any, manager: TaskManager, tmp_path: Path) -> None:
    def run(lm: PatchkitLM) -> Any:
        return lm_eval.simple_evaluate(model=lm, tasks=["long"], task_manager=manager, use_cache=str(tmp_path / "answers"))

    run(PatchkitLM(model))
    lm = PatchkitLM(model, patches=STREAMING)
    with pytest.raises(PatchConflict, match="no patches"):
        run(lm)


def test_counters_are_those_of_each_task(model: Any) -> None:
    assert not TEXT[904].isspace()
    lm = PatchkitLM(patch_model(model, STREAMING, verbose=False), batch_size=2)
    lm.loglikelihood([*asked("loglikelihood", (TEXT, " a"), task="a"), *asked("loglikelihood", (TEXT[:905], " b c"), task="b")])
    tasks = told(lm)["tasks"]
    assert tasks["a"]["streaming"]["tokens"] + tasks["b"]["streaming"]["tokens"] == report(model).patches[0].hits["tokens"]
    scored = len(lm.tok_encode(TEXT[:905] + " b c")) - len(lm.tok_encode(TEXT[:905]))
    assert tasks["b"]["scored"] == {"tokens scored": scored, "tokens scored beyond the window of streaming": scored}


def test_tables_of_positions_end_where_they_end(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_path())
    for family in ("gpt2", "opt", "gptj"):
        model = tiny_model(family)
        assert has_position_table(model, HFLM(pretrained=model, tokenizer=tokenizer).max_length), family
    for family in ("llama", "gpt_neox", "bloom", "falcon"):
        assert PatchkitLM(tiny_model(family), tokenizer=tokenizer).max_length == ANY_LENGTH, family
    model = tiny_model("gpt2")
    lm = PatchkitLM(model, tokenizer=tokenizer)
    ids = torch.randint(3, 100, (lm.max_length + 60,)).tolist()
    assert lm._loglikelihood_tokens([(None, ids[:-2], ids[-2:])], disable_tqdm=True)[0][0] == pytest.approx(
        HFLM(pretrained=model, tokenizer=tokenizer)._loglikelihood_tokens([(None, ids[:-2], ids[-2:])], disable_tqdm=True)[0][0], abs=1e-4
    )
    assert "cut to its last" in caplog.text
    assert PatchkitLM(tiny_model("llama"), tokenizer=tokenizer, max_length=100).max_length == 100


def test_by_name_with_a_spec_that_has_commas(model_dir: Path) -> None:
    lm = PatchkitLM.create_from_arg_string(
        f"pretrained={model_dir},patches=streaming(sinks=2, window=30) + mlp_int8,dtype=float32,chunk=100",
        {"device": "cpu", "batch_size": 2},
    )
    assert [patch.spec for patch in report(lm.model).patches] == [STREAMING, "mlp_int8"] and (lm.chunk, lm.batch_size) == (100, 2)
    text = PatchkitLM("bundled", device="cpu", dtype="float32")
    assert text.model.dtype == torch.float32
    value = text.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT[:200],)), disable_tqdm=True)[0]
    assert value == pytest.approx(-stream_nll(text.model, encode(text.tokenizer, TEXT[:200])).sum().item(), rel=1e-6)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture
def only_small(small: Path, manager: TaskManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """These tasks stand in the place of patchkit's own, and of the thousands that come with lm-eval, which take seconds to list."""
    monkeypatch.setattr(command, "task_folder", lambda: small)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **options: manager)


def test_the_command_compares_and_takes_up_what_was_broken_off(model_dir: Path, tmp_path: Path, only_small: None) -> None:
    line = [model_dir, "--tasks", "long,short", "--patches", STREAMING, "--patches", INT8, "--baseline", "--out", tmp_path / "out"]
    first = run(*line, "--json", "--log_samples", "--limit", 2)
    assert first.exit_code == 0, first.stderr
    cells = {(cell["spec"], cell["task"]): cell for cell in json.loads(first.stdout)["cells"]}
    assert cells.keys() == {(spec, task) for spec in ("unpatched", STREAMING, INT8) for task in ("long", "short")}
    assert "never acted" in cells[STREAMING, "short"]["error"] and not cells[STREAMING, "short"]["results"]
    counts = cells[STREAMING, "long"]["results"]["config"]["patchkit"]["tasks"]["long"]
    assert counts["scored"]["tokens scored beyond the window of streaming"] > 0 and counts["streaming"]["tokens evicted"] > 0
    assert len(list((tmp_path / "out").rglob("samples_long_*.jsonl"))) == 3

    written = sorted((tmp_path / "out").rglob("results_*.json"))
    assert len(written) == 5
    written[0].write_text(written[0].read_text()[:100])
    second = run(*line, "--json", "--limit", 2)
    assert "holds no finished result" in second.stderr and len(list((tmp_path / "out").rglob("results_*.json"))) == 6
    again = {(cell["spec"], cell["task"]): cell["results"].get("results") for cell in json.loads(second.stdout)["cells"]}
    assert again == {key: cell["results"].get("results") for key, cell in cells.items()}
    run(*line, "--limit", 1)  # other options, other results
    assert len(list((tmp_path / "out").rglob("results_*.json"))) == 11
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.startswith(f"| task | metric | unpatched | {STREAMING} | {INT8} |") and table.count("\n") == 6


def test_an_evaluation_in_which_nothing_acted_fails(model_dir: Path, only_small: None) -> None:
    failed = run(model_dir, "--tasks", "short", "--patches", STREAMING)
    assert failed.exit_code == 1 and "never acted in short" in failed.stderr
    refused = run(model_dir, "--tasks", "long", "--patches", "streaming(window=5000)", "--baseline")
    assert refused.exit_code == 1 and "no score for streaming(window=5000)" in refused.stderr and "bits_per_byte" in refused.stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--tasks", "long", "--numfewshot", "2"], "--numfewshot"),
        (["--tasks", "nonsense"], "nonsense"),
        (["--tasks", "long", "--output_path", "x"], "use --out"),
        (["--tasks", "long", "--model", "hf"], "first argument"),
        (["--tasks", "long", "--patches", "streamin"], "did you mean"),
        (["--tasks", "long", "--log_samples"], "output_path"),
        (["--tasks", "long", "--out", "/no/such/folder"], "parent folder"),
    ],
)
def test_wrong_calls_are_answered_by_name(model_dir: Path, only_small: None, arguments: list[str], word: str) -> None:
    failed = run(model_dir, *arguments)
    assert failed.exit_code == 1 and word in " ".join(failed.stderr.split())


def test_every_patch_can_be_evaluated() -> None:
    from patchkit import available_patches, parse_spec

    for name, cls in available_patches().items():
        assert [patch.name for patch in parse_spec(cls.evaluated or name)] == [name]


@pytest.mark.matrix
def test_two_processes_share_the_work(model_dir: Path, tmp_path: Path) -> None:
    """Sums over processes, and a patch that acts in one of them only has acted."""
    script = tmp_path / "work.py"
    script.write_text(
        "import sys, json\n"
        "from lm_eval.api.instance import Instance\n"
        "from patchkit.lm_eval.model import PatchkitLM\n"
        f"lm = PatchkitLM({str(model_dir)!r}, patches={STREAMING!r}, device='cpu', dtype='float32')\n"
        f"context = {TEXT.rstrip()!r} if lm.rank == 0 else 'def f('\n"
        "asked = [Instance('loglikelihood', {}, (context, ' a'), 0, metadata=('a task', 0, 1))]\n"
        "from patchkit import patch_model, unpatch_model\n"
        "unpatch_model(lm.model); lm.loglikelihood(asked); lm.rank == 0 and lm.get_model_info()\n"
        f"patch_model(lm.model, {STREAMING!r}); lm.loglikelihood(asked)\n"
        "assert lm.world_size == 2\n"
        "if lm.rank == 0: print(json.dumps(lm.get_model_info()['patchkit']['tasks']))\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads(done.stdout.strip().splitlines()[-1])["a task"]["scored"]
    assert record == {"tokens scored": 2, "tokens scored beyond the window of streaming": 1}
