from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from patchkit import patch_model
from patchkit.cli import app
from patchkit.errors import PatchError
from patchkit.measure import demo as show
from patchkit.measure import demo_plan, demo_report, texts
from patchkit.measure.english_text import english_ids
from patchkit.measure.needle import answers
from patchkit.measure.needle_grid import Answer
from patchkit.measure.needle_text import Asking, Haystack, NeedleCase
from patchkit.measure.perplexity import TextError, by_position, stream_nll
from patchkit.models import load_model
from patchkit.testing import assert_restored, snapshot, tiny_model
from patchkit.views import twin


@pytest.fixture
def short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_plan, "CONTEXTS", (64, 160))


def test_run_demo(model_dir: Path, short_contexts: None, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir)
    before = snapshot(model)
    told: Counter[str] = Counter()
    result = show.run_demo(model, tokenizer, tokens=2200, windows=[60, 20], advance=lambda what, count: told.update({what: count}))
    assert_restored(before, model)

    assert [row.name for row in result.rows] == ["unpatched", show.REFERENCE, "streaming 4+60", "streaming 4+20"]
    unpatched, reference, wide, narrow = result.rows
    plan = show.plan_for(model, 2200, [60, 20])
    assert result.plan == plan and not plan.english and plan.reference == show.REFERENCE
    assert result.tokens == 2200 and sum(told.values()) == plan.work()
    for row in result.rows:
        assert [(b.start, b.stop) for b in row.buckets] == [(0, 512), (512, 2048), (2048, 2200)]
        assert not row.keys
    ids, _ = texts.heldout_ids(tokenizer, 2200)
    assert unpatched.buckets == by_position(stream_nll(model, ids), demo_plan.EDGES)
    assert reference.buckets[0].nll == pytest.approx(unpatched.buckets[0].nll, rel=1e-5)
    assert reference.buckets[1].nll != pytest.approx(unpatched.buckets[1].nll, rel=1e-5)
    assert set(wide.ms_per_token) == {64, 160} and not reference.ms_per_token
    assert narrow.cache_bytes is not None and wide.cache_bytes is not None and unpatched.cache_bytes is not None
    assert narrow.cache_bytes < wide.cache_bytes < unpatched.cache_bytes
    assert unpatched.speedup == 1.0
    (ratio,) = wide.ratios
    assert (ratio.start, ratio.stop) == (2048, 2200)
    assert ratio.nll == pytest.approx(wide.buckets[2].nll - reference.buckets[2].nll, rel=1e-4)
    (line,) = result.ratio_lines()
    assert line.startswith("perplexity at positions 2k-2200, streaming 4+60 / unpatched, fresh every 512 tokens: ")
    assert f"{ratio.perplexity:.3f} ± " in line and not result.recall_lines() and demo_report.keys_table(result) is None

    picture = tmp_path / "demo.png"
    demo_report.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = _printed(demo_report.table(result), tmp_path)
    assert all(row.name in text for row in result.rows) and "2k-2200" in text and "held-out standard library files" in text


def _printed(shown: Table | None, folder: Path) -> str:
    with Console(width=160, record=True, file=(folder / "table.txt").open("w")) as console:
        console.print(shown)
    return " ".join(console.export_text().split())


@pytest.mark.parametrize("chat", [False, True])
def test_a_model_made_for_a_long_context(chat: bool, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_plan, "LONG", 256)  # the model was made for 512 positions
    monkeypatch.setattr(demo_plan, "DISTANCES", (60, 300, 385))
    model, tokenizer = load_model(model_dir)
    if chat:
        tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}[{{ message['content'] }}] {% endfor %}"
    before = snapshot(model)
    told: Counter[str] = Counter()
    result = show.run_demo(model, tokenizer, advance=lambda what, count: told.update({what: count}))
    assert_restored(before, model)

    plan = show.plan_for(model)
    assert result.plan == plan and (plan.tokens, plan.windows, plan.limit) == (768, (124, 28), 512)
    assert (plan.contexts, plan.distances) == ((256, 512, 768), (60, 300)) and plan.reference == "unpatched"
    assert sum(told.values()) <= plan.work()
    assert [row.name for row in result.rows] == ["unpatched", "streaming 4+124", "streaming 4+28", "memory 4+4+12"]
    unpatched, wide, narrow, memory = result.rows
    assert narrow.cache_bytes > memory.cache_bytes > narrow.cache_bytes / 2 and memory.ms_per_token.keys() == wide.ms_per_token.keys()
    assert memory.buckets[2].nll != pytest.approx(narrow.buckets[2].nll, rel=1e-5)
    ids, sources = english_ids(tokenizer, 768)
    assert result.sources == sources and unpatched.buckets == by_position(stream_nll(model, ids), (0, 128, 512, 768))
    # In the first range the window holds everything; in the others it does not.
    assert wide.buckets[0].nll == pytest.approx(unpatched.buckets[0].nll, rel=1e-5)
    assert [(ratio.start, ratio.stop) for ratio in wide.ratios] == [(128, 512), (512, 768)] and not unpatched.ratios
    for ratio, its, mine in zip(wide.ratios, unpatched.buckets[1:], wide.buckets[1:], strict=True):
        assert ratio.perplexity == pytest.approx(mine.perplexity / its.perplexity, rel=1e-4) and ratio.perplexity != pytest.approx(1.0)
    assert [line.partition(":")[0] for line in result.ratio_lines()] == [
        f"perplexity at positions {where}, streaming 4+124 / unpatched" for where in ("128-512", "512-768")
    ]

    haystack = Haystack.of(Asking.of(tokenizer), [key.case for key in wide.keys])
    assert [key.case.distance for key in wide.keys] == [60, 300] and wide.keys == answers(
        patch_model(twin(model), "streaming(window=124)", verbose=False), haystack, [key.case for key in wide.keys], lambda count: None
    )
    recall = result.recall()
    assert sum(each["asked"] for each in recall.values()) == 8 and recall["unpatched"]["asked"] == 2 and recall["beyond"]["asked"] == 3
    assert recall["memory"]["asked"] == 2
    assert result.recall_lines()[0].startswith("keys recalled: unpatched ")

    picture = tmp_path / "demo.png"
    demo_report.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = _printed(demo_report.table(result), tmp_path)
    assert "512-768*" in text and "*: beyond the 512 positions" in text and "English" in text
    asked = _printed(demo_report.keys_table(result), tmp_path)
    assert ("chat template" in asked) is chat and ("plain continuation" in asked) is not chat
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["plan"]["limit"] == 512 and stored["ratios"][1]["start"] == 512 and stored["sources"][0]["sha256"] == sources[0].sha256
    assert stored["rows"][1]["keys"][0]["key"] == wide.keys[0].key


@pytest.mark.parametrize(
    "limit, tokens, windows, edges, contexts, beyond",
    [
        (8192, 12288, (2044, 508), (0, 2048, 8192, 12288), (1024, 4096, 8192, 12288), 8192),
        (131072, 12288, (2044, 508), (0, 2048, 8192, 12288), (1024, 4096, 8192, 12288), None),
        (4096, 6144, (1020, 252), (0, 1024, 4096, 6144), (1024, 2048, 4096, 6144), 4096),
        (2048, 16384, (508, 252, 124), (0, 512, 2048, 8192, 16384), (1024, 8192, 32768), None),
        (512, 16384, (508, 252, 124), (0, 512, 2048, 8192, 16384), (1024, 8192, 32768), None),
    ],
)
def test_what_is_shown_follows_from_the_position_limit(
    limit: int, tokens: int, windows: tuple[int, ...], edges: tuple[int, ...], contexts: tuple[int, ...], beyond: int | None
) -> None:
    model = tiny_model("llama")
    model.config.max_position_embeddings = limit
    plan = show.plan_for(model)
    assert (plan.tokens, plan.windows, plan.edges, plan.contexts, plan.limit) == (tokens, windows, edges, contexts, beyond)
    assert plan.english is (limit > 2048) and bool(plan.distances) is plan.english
    assert plan.memory == (demo_plan.memory_like(windows[-1]) if plan.english else None) and not plan.refused
    assert show.plan_for(model, 3000, [7]).windows == (7,) and show.plan_for(model, 3000).tokens == 3000


def test_caches_are_kept_as_late_as_possible_before_each_context(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    ids, _ = english_ids(tokenizer, 1500)
    keeper = show._Keeper((100, 512, 700, 1500, 2000), 1500)
    stream_nll(model, ids, 512, keep=keeper)
    assert {context: seen for context, (seen, _) in keeper.kept.items()} == {512: 512, 700: 512, 1500: 1500, 2000: 1500}
    assert all(cache.get_seq_length() == seen for seen, cache in keeper.kept.values())
    assert keeper.kept[512][1] is not keeper.kept[700][1]


def _made_up(beyond: bool, unpatched: bool = True) -> show.Demo:
    """A demo of one window of 100, asked at 60 (inside it) and 300 (beyond it)."""
    tokenizer = load_model("bundled")[1]
    plan = show.DemoPlan(True, 10, (100,), (0, 10), (0, 10), None, (10,), (60, 300))
    hits = {"unpatched": (True, unpatched), "streaming 4+100": (True, beyond)}
    rows = [
        show.DemoRow(
            name,
            [],
            [],
            [],
            window,
            keys=[Answer(NeedleCase(400, at, 0), "12345", 390, "", hit, -1.0) for at, hit in zip((60, 300), each, strict=True)],
        )
        for (name, each), window in zip(hits.items(), (None, 100), strict=True)
    ]
    return show.Demo(plan, 10, 1, [], rows, Asking.of(tokenizer))


def test_that_a_window_forgets_is_said_where_it_was_seen() -> None:
    first, forgets = _made_up(beyond=False).recall_lines()
    assert first == "keys recalled: unpatched 2 of 2, streaming, inside the window 1 of 1, beyond it 0 of 1"
    assert "beyond the window recall is 0" in forgets
    assert len(_made_up(beyond=True).recall_lines()) == 1
    assert len(_made_up(beyond=False, unpatched=False).recall_lines()) == 2  # the near key is enough to know that it can recall


def test_a_short_text_has_no_ratio(model_dir: Path, short_contexts: None) -> None:
    model, tokenizer = load_model(model_dir)
    result = show.run_demo(model, tokenizer, tokens=100, windows=[20])
    assert "too few" in result.ratio_lines()[0] and len(result.ratio_lines()) == 1


def test_a_window_that_is_too_large_is_refused_before_any_work(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    with pytest.raises(PatchError, match="508"):
        show.run_demo(model, tokenizer, tokens=100, windows=[509], advance=lambda what, count: pytest.fail("worked before the refusal"))


def test_heldout_text_is_one_stream_of_whole_files(model_dir: Path) -> None:
    tokenizer = load_model(model_dir)[1]
    ids, files = texts.heldout_ids(tokenizer, 20000)
    assert len(ids) == 20001 and files > 1
    assert ids[0] == tokenizer.bos_token_id and int((ids == tokenizer.bos_token_id).sum()) == files
    again, _ = texts.heldout_ids(tokenizer, 5000)
    assert torch.equal(again, ids[:5001])


def test_a_python_without_sources(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_model(model_dir)[1]

    def no_sources(split: str) -> list[Path]:
        raise FileNotFoundError("no Python sources")

    monkeypatch.setattr(texts, "stdlib_files", no_sources)
    with pytest.raises(TextError, match="complete Python"):
        texts.heldout_ids(tokenizer, 100)


def test_the_model_is_an_argument_or_an_option(model_dir: Path, short_contexts: None, tmp_path: Path) -> None:
    def run(*arguments: str) -> dict[str, Any]:
        options = ("--tokens", "100", "--windows", "20", "--out", str(tmp_path / "demo.png"), "--json")
        result = CliRunner().invoke(app, ["demo", *arguments, *options])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    first, second = run(str(model_dir)), run("--model", str(model_dir))
    assert first["model"] == second["model"] == str(model_dir)
    assert first["rows"][0]["buckets"] == second["rows"][0]["buckets"]
    both = CliRunner().invoke(app, ["demo", "bundled", "--model", str(model_dir)])
    assert both.exit_code == 2 and "two models" in " ".join(both.stderr.split())
