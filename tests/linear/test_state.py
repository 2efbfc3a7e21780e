"""The file of converted attention: what comes back, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.linear.feature_maps import available_feature_maps
from patchkit.linear.state import LinearState, head_sizes, load_state
from patchkit.testing import tiny_model


def _state(model: Any, feature_map: str = "hedgehog", layers: tuple[int, ...] = (0, 1)) -> LinearState:
    """A state whose every number is random."""
    state = LinearState.start(Target(model), feature_map, 8, 0, 32, list(layers))
    random = torch.Generator().manual_seed(0)
    for index, part in state.parts.items():
        if index == 0:
            part.add_readout()
        for parameter in part.parameters():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random))
    name = "model.layers.0.self_attn.q_proj"
    outputs, inputs = model.get_submodule(name).weight.shape
    state.lora[name] = torch.randn(2, inputs, generator=random), torch.randn(outputs, 2, generator=random)
    return state


def _equal(one: LinearState, other: LinearState, dtype: torch.dtype = torch.float32) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.pop("metadata") == b.pop("metadata") and a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor.to(dtype).float(), b[name]), name


@pytest.mark.parametrize("feature_map", available_feature_maps())
def test_a_state_comes_back_from_a_file_and_from_a_dict(feature_map: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    state = _state(model, feature_map)
    state.save(tmp_path / "state.safetensors")
    _equal(state, load_state(tmp_path / "state.safetensors", model))
    _equal(state, load_state(str(tmp_path / "state.safetensors"), Target(model)))
    _equal(state, load_state(state.state_dict(), model))
    assert load_state(state, model) is state
    state.save(tmp_path / "half.safetensors", torch.bfloat16)
    _equal(state, load_state(tmp_path / "half.safetensors", model), torch.bfloat16)


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    model = tiny_model("llama")
    _state(model, layers=(0,)).save(tmp_path / "state.safetensors")
    with safe_open(tmp_path / "state.safetensors", "pt") as file:
        metadata, shapes = file.metadata(), {name: list(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        "layers.0.query_map.weight": [4, 16, 16],
        "layers.0.key_map.weight": [2, 16, 16],
        "layers.0.factor": [4],
        "layers.0.readout": [4, 16, 16],
        "lora.model.layers.0.self_attn.q_proj.A": [2, 64],
        "lora.model.layers.0.self_attn.q_proj.B": [64, 2],
    }
    assert (metadata["format"], metadata["feature_map"], metadata["window"], metadata["layers"]) == (
        "patchkit linear 1",
        "hedgehog",
        "8",
        "[0]",
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_model_in_another_precision_is_the_same_model(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16).float()  # as a checkpoint in bfloat16 is loaded in float32
    with torch.no_grad():
        model.lm_head.weight[:, :8] *= 2.0**-20  # what float16 rounds
    state = _state(model)
    other = copy.deepcopy(model).to(dtype)
    _equal(state, load_state(state.state_dict(), other))
    with torch.no_grad():
        other.lm_head.weight[0, 20] += 1
    with pytest.raises(UnsupportedModel, match=r"another LM head.*patchkit linearize"):
        load_state(state.state_dict(), other)


def test_a_state_for_a_model_of_other_sizes_is_refused() -> None:
    state = _state(tiny_model("llama"))
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(64, 100, bias=False)
    with pytest.raises(UnsupportedModel, match=r"llama model with a hidden size of 64 and 128 tokens, and this one has 64 and 100"):
        load_state(state, model)


def _without(name: str) -> Any:
    return lambda tensors, metadata: tensors.pop(name)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without("layers.0.factor"), r"lacks the tensor 'layers.0.factor' \[4\]"),
        (_without("lora.model.layers.0.self_attn.q_proj.B"), "lacks the tensor 'lora.model.layers.0.self_attn.q_proj.B'"),
        (lambda t, m: t.update({"layers.1.factor": torch.zeros(3)}), r"'layers.1.factor' .*is \[3\], and this model asks for \[4\]"),
        (lambda t, m: t.update({"layers.1.bias": torch.zeros(3)}), "'layers.1.bias', which has no place"),
        (lambda t, m: t.update({"lora.model.norm.A": torch.zeros(2, 3)}), "adapts model.norm, which is not a projection"),
        (lambda t, m: m.update(layers="[0, 7]"), r"converts layer 7, and the model has attention in layers \[0, 1\]"),
        (lambda t, m: m.update(feature_map="cosine"), "feature map 'cosine', which does not exist"),
        (lambda t, m: m.update(format="patchkit heads 1"), "holds no linear attention of patchkit"),
        (lambda t, m: m.pop("window"), "metadata .* cannot be used"),
        (lambda t, m: m.update(trained_for="{}"), "metadata .* cannot be used"),
    ],
)
def test_a_spoilt_file_is_refused_by_name(spoil: Any, message: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    path = tmp_path / "state.safetensors"
    _state(model).save(path)
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    spoil(tensors, metadata)
    save_file(tensors, path, metadata)
    with pytest.raises(PatchError, match=message):
        load_state(path, model)


def test_what_is_no_state_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(PatchError, match=r"no file of linear attention at .*missing.safetensors"):
        load_state(tmp_path / "missing.safetensors", model)
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(PatchError, match="cannot be read as safetensors"):
        load_state(tmp_path / "text", model)
    with pytest.raises(PatchError, match="holds no linear attention of patchkit"):
        load_state({"layers.0.factor": torch.zeros(4)}, model)


def test_head_sizes_are_those_of_the_projections() -> None:
    assert head_sizes(Target(tiny_model("llama"))) == {0: (4, 2, 16, 16), 1: (4, 2, 16, 16)}
