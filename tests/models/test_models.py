from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch

from patchkit.models import BUNDLED, SMOLLM2, ModelUnavailable, bundled_path, load_model

SHIPPED = [name for name in BUNDLED if name != SMOLLM2]


@pytest.mark.parametrize("name", ["bundled", *SHIPPED])
def test_bundled_models_load_without_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", _no_network)
    model, tokenizer = load_model(name)
    assert model.dtype == torch.float32 and not model.training
    text = "def main() -> None:\n    print('hi')\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert torch.isfinite(model(input_ids=ids).logits).all()


def test_bundled_pair_shares_a_tokenizer_and_is_small() -> None:
    target, draft = map(bundled_path, SHIPPED)
    assert (target / "tokenizer.json").read_bytes() == (draft / "tokenizer.json").read_bytes()
    sizes = {file: file.stat().st_size for path in (target, draft) for file in path.iterdir()}
    heads = sum(size for file, size in sizes.items() if file.name.endswith("_heads.safetensors"))
    assert 0 < heads <= 4 * 2**20
    assert sum(sizes.values()) - heads <= 16 * 2**20


def test_directory_loads_in_the_wanted_dtype(model_dir: Path) -> None:
    model, tokenizer = load_model(model_dir, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert tokenizer.bos_token_id == 0


@pytest.mark.parametrize(
    "name, says",
    [
        ("", "empty"),
        ("./nowhere", "no such model directory"),
        ("/nowhere/at/all", "no such model directory"),
        ("one/two/three", "no such model directory"),
        ("not a hub id", "neither a directory nor a valid hub id"),
        (__file__, "is a file"),
    ],
)
def test_bad_names_are_refused(name: str, says: str) -> None:
    with pytest.raises(ModelUnavailable, match=says):
        load_model(name)


def test_unknown_bundled_name() -> None:
    with pytest.raises(ModelUnavailable, match=BUNDLED[0]):
        bundled_path("stdlib-8m")


def _config(path: Path, **changes: object) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda path: (path / "config.json").write_text("{"), "cannot be read as JSON"),
    "config is not UTF-8": (lambda path: (path / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read as JSON"),
    "config is a list": (lambda path: (path / "config.json").write_text("[]"), "model_type"),
    "unknown type": (lambda path: _config(path, model_type="no_such_type"), "config .* cannot be used"),
    "not a causal LM": (lambda path: _config(path, model_type="clip"), "not a causal language model"),
    "wrong type of a field": (lambda path: _config(path, hidden_size="big"), "config .* cannot be used"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no weights"),
    "weights cut off": (lambda path: os.truncate(path / "model.safetensors", 1000), "weights .* cannot be loaded"),
    "weights of another shape": (lambda path: _config(path, intermediate_size=96), "weights .* cannot be loaded"),
    "weights of fewer layers": (lambda path: _config(path, num_hidden_layers=3), "incomplete"),
    "no tokenizer": (lambda path: [file.unlink() for file in path.glob("tokenizer*")], "tokenizer"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_directories_are_refused(case: str, model_dir: Path, tmp_path: Path) -> None:
    spoil, says = BROKEN[case]
    path = tmp_path / "model"
    shutil.copytree(model_dir, path)
    spoil(path)
    with pytest.raises(ModelUnavailable, match=says):
        load_model(path)


def test_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", _no_network)
    with pytest.raises(ModelUnavailable, match="cannot be reached"):
        load_model("nobody/no-such-model-anywhere")


def test_offline_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *a, **k: pytest.fail("asked the hub in offline mode"))
    with pytest.raises(ModelUnavailable, match="HF_HUB_OFFLINE"):
        load_model("nobody/no-such-model-anywhere")


def _no_network(*args: object, **kwargs: object) -> None:
    raise ConnectionError("no network in this test")
