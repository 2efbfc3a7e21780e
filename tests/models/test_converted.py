"""Kept copies of converted models: a copy is used only if it is what it was made to be, and keeping none is no error."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch

from patchkit.models import ModelSource, ModelUnavailable, converted, loading

Made = tuple[Path, list[Path]]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "patchkit" / "models"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"what it is made from")
    return path


class Writer:
    """Writes a copy of two files, and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        assert list(folder.iterdir()) == []
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(bytes(range(256)) * 100)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_made_once_and_then_found(cache: Path, source: Path) -> None:
    write = Writer()
    copies = [converted.keep(source, write) for _ in range(3)]
    assert copies == [cache / "model"] * 3 and write.calls == 1
    assert names(cache / "model") == {"config.json", "weights", "patchkit.json"} and names(cache) == {"model"}


SPOILED: dict[str, Callable[[Path, Path], object]] = {
    "a bit of the weights": lambda copy, source: (copy / "weights").write_bytes(bytes(range(256)) * 99 + b"\xff" + bytes(range(1, 256))),
    "weights cut off": lambda copy, source: (copy / "weights").write_bytes(b""),
    "a file is missing": lambda copy, source: (copy / "config.json").unlink(),
    "a file too many": lambda copy, source: (copy / "tokenizer.json").write_text("{}"),
    "no list": lambda copy, source: (copy / "patchkit.json").unlink(),
    "list is no JSON": lambda copy, source: (copy / "patchkit.json").write_text("{"),
    "list of another kind": lambda copy, source: (copy / "patchkit.json").write_text("[1]"),
    "another format": lambda copy, source: (copy / "patchkit.json").write_text(
        json.dumps(json.loads((copy / "patchkit.json").read_text()) | {"format": 0})
    ),
    "made from another file": lambda copy, source: source.write_bytes(b"a newer one"),
    "a file stands there": lambda copy, source: [*(f.unlink() for f in copy.iterdir()), copy.rmdir(), copy.write_text("")],
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_what_it_was_is_made_anew(how: str, cache: Path, source: Path) -> None:
    write = Writer()
    copy = converted.keep(source, write)
    assert copy is not None
    SPOILED[how](copy, source)
    if how == "a file stands there":
        # Whatever it is, it is not ours to remove.
        assert converted.keep(source, write) is None and copy.is_file() and names(cache) == {"model"}
        return
    assert converted.keep(source, write) == copy and write.calls == 2
    assert converted.is_intact(copy, converted._sha256(source)) and names(cache) == {"model"}
    converted.keep(source, write)
    assert write.calls == 2


@pytest.mark.parametrize("spoiled", [False, True])
def test_many_at_once(spoiled: bool, cache: Path, source: Path) -> None:
    if spoiled:
        copy = converted.keep(source, Writer())
        assert copy is not None
        (copy / "weights").write_bytes(b"")
    write, together, found = Writer(), threading.Barrier(8), []

    def wait_and_write(folder: Path) -> None:
        together.wait(timeout=60)
        write(folder)

    threads = [threading.Thread(target=lambda: found.append(converted.keep(source, wait_and_write))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [cache / "model"] * 8 and write.calls == 8
    assert converted.is_intact(cache / "model", converted._sha256(source)) and names(cache) == {"model"}


def test_what_a_killed_process_left_is_removed_after_a_day(cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = cache / ".unfinished-xyz"
    left.mkdir(parents=True)
    converted.keep(source, Writer())
    assert names(cache) == {"model", left.name}  # it may be at work still
    now = converted.time.time()
    monkeypatch.setattr(converted.time, "time", lambda: now + 2 * 24 * 3600)
    (cache / "model" / "weights").unlink()
    converted.keep(source, Writer())
    assert names(cache) == {"model"}


def test_nothing_can_be_kept(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def full(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("XDG_CACHE_HOME", str(source))  # a file
    assert converted.keep(source, Writer()) is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert converted.keep(source, full) is None and names(tmp_path / "cache" / "patchkit" / "models") == set()
    assert "No space left on device" in caplog.text and caplog.text.count("converted at every start") == 2
    monkeypatch.setattr(converted, "cache_folder", lambda: Path("~nobody-of-this-name").expanduser())
    assert converted.keep(source, Writer()) is None


def test_a_fault_in_the_conversion_is_not_hidden(cache: Path, source: Path) -> None:
    def wrong(folder: Path) -> None:
        raise ModelUnavailable("the file is broken")

    with pytest.raises(ModelUnavailable, match="broken"):
        converted.keep(source, wrong)
    assert names(cache) == set()


@pytest.fixture
def tiny(tmp_path: Path) -> ModelSource:
    tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.tiny_llama())
    return ModelSource("tiny", str(tmp_path), is_local=True, gguf="tiny.gguf", keep=True)


def weights(loaded: tuple[Any, Any]) -> dict[str, torch.Tensor]:
    return dict(loaded[0].state_dict())


def config(loaded: tuple[Any, Any]) -> dict[str, Any]:
    return {name: value for name, value in loaded[0].config.to_dict().items() if name != "_name_or_path"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_and_without_a_copy_it_is_the_same_model(dtype: str, cache: Path, tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loading.load(tiny, dtype)
    assert names(cache) == {"tiny"}
    monkeypatch.setattr(loading, "_load_gguf", lambda *args: pytest.fail("converted again"))
    kept = loading.load(tiny, dtype)
    assert loading.directory_of(tiny) == cache / "tiny"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(tiny.place) / "tiny.gguf"))
    without = loading.load(tiny, dtype)
    for other in (kept, without):
        assert weights(first).keys() == weights(other).keys() and config(first) == config(other)
        assert all(torch.equal(values, weights(other)[name]) for name, values in weights(first).items())
        assert first[1].backend_tokenizer.to_str() == other[1].backend_tokenizer.to_str()
        assert first[1].special_tokens_map == other[1].special_tokens_map and first[1].model_max_length == other[1].model_max_length
        assert first[0].generation_config.to_dict() == other[0].generation_config.to_dict()


def test_a_directory_is_to_be_had_without_a_cache(tiny: ModelSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path(tiny.place) / "tiny.gguf"))
    loading.directory_of.cache_clear()
    folder = loading.directory_of(tiny)
    assert (folder / "model.safetensors").is_file() and loading.directory_of(tiny) == folder
    loading.directory_of.cache_clear()
    monkeypatch.setattr(loading.tempfile, "mkdtemp", lambda **options: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(ModelUnavailable, match="XDG_CACHE_HOME"):
        loading.directory_of(tiny)
