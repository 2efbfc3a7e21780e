"""Files of heads, of converted attention and of suffixes know all of their model: a change of one inner layer is refused by its name."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from patchkit import patch_model
from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.linear.state import LinearState, load_state
from patchkit.models import load_model
from patchkit.speculation import load_heads
from patchkit.speculation.heads import MedusaHeads
from patchkit.testing import tiny_model
from patchkit.trained_for import TrainedFor
from patchkit.training.checkpoint import read_checkpoint, write_checkpoint
from patchkit.training.conversion import Conversion

INNER = "model.layers.1.mlp.up_proj.weight"


def save_heads(model: Any, path: Path) -> None:
    heads = MedusaHeads.start(model, 2)
    heads.trained_for = TrainedFor.of(model)
    heads.save(path)


def save_linear(model: Any, path: Path) -> None:
    LinearState.start(Target(model), "elu1", 8, 0, 64, [0, 1]).save(path)


def save_conversion(model: Any, path: Path) -> None:
    state = LinearState.start(Target(model), "elu1", 8, 0, 64, [0, 1])
    write_checkpoint(path, {}, Conversion(state, 64, 64, None, None, None, {}, [], [], {}), None)


def save_suffixes(model: Any, path: Path) -> None:
    patched = patch_model(copy.deepcopy(model), f"speculative(draft=suffix(scope='{path}'), k=2)", verbose=False)
    patched.generate(torch.arange(5, 17)[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)


def read_conversion(path: Path, model: Any) -> None:
    fresh = Conversion(LinearState.start(Target(model), "elu1", 8, 0, 64, [0, 1]), 64, 64, None, None, None, {}, [], [], {})
    read_checkpoint(path, {}, Target(model), fresh)


def read_suffixes(path: Path, model: Any) -> None:
    patch_model(copy.deepcopy(model), f"speculative(draft=suffix(scope='{path}'))", verbose=False)


Save, Read = Callable[[Any, Path], None], Callable[[Path, Any], Any]
FILES: dict[str, tuple[Save, Read, str]] = {
    "heads": (save_heads, lambda path, model: load_heads(path).check_fits(model), "Train heads for this model: patchkit train-heads"),
    "linear": (save_linear, load_state, "Convert this model: patchkit linearize"),
    "conversion": (save_conversion, read_conversion, "Convert this model: patchkit linearize"),
    "suffixes": (save_suffixes, read_suffixes, "give each its own file, or delete it"),
}


@pytest.mark.parametrize("kind", FILES)
def test_one_inner_layer_is_enough_to_be_refused(kind: str, tmp_path: Path) -> None:
    save, read, remedy = FILES[kind]
    model, path = tiny_model("llama"), tmp_path / "file"
    save(model, path)
    read(path, model)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.get_parameter(INNER).mul_(1.02)
    with pytest.raises(PatchError, match=f"another {INNER}.*{remedy}"):
        read(path, tuned)


@pytest.mark.parametrize("kind", ("heads", "linear", "suffixes"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_copies_in_another_precision_are_recognised(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save, read, _ = FILES[kind]
    model, path = tiny_model("llama"), tmp_path / "file"
    with torch.no_grad():
        model.lm_head.weight[::3] *= 1e-6  # of which float16 keeps few bits
    copied = copy.deepcopy(model).to(dtype)
    if dtype == torch.float16:
        assert TrainedFor.of(copied).fingerprint != TrainedFor.of(model).fingerprint
    save(model, path)
    read(path, copied)
    read(path, copied.float())
    save(copied, tmp_path / "of the copy")
    read(tmp_path / "of the copy", model)
    with torch.no_grad():
        copied.lm_head.weight[5, 5] *= 1.05
    with pytest.raises(PatchError, match="another LM head"):
        read(path, copied)


def rewritten(path: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Write a file again with what ``change`` makes of its model's facts; without them for None."""
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = change(json.loads(metadata.pop("trained_for")))
    save_file(tensors, path, metadata if facts is None else metadata | {"trained_for": json.dumps(facts)})


def without(facts: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in names}


@pytest.mark.parametrize("kind", ("heads", "linear", "suffixes"))
def test_older_files_load_and_say_what_they_do_not_know(kind: str, tmp_path: Path, caplog: Any) -> None:
    save, read, _ = FILES[kind]
    model, path = tiny_model("llama"), tmp_path / "file"
    tuned = copy.deepcopy(model)
    tuned.get_parameter(INNER).data.mul_(1.02)
    save(model, path)
    with caplog.at_level(logging.WARNING, "patchkit"):
        read(path, model)
        assert not caplog.messages
        rewritten(path, lambda facts: None if kind == "suffixes" else without(facts, "samples", "half"))
        read(path, model)
        assert sum("of an older format" in line and "alone" in line for line in caplog.messages) == 1
        read(path, tuned)


def test_files_with_four_elements_of_each_weight_are_compared_by_these(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "file"
    save_heads(model, path)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    flat = {name: parameter.detach().flatten() for name, parameter in model.named_parameters()}
    four = {name: [float(flat[name][i * (size - 1) // 3]) for i in range(4)] for name, size in sizes.items()}
    rewritten(path, lambda facts: without(facts, "half") | {"samples": four})
    load_heads(path).check_fits(model)
    model.get_parameter(INNER).data.mul_(1.02)
    with pytest.raises(UnsupportedModel, match=f"another {INNER}"):
        load_heads(path).check_fits(model)


def test_damaged_facts_of_a_suffix_file_are_refused(tmp_path: Path) -> None:
    model, path = tiny_model("llama"), tmp_path / "file"
    save_suffixes(model, path)
    rewritten(path, lambda facts: {"sizes": 3})
    with pytest.raises(PatchError, match=r"damaged: its model cannot be read.*Delete the file"):
        read_suffixes(path, model)


@pytest.mark.parametrize("kind", ("eagle", "medusa"))
def test_the_heads_that_ship_know_the_whole_model(kind: str) -> None:
    model, _ = load_model("bundled")
    facts = load_heads("bundled", kind).trained_for
    assert facts.samples.keys() == {name for name, _ in model.named_parameters()}
    assert all(len(each) == 16 for each in facts.samples.values())
    assert facts == TrainedFor.of(model)
    patch_model(copy.deepcopy(model).half(), f"speculative(draft={kind})", verbose=False)
    model.get_parameter("model.layers.4.mlp.down_proj.weight").data.mul_(1.02)
    with pytest.raises(UnsupportedModel, match=r"another model\.layers\.4\.mlp\.down_proj\.weight"):
        patch_model(model, f"speculative(draft={kind})")
