"""Specs in files, and the spec of no patch."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from patchkit import SpecError, patch_model, patched, report, unpatch_model, with_patches
from patchkit.cli import app
from patchkit.spec import parse_spec, read_spec
from patchkit.testing import assert_restored, snapshot, tiny_model

SPEC = "# found on this machine\nstreaming(sinks=2,  # few\n  window=30)\n+ mlp_int8\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tuned.spec"
    path.write_text(SPEC)
    return path


def test_a_file_is_read_wherever_a_spec_is(file: Path, model_dir: Path) -> None:
    expected = parse_spec("streaming(sinks=2, window=30) + mlp_int8")
    assert read_spec(file) == read_spec(str(file)) == parse_spec(f" @{file}\n") == expected
    for given in (file, f"@{file}", [file]):
        with patched(tiny_model("llama"), given, verbose=False) as model:
            assert [entry.spec for entry in report(model).patches] == [patch.spec for patch in expected]
    assert report(with_patches(file, verbose=False)(lambda: tiny_model("llama"))()).patches
    shown = CliRunner().invoke(app, ["generate", str(model_dir), "--prompt", "import", "--max-new-tokens", "2", "--patches", f"@{file}"])
    assert shown.exit_code == 0 and "streaming(sinks=2, window=30)" in shown.stderr


def test_none_is_no_patch(tmp_path: Path) -> None:
    (tmp_path / "none.spec").write_text("# nothing pays here\nnone\n")
    model = tiny_model("llama")
    before = snapshot(model)
    for given in (tmp_path / "none.spec", "none"):
        assert patch_model(model, given, lossless=True) is model and report(model).patches == []
        assert_restored(before, unpatch_model(model))
    assert parse_spec("none") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tuned.spec' cannot be read .*No such file.*check the path"),
        (b"", "tuned.spec': empty spec.*or write none"),
        (b"# only a comment", "empty spec"),
        (b"streeming", "tuned.spec': unknown patch 'streeming', did you mean 'streaming'"),
        (b"streaming + none", "unknown patch 'none'"),
        (b"@tuned.spec", "tuned.spec': cannot read the spec"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
    ],
)
def test_bad_files_are_refused_by_name_before_anything_is_touched(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.spec"
    if content is not None:
        path.write_bytes(content)
    model = tiny_model("llama")
    before = snapshot(model)
    for given in (path, f"@{path}"):
        with pytest.raises(SpecError, match=message):
            patch_model(model, given)
    assert_restored(before, model)
    with pytest.raises(SpecError, match=r"cannot be read .*directory"):
        parse_spec(f"@{tmp_path}")
