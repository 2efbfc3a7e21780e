from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from smollm2 import load_smollm2, needs_smollm2
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner, Result

from patchkit import patch_model, report
from patchkit.cli import app
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.measure import needle_report, needle_text
from patchkit.measure.english_text import TextSource, english_ids
from patchkit.measure.needle import answers, run_needle
from patchkit.measure.needle_grid import Answer, NeedleGrid
from patchkit.measure.needle_text import Asking, Haystack, NeedleCase, NeedleError, possible
from patchkit.models import load_model
from patchkit.spec import parse_spec
from patchkit.speculation import statistics_of
from patchkit.testing import TOLERANCES, assert_restored, snapshot, tiny_model
from patchkit.views import twin

LOGITS = TOLERANCES[torch.float32].logits
# Gives back what a user says between marks, as templates of instruct models do.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} [end]\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(autouse=True)
def text_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The English text is made once for all tests, which have one tokenizer."""
    monkeypatch.setattr(needle_text, "english_ids", lambda tokenizer, tokens: _english(tokens))


@functools.cache
def _english(tokens: int) -> tuple[torch.Tensor, list[TextSource]]:
    return english_ids(load_model("bundled")[1], tokens)


@pytest.fixture
def loaded(model_dir: Path) -> tuple[Any, Any]:
    return load_model(model_dir)


def _quiet(count: int) -> None:
    pass


def _haystack(
    tokenizer: Any, lengths: Sequence[int], distances: Sequence[int], trials: int = 1, seed: int = 0
) -> tuple[Haystack, list[NeedleCase]]:
    asking = Asking.of(tokenizer)
    cases = possible(lengths, distances, trials, asking)
    return Haystack.of(asking, cases, seed), cases


@pytest.mark.parametrize("chat", [False, True])
def test_a_key_stands_at_its_distance_once_and_between_sentences(chat: bool, loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    tokenizer.chat_template = TEMPLATE if chat else None
    haystack, cases = _haystack(tokenizer, [300, 600], [60, 150, 298, 550], trials=2)
    assert {(case.length, case.distance) for case in cases} == {(300, 60), (300, 150), (600, 60), (600, 150), (600, 298), (600, 550)} | (
        set() if chat else {(300, 298)}
    )
    for case in cases:
        before, after, key = haystack.before(case), haystack.after(case), haystack.key(case)
        assert len(after) == case.distance
        assert case.length - 150 < len(before) + len(after) <= case.length
        text = tokenizer.decode(before + after)
        assert text.count(key) == 1 and len(key) == 5 and key.isdigit()
        assert tokenizer.decode(after).startswith(f"\n\nThe secret number is {key}.")
        body = tokenizer.decode(before)
        assert body.endswith(".") or haystack.place(case) == haystack.start(case.trial)
        assert body.startswith(f"{tokenizer.bos_token}[user] " if chat else tokenizer.bos_token)
        assert text.endswith("only. [end]\n[assistant] " if chat else "only.\n\nThe secret number is")
        assert haystack.asking.chat is chat


def test_texts_and_keys_follow_from_the_seed_and_differ_between_trials(loaded: tuple[Any, Any]) -> None:
    haystack, cases = _haystack(loaded[1], [300], [100], trials=3)
    again, _ = _haystack(loaded[1], [300, 600], [100, 200], trials=3)
    other, _ = _haystack(loaded[1], [300], [100], trials=3, seed=1)
    for case in cases:
        assert (haystack.key(case), haystack.before(case), haystack.after(case)) == (again.key(case), again.before(case), again.after(case))
        assert haystack.key(case) != other.key(case) and haystack.before(case) == other.before(case)
    assert len({haystack.key(case) for case in cases}) == len({tuple(haystack.before(case)) for case in cases}) == 3


def _by_hand(model: Any, haystack: Haystack, case: NeedleCase) -> tuple[str, float]:
    """The greedy answer and the key's log-probability, without a cache handed over or a copy made."""
    tokenizer, key = haystack.asking.tokenizer, haystack.key(case)
    prompt = haystack.before(case) + haystack.after(case)
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0)
    digits = tokenizer(f" {key}", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([[*prompt, *haystack.asking.answer, *digits]]), use_cache=False).logits[0]
    at = len(whole) - len(digits) - 1
    scores = [whole[at + i].log_softmax(-1)[token].item() for i, token in enumerate(digits)]
    return tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip(), sum(scores) / len(scores)


@pytest.mark.parametrize("spec", ["", "streaming(sinks=2, window=90)", "mlp_int8", "linear(window=40)"])
@pytest.mark.parametrize("chat", [False, True])
def test_answers_are_those_of_the_whole_prompt(spec: str, chat: bool, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    tokenizer.chat_template = TEMPLATE if chat else None
    haystack, cases = _haystack(tokenizer, [150, 260], [60, 120, 250 - 20 * chat], trials=2)
    view = patch_model(twin(model), spec, verbose=False) if spec else model
    read: list[int] = []
    found = answers(view, haystack, cases, read.append)
    assert sum(read) == haystack.work(cases)
    assert [answer.case for answer in found] == cases
    for answer in found:
        text, score = _by_hand(view, haystack, answer.case)
        assert answer.text == text and answer.hit == (answer.key in text)
        assert answer.log_probability == pytest.approx(score, abs=10 * LOGITS)
        assert answer.tokens == len(haystack.before(answer.case)) + answer.case.distance


@pytest.mark.parametrize("spec", ["speculative(k=3)", "compile(backend='eager')"])
def test_the_patched_generate_answers(spec: str, loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    haystack, cases = _haystack(tokenizer, [200], [60, 120])
    view = patch_model(twin(model), spec, verbose=False)
    assert [answer.text for answer in answers(view, haystack, cases, _quiet)] == [a.text for a in answers(model, haystack, cases, _quiet)]
    steps = statistics_of(view).emitted if spec.startswith("speculative") else report(view).patches[0].hits["compiled steps"]
    assert steps >= len(cases)


def test_a_window_that_holds_the_prompt_changes_nothing(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    haystack, cases = _haystack(tokenizer, [200], [60, 150])
    wide = patch_model(twin(model), "streaming(window=500)", verbose=False)
    narrow = patch_model(twin(model), "streaming(window=30)", verbose=False)
    plain = answers(model, haystack, cases, _quiet)
    for mine, other, its in zip(answers(wide, haystack, cases, _quiet), answers(narrow, haystack, cases, _quiet), plain, strict=True):
        assert mine.text == its.text and mine.log_probability == pytest.approx(its.log_probability, abs=10 * LOGITS)
        assert abs(other.log_probability - its.log_probability) > TOLERANCES[torch.float32].differs


def test_what_does_not_fit_is_left_out_or_refused(loaded: tuple[Any, Any]) -> None:
    asking = Asking.of(loaded[1])
    assert possible([100, 400], [60, 300], 1, asking) == [NeedleCase(100, 60, 0), NeedleCase(400, 60, 0), NeedleCase(400, 300, 0)]
    with pytest.raises(NeedleError, match=f"at least {asking.least}"):
        possible([400], [asking.least - 1, 100], 1, asking)
    assert possible([400], [asking.least], 1, asking)
    haystack = Haystack.of(asking, [NeedleCase(400, 60, 0)])
    with pytest.raises(NeedleError, match=r"leaves no room for the question: give \d+ more"):
        haystack.after(NeedleCase(400, asking.least - 5, 0))
    with pytest.raises(NeedleError, match="no prompt of 80 tokens has room"):
        possible([70, 80], [100], 1, asking)


def test_a_template_that_changes_what_is_said_is_refused(loaded: tuple[Any, Any]) -> None:
    tokenizer = loaded[1]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | upper | reverse }}{% endfor %}"
    with pytest.raises(NeedleError, match="changes a user's message"):
        Asking.of(tokenizer)


def test_a_model_that_cannot_read_on_is_refused(loaded: tuple[Any, Any]) -> None:
    haystack, cases = _haystack(loaded[1], [700], [600])
    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=16, n_layer=1, n_head=1, n_positions=512)).eval()
    with pytest.raises(UnsupportedModel, match="position table"):
        answers(model, haystack, cases, _quiet)


def test_sides_of_a_window(loaded: tuple[Any, Any]) -> None:
    asking = Asking.of(loaded[1])
    sentence, answer = len(asking.needle("12345")), len(asking.answer) + len(asking.key("12345"))
    assert asking.side(500, None) == ""
    assert asking.side(200 - answer, 200) == "inside" and asking.side(201 - answer, 200) == "edge"
    assert asking.side(199 + sentence, 200) == "edge" and asking.side(200 + sentence, 200) == "beyond"


def _grid(loaded: tuple[Any, Any], hits: dict[str, list[bool]]) -> NeedleGrid:
    """A grid of one length and the distances 60 (inside a window of 100) and 300 (beyond it), with made-up answers."""
    haystack, cases = _haystack(loaded[1], [400], [60, 300])
    found = {way: [Answer(case, "12345", 390, "", hit, -1.0) for case, hit in zip(cases, each, strict=True)] for way, each in hits.items()}
    settings = {"model": "a model", "asked": haystack.asking.words, "lengths": [400], "distances": [60, 300], "trials": 1}
    return NeedleGrid(settings, haystack, 100 if len(hits) > 1 else None, found)


@pytest.mark.parametrize(
    "unpatched, streaming, forgets",
    [([True, True], [True, False], True), ([True, True], [False, True], False), ([True, False], [True, False], False)],
)
def test_that_a_window_forgets_is_said_where_it_was_seen(
    unpatched: list[bool], streaming: list[bool], forgets: bool, loaded: tuple[Any, Any]
) -> None:
    grid = _grid(loaded, {"unpatched": unpatched, "streaming(window=100)": streaming})
    lines = grid.lines()
    assert (
        lines[0]
        == f"keys recalled inside the window of 100 tokens: unpatched {unpatched[0]:d} of 1, streaming(window=100) {streaming[0]:d} of 1"
    )
    assert lines[1] == f"keys recalled beyond it: unpatched {unpatched[1]:d} of 1, streaming(window=100) {streaming[1]:d} of 1"
    assert ("beyond the window recall is 0" in " ".join(lines[2:])) is forgets


def test_a_grid_without_a_window_counts_all_keys(loaded: tuple[Any, Any]) -> None:
    assert _grid(loaded, {"unpatched": [True, False]}).lines() == ["unpatched: 1 of 2 keys recalled"]


def test_run_needle_and_its_files(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = loaded
    before = snapshot(model)
    haystack, cases = _haystack(tokenizer, [150, 250], [60, 200], trials=2)
    told: dict[str, int] = {}
    patches = parse_spec("streaming(window=100)")
    grid = run_needle(model, haystack, cases, patches, "tiny", lambda way, count: told.update({way: told.get(way, 0) + count}))
    assert_restored(before, model)
    spec = patches[0].spec
    assert told == {"unpatched": haystack.work(cases), spec: haystack.work(cases)}
    assert grid.window == 100 and list(grid.answers) == ["unpatched", spec]
    assert [(cell.length, cell.distance, cell.trials) for cell in grid.cells(spec)] == [(150, 60, 2), (250, 60, 2), (250, 200, 2)]
    mine = [a for a in grid.answers[spec] if (a.case.length, a.case.distance) == (250, 60)]
    assert grid.cells(spec)[1].log_probability == pytest.approx(sum(a.log_probability for a in mine) / 2)

    needle_report.write(grid, tmp_path / "out", environment={"cpu": "none"})
    stored = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert stored["environment"] == {"cpu": "none"} and stored["recall"]["beyond"][spec]["trials"] == 2
    assert stored["cells"][spec][0]["distance"] == 60 and stored["sources"][0]["sha256"]
    rows = list(csv.DictReader((tmp_path / "out" / "needle.csv").open()))
    assert len(rows) == 6 and [row["window"] for row in rows[3:]] == ["inside", "inside", "beyond"]
    assert (tmp_path / "out" / "needle.png").read_bytes().startswith(b"\x89PNG")
    with Console(width=130, record=True, file=(tmp_path / "table.txt").open("w")) as console:
        console.print(needle_report.table(grid))
    text = console.export_text()
    assert spec in text and "in window" in text and "beyond" in text and "0/2" in text


def test_patches_that_do_not_apply_are_refused_before_any_work(loaded: tuple[Any, Any]) -> None:
    haystack, cases = _haystack(loaded[1], [200], [60])
    with pytest.raises(PatchError, match="508"):
        run_needle(loaded[0], haystack, cases, parse_spec("streaming(window=509)"), advance=lambda what, count: pytest.fail("worked"))


def test_lengths_follow_the_limit() -> None:
    model = tiny_model("llama")
    for limit, lengths in {512: [256, 512], 8192: [1024, 2048, 4096, 8192], 131072: [1024, 2048, 4096, 8192]}.items():
        model.config.max_position_embeddings = limit
        assert needle_text.lengths_for(model) == lengths


# -- the command -----------------------------------------------------------------------------------------------------------


def _run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["needle", *map(str, arguments)])


def test_the_command(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = (model_dir, "--patches", "streaming(sinks=2, window=100)", "--lengths", "250,150", "--distances", "200,60", "--trials", "1")
    result = _run(*arguments, "--out", out, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["settings"]["lengths"] == [150, 250] and found["settings"]["distances"] == [60, 200] and found["window"] == 100
    assert found["environment"]["torch"] == torch.__version__ and sorted(file.name for file in out.iterdir()) == sorted(needle_report.FILES)
    assert "3 keys" in result.stderr and "min on this machine" in result.stderr
    plain = _run(*arguments, "--out", out)
    assert plain.exit_code == 0 and "keys recalled inside the window of 100 tokens" in plain.stdout and str(out) in plain.stdout


@pytest.mark.parametrize(
    "arguments, says, code",
    [
        (("--lengths", "1k,x"), "list of numbers of tokens", 2),
        (("--distances", "0"), "list of numbers of tokens", 2),
        (("--trials", "0"), "trials", 2),
        (("--patches", "streming"), "did you mean 'streaming'", 1),
        (("--distances", "5"), "leaves no room for the question", 1),
        (("--lengths", "100", "--distances", "1k"), "has room", 1),
        (("--out", "none/there/out"), "does not exist", 1),
    ],
)
def test_bad_calls(
    arguments: tuple[str, ...], says: str, code: int, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run(model_dir, *arguments)
    assert result.exit_code == code and says in " ".join(result.stderr.split()) and "Traceback" not in result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


def test_one_k_is_1024_tokens(model_dir: Path, tmp_path: Path) -> None:
    result = _run(model_dir, "--lengths", "0k")
    assert result.exit_code == 2
    found = json.loads(_run(model_dir, "--lengths", "1k", "--distances", "60", "--trials", "1", "--out", tmp_path / "out", "--json").stdout)
    assert found["settings"]["lengths"] == [1024] and 900 < found["answers"]["unpatched"][0]["tokens"] <= 1024


# -- a model that can recall -----------------------------------------------------------------------------------------------


@needs_smollm2
def test_a_real_model_recalls_what_is_in_its_window_and_nothing_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needle_text, "english_ids", english_ids)  # in the tokens of another tokenizer than the other tests'
    model, tokenizer = load_smollm2()
    asking = Asking.of(tokenizer)
    cases = possible([550], [150, 450], 1, asking)
    haystack = Haystack.of(asking, cases)
    patches = parse_spec("streaming(window=252)")
    grid = run_needle(model, haystack, cases, patches)
    (spec,) = set(grid.answers) - {"unpatched"}
    assert asking.chat and [grid.side(distance) for distance in (150, 450)] == ["inside", "beyond"]
    assert [answer.hit for answer in grid.answers["unpatched"]] == [True, True]
    inside, beyond = grid.answers[spec]
    assert inside.hit and not beyond.hit
    assert inside.log_probability > -0.5 and beyond.log_probability < -1.5
    assert "beyond the window recall is 0" in grid.lines()[-1]
