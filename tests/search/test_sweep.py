from __future__ import annotations

import csv
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from patchkit import patched
from patchkit.cli import app
from patchkit.errors import SpecError
from patchkit.measure.perplexity import TextError, block_nll, stream_nll
from patchkit.models import load_model
from patchkit.patches.streaming import StreamingLLM
from patchkit.search import sweep as quality
from patchkit.search import sweep_files, sweep_report
from patchkit.streaming.heavy_hitters import DynamicSinks
from patchkit.streaming.reencode import Reencode
from patchkit.testing import assert_restored, snapshot, tiny_model

PATCHES = [StreamingLLM(0, 20), StreamingLLM(4, 20), StreamingLLM(4, 20, refresh=Reencode(8)), StreamingLLM(4, 600)]


@pytest.fixture(scope="module")
def loaded(model_dir: Path):
    return load_model(model_dir)


@pytest.fixture(scope="module")
def texts(loaded) -> list[quality.Document]:
    return quality.documents(loaded[1], [], tokens=90, count=3)


def run(loaded, texts, folder: Path, patches=PATCHES, **options) -> quality.Sweep:
    return quality.run_sweep(loaded[0], texts, patches, folder, "tiny", chunk=32, block=64, rounds=2, **options)


@pytest.fixture(scope="module")
def swept(loaded, texts, tmp_path_factory: pytest.TempPathFactory) -> tuple[quality.Sweep, Path]:
    folder = tmp_path_factory.mktemp("sweeps") / "made" / "here"
    before, told = snapshot(loaded[0]), Counter()
    result = run(loaded, texts, folder, advance=lambda what, count: told.update({what: count}))
    assert_restored(before, loaded[0])
    assert len(told) == 5 and set(told.values()) == {270}  # the refused one scores nothing
    return result, folder


def test_perplexities_are_those_of_stream_nll_by_document(loaded, texts, swept) -> None:
    model, result = loaded[0], swept[0]
    assert [row.name for row in result.rows] == [quality.BLOCKS, quality.UNPATCHED, *(patch.spec for patch in PATCHES)]
    expected = {quality.UNPATCHED: [stream_nll(model, text.ids, 32) for text in texts]}
    expected[quality.BLOCKS] = [block_nll(model, text.ids, 64) for text in texts]
    for patch in PATCHES[:3]:
        with patched(model, patch, verbose=False):
            expected[patch.spec] = [stream_nll(model, text.ids, 32) for text in texts]
    for row in result.rows[:-1]:
        assert row.nll == pytest.approx([nll.double().mean().item() for nll in expected[row.name]], rel=1e-6)
        assert row.perplexity == pytest.approx(math.exp(torch.cat(expected[row.name]).double().mean().item()), rel=1e-6)
    assert len({round(row.perplexity or 0.0, 6) for row in result.rows[:-1]}) == 5


def test_time_bytes_and_refreshes(swept) -> None:
    rows = {row.name: row for row in swept[0].rows}
    unpatched, plain, reencoded = rows[quality.UNPATCHED], rows[PATCHES[1].spec], rows[PATCHES[2].spec]
    assert rows[quality.BLOCKS].ms_per_token is None and all((row.ms_per_token or 0) > 0 for row in (unpatched, plain, reencoded))
    assert unpatched.over_unpatched == 1
    assert plain.cache_bytes is not None and unpatched.cache_bytes is not None and plain.cache_bytes < unpatched.cache_bytes
    assert plain.refreshes == 0 and reencoded.refreshes == 3 * ((89 - 24) // 8)


def test_what_the_model_cannot_run_is_a_row_with_the_reason(swept) -> None:
    refused = swept[0].rows[-1]
    assert refused.refused is not None and "512 positions" in refused.refused and refused.perplexity is None and not refused.nll
    assert swept[0].ratio(refused, quality.BLOCKS) is None


def test_ratios_are_paired_by_document(swept) -> None:
    result = swept[0]
    reencoded, plain = result.rows[4], result.rows[3]
    ratio = result.over_plain(reencoded)
    assert ratio is not None and ratio.value == pytest.approx((reencoded.perplexity or 0) / (plain.perplexity or 1))
    singles = sorted(math.exp(a - b) for a, b in zip(reencoded.nll, plain.nll, strict=True))
    assert singles[0] <= ratio.low < ratio.value < ratio.high <= singles[-1]
    assert result.over_plain(plain) is None


def test_the_front_holds_what_nothing_beats(swept) -> None:
    def row(name: str, ppl: float, ms: float, size: int) -> quality.SweepPoint:
        return quality.SweepPoint(name, nll=[math.log(ppl)], perplexity=ppl, over_unpatched=ms, cache_bytes=size)

    # As fast as a, to 3 %, and larger.
    worse = row("worse than a", 8, 0.795, 101)
    rows = [row("a", 8, 0.8, 100), row("b", 9, 0.5, 100), worse, row("small", 20, 1, 10), row("a again", 8, 0.8, 100)]
    result = quality.Sweep({}, [10], [*rows, quality.SweepPoint("refused", refused="no")])
    assert [each.name for each in result.front()] == ["a", "b", "small", "a again"]


def test_files(swept) -> None:
    result, folder = swept
    assert sorted(path.name for path in folder.iterdir()) == sorted(sweep_files.FILES)
    stored = json.loads((folder / "sweep.json").read_text())
    assert [row["name"] for row in stored["rows"]] == [row.name for row in result.rows] and stored["settings"]["environment"]["torch"]
    with (folder / "sweep.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[2]["perplexity"]) == result.rows[2].perplexity and "512 positions" in lines[-1]["refused"]
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=150, record=True)
    console.print(sweep_report.table(result))
    shown = console.export_text()
    assert "4+20 reencode(every=8)" in shown and "refused" in shown and "unpatched in blocks" in shown


def test_an_interrupted_sweep_goes_on(loaded, texts, tmp_path: Path) -> None:
    scored: list[str] = []

    def interrupted(what: str, count: int) -> None:
        if what == PATCHES[1].spec:
            raise KeyboardInterrupt
        scored.append(what)

    with pytest.raises(KeyboardInterrupt):
        run(loaded, texts, tmp_path, advance=interrupted)
    assert [row["name"] for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]] == [*dict.fromkeys(scored)]
    first = json.loads((tmp_path / "sweep.json").read_text())["rows"][1]
    again: list[str] = []
    result = run(loaded, texts, tmp_path, advance=lambda what, count: again.append(what))
    assert not any(what in scored for what in again) and len(result.rows) == 6
    assert result.rows[1].ms_per_token == first["ms_per_token"]  # not measured again
    more = run(loaded, texts, tmp_path, [*PATCHES, StreamingLLM(1, 30)])
    assert len(more.rows) == 7 and more.rows[:6] == result.rows


def test_another_sweep_in_the_folder_is_refused_unless_it_is_dropped(loaded, texts, tmp_path: Path) -> None:
    options = dict(name="tiny", chunk=32, block=64, rounds=2)
    quality.run_sweep(loaded[0], texts, PATCHES[:1], tmp_path, **options)
    kept = (tmp_path / "sweep.json").read_bytes()
    changes = {
        "chunk 32 -> 16": (loaded[0], texts, dict(chunk=16)),
        "block 64 -> 32": (loaded[0], texts, dict(block=32)),
        'model "tiny" -> "other"': (loaded[0], texts, dict(name="other")),
        "texts": (loaded[0], texts[:2], {}),
        "weights": (load_model("stdlib-1m-draft")[0], texts, {}),
    }
    for named, (model, documents, change) in changes.items():
        with pytest.raises(sweep_files.SweepConflict, match=f"{named}.*--restart"):
            quality.run_sweep(model, documents, PATCHES[:1], tmp_path, **{**options, **change})
        assert (tmp_path / "sweep.json").read_bytes() == kept
    assert len(quality.run_sweep(loaded[0], texts[:2], [], tmp_path, **options, restart=True).rows) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"settings": {}, "rows": [1]}', '{"rows": []}'])
def test_a_damaged_file_is_not_overwritten(loaded, texts, tmp_path: Path, content: str) -> None:
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(sweep_files.SweepConflict):
        run(loaded, texts, tmp_path)
    assert (tmp_path / "sweep.json").read_text() == content


def test_a_model_whose_positions_end_is_measured_as_far_as_it_goes(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    text = quality.Document("long", torch.randint(4, 100, (700,), generator=torch.Generator().manual_seed(0)).tolist())
    result = quality.run_sweep(model, [text], PATCHES[:1], tmp_path, block=256, rounds=2)
    blocks, unpatched, streaming = result.rows
    assert blocks.perplexity is not None
    assert unpatched.refused is not None and "position table" in unpatched.refused
    assert streaming.refused is not None and "positions are baked into" in streaming.refused
    assert (tmp_path / "sweep.png").is_file()


def test_blocks_beyond_the_positions_are_a_row_with_the_reason(tmp_path: Path) -> None:
    text = quality.Document("long", torch.randint(4, 100, (700,), generator=torch.Generator().manual_seed(0)).tolist())
    blocks = quality.run_sweep(tiny_model("gpt2"), [text], [], tmp_path, block=600, rounds=2).rows[0]
    assert blocks.refused is not None and "600 tokens" in blocks.refused and "--block" in blocks.refused
    assert (tmp_path / "sweep.png").is_file()


def test_a_model_in_training_is_measured_as_it_would_run(tmp_path: Path) -> None:
    """Patched models in training mode run unpatched."""
    model = tiny_model("llama").train()
    text = quality.Document("text", torch.randint(4, 100, (60,), generator=torch.Generator().manual_seed(0)).tolist())
    _, unpatched, streaming = quality.run_sweep(model, [text], PATCHES[:1], tmp_path, rounds=1).rows
    assert model.training and streaming.nll != pytest.approx(unpatched.nll, abs=1e-6)


def test_documents(loaded, tmp_path: Path) -> None:
    tokenizer = loaded[1]
    found = quality.documents(tokenizer, [], tokens=300, count=4)
    assert len(found) == 4 and all(len(text.ids) == 301 for text in found) and len({text.name for text in found}) == 4
    (tmp_path / "a.txt").write_text("def add(a, b):\n    return a + b\n")
    assert len(quality.documents(tokenizer, [tmp_path / "a.txt"], 5, 1)[0].ids) == 6
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(TextError, match="empty"):
        quality.documents(tokenizer, [tmp_path / "empty.txt"], 5, 1)
    with pytest.raises(TextError, match="fewer with --tokens"):
        quality.documents(tokenizer, [], tokens=10**6, count=4)


def test_refreshes_are_spelt_as_in_specs_and_the_control_is_known_here_only() -> None:
    assert quality.parse_refresh("none") is None and quality.parse_refresh("reencode(every=9)") == Reencode(9)
    assert quality.parse_refresh("dynamic_sinks(n=2)") == DynamicSinks(2)
    assert quality.parse_refresh("tail_insert(n=2)") == quality.TailInsert(2)
    for wrong in ("tail_insrt", "reencode(", "3", "reencode(n=4)"):
        with pytest.raises(SpecError):
            quality.parse_refresh(wrong)
    from patchkit import parse_spec

    with pytest.raises(SpecError, match="tail_insert"):
        parse_spec("streaming(refresh=tail_insert)")


def test_the_command(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["sweep", str(model_dir), "--windows", "20,1000", "--sinks", "4", "--tokens", "60", "--documents", "2", "--rounds", "2"]
    options += ["--refresh", "none", "--refresh", "dynamic_sinks(n=3, every=4)", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0, done.output
    assert "4+20 dynamic_sinks(n=3, every=4)" in done.stdout and "512 positions" in done.stdout
    done = CliRunner().invoke(app, [*options, "--json"])
    result = json.loads(done.stdout)
    assert len(result["rows"]) == 6 and result["rows"][3]["over_plain"]["low"] > 0 and result["rows"][3]["refreshes"] == 2 * 8
    other = CliRunner().invoke(app, [*options, "--tokens", "50"])
    assert other.exit_code == 1 and "other settings" in other.stderr and "--restart" in other.stderr
    for wrong, words in {
        ("--windows", "0"): "too small",
        ("--sinks", "a"): "whole numbers",
        ("--refresh", "reencod"): "did you mean",
    }.items():
        failed = CliRunner().invoke(app, [*options, *wrong])
        assert failed.exit_code in (1, 2) and words in failed.stderr
    missing = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "no" / "where")])
    assert missing.exit_code == 1 and "does not exist" in missing.stderr

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(quality, "run_sweep", stop)
    stopped = CliRunner().invoke(app, options)
    assert stopped.exit_code == 130 and "resumes from" in stopped.stderr
