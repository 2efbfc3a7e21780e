from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console

from patchkit.errors import PatchError
from patchkit.models import load_model
from patchkit.quality import demo as show
from patchkit.quality.perplexity import TextError, by_position, stream_nll
from patchkit.testing import assert_restored, snapshot


@pytest.fixture
def short_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "CONTEXTS", (64, 160))


def test_run_demo(model_dir: Path, short_contexts: None, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir)
    before = snapshot(model)
    told: Counter[str] = Counter()
    result = show.run_demo(model, tokenizer, tokens=2200, windows=[60, 20], advance=lambda what, count: told.update({what: count}))
    assert_restored(before, model)

    assert [row.name for row in result.rows] == ["unpatched", show.REFERENCE, "streaming 4+60", "streaming 4+20"]
    unpatched, reference, wide, narrow = result.rows
    assert result.tokens == 2200 and sum(told.values()) <= show.work(2200, [60, 20])
    for row in result.rows:
        assert [(b.start, b.stop) for b in row.buckets] == [(0, 512), (512, 2048), (2048, 2200)]
    ids, _ = show.heldout_ids(tokenizer, 2200)
    assert unpatched.buckets == by_position(stream_nll(model, ids), show.EDGES)
    assert reference.buckets[0].nll == pytest.approx(unpatched.buckets[0].nll, rel=1e-5)
    assert reference.buckets[1].nll != pytest.approx(unpatched.buckets[1].nll, rel=1e-5)
    assert set(wide.ms_per_token) == {64, 160} and not reference.ms_per_token
    assert narrow.cache_bytes is not None and wide.cache_bytes is not None and unpatched.cache_bytes is not None
    assert narrow.cache_bytes < wide.cache_bytes < unpatched.cache_bytes
    assert unpatched.speedup == 1.0
    assert result.ratio is not None and (result.ratio.start, result.ratio.stop) == (2048, 2200)
    assert result.ratio.nll == pytest.approx(wide.buckets[2].nll - reference.buckets[2].nll, rel=1e-4)
    assert "streaming 4+60 / unpatched, fresh every 512 tokens" in result.ratio_line()

    picture = tmp_path / "demo.png"
    show.draw(result, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with Console(width=160, record=True, file=(tmp_path / "table.txt").open("w")) as console:
        console.print(show.table(result))
    text = console.export_text()
    assert all(row.name in text for row in result.rows) and "2k-2200" in text


def test_a_short_text_has_no_ratio(model_dir: Path, short_contexts: None) -> None:
    model, tokenizer = load_model(model_dir)
    result = show.run_demo(model, tokenizer, tokens=100, windows=[20])
    assert result.ratio is None and "too few" in result.ratio_line()


def test_a_window_that_is_too_large_is_refused_before_any_work(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir)
    with pytest.raises(PatchError, match="508"):
        show.run_demo(model, tokenizer, tokens=100, windows=[509], advance=lambda what, count: pytest.fail("worked before the refusal"))


def test_heldout_text_is_one_stream_of_whole_files(model_dir: Path) -> None:
    tokenizer = load_model(model_dir)[1]
    ids, files = show.heldout_ids(tokenizer, 20000)
    assert len(ids) == 20001 and files > 1
    assert ids[0] == tokenizer.bos_token_id and int((ids == tokenizer.bos_token_id).sum()) == files
    again, _ = show.heldout_ids(tokenizer, 5000)
    assert torch.equal(again, ids[:5001])


def test_a_python_without_sources(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_model(model_dir)[1]

    def no_sources(split: str) -> list[Path]:
        raise FileNotFoundError("no Python sources")

    monkeypatch.setattr(show, "stdlib_files", no_sources)
    with pytest.raises(TextError, match="complete Python"):
        show.heldout_ids(tokenizer, 100)
