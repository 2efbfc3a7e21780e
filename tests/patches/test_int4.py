"""int4: what it converts, how close it stays, that GGUF's weights keep their values, how it saves, follows weights, and goes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from patchkit import (
    IrreversiblePatch,
    NothingMatched,
    PatchError,
    SpecError,
    StaleWeights,
    UnsupportedModel,
    parse_spec,
    patch_model,
    patched,
    refresh,
    report,
    unpatch_model,
)
from patchkit.anatomy.target import Target
from patchkit.int4.importance import mean_squares
from patchkit.int4.weight import Int4Weight
from patchkit.int8.weight import Int8Weight
from patchkit.patches.int4 import Int4
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model

IDS = torch.randint(4, 100, (2, 30), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(4, 100, (4, 64), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def converted(model: Any, kind: type[Any] = Int4Weight) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(vars(module).get("_parameters", {}).get("weight"), kind)}


def small(tied: bool = True) -> Any:
    """A random Llama whose head is, or is not, its embedding."""
    sizes: dict[str, Any] = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


def with_rounded_weights(patched_model: Any, plain: Any) -> Any:
    """``plain`` with, in floating point, the weights that a patched model has in 4 bits."""
    for name in converted(patched_model):
        weight = patched_model.get_submodule(name).weight.dequantize()
        plain.get_submodule(name).weight = nn.Parameter(weight)  # of its own: an embedding that shares it stays
    return plain


# -- what is converted, and how close ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "mixtral"])
def test_scopes(family: str) -> None:
    found = {}
    for scope in ("mlp", "all", "all+head"):
        model = tiny_model(family)
        before = snapshot(model)
        patch_model(model, Int4(scope=scope), verbose=False)  # type: ignore[arg-type]
        found[scope] = converted(model)
        logits(model)
        unpatch_model(model)
        assert_restored(before, model)
    assert found["mlp"] < found["all"] < found["all+head"] and len(found["all+head"] - found["all"]) == 1


@pytest.mark.parametrize("options", [{}, {"group": 128}, {"symmetric": True}, {"fit": "gptq", "calibration": TEXT}], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_the_rounded_weights(tied: bool, options: dict[str, Any]) -> None:
    plain, model = small(tied), small(tied)
    embedding = model.get_input_embeddings().weight.detach().clone()
    patch_model(model, Int4(scope="all+head", mode="weight_only", **options), verbose=False)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    unpatched = logits(plain)
    right = logits(with_rounded_weights(model, plain))
    assert logit_error(logits(model), right) <= 2 * TOLERANCES[torch.float32].logits
    assert (right - unpatched).abs().max() > TOLERANCES[torch.float32].differs
    assert "another likeliest token at" in str(report(model))


def test_dynamic_rounds_activations_by_group() -> None:
    plain, model = small(), small()
    patch_model(model, Int4(mode="dynamic"), verbose=False)
    with_rounded_weights(model, plain)
    only_weights = logits(plain)

    def rounded(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        groups = args[0].unflatten(-1, (-1, 32))
        step = groups.abs().amax(-1, keepdim=True) / 127
        return (((groups / step).round() * step).flatten(-2),)

    for name in converted(model):
        plain.get_submodule(name).register_forward_pre_hook(rounded)
    # A rounding tie may fall the other way where the input differs in its last bit.
    assert (logits(model) - logits(plain)).abs().max() < 0.2 * (logits(plain) - only_weights).abs().max() + 1e-5


def test_experts_run_over_int4_weights() -> None:
    model = tiny_model("qwen3_moe")
    plain = logits(model)
    before = snapshot(model)
    patch_model(model, Int4(scope="mlp", mode="weight_only"), verbose=False)
    assert report(model).patches[0].changed == {"layers of fused experts": 2}
    found = logits(model)
    unpatch_model(model)
    assert_restored(before, model)
    for layer in model.model.layers:
        for key in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, key)
            for expert in weight.data:
                expert.copy_(Int4().scheme.quantize(expert).dequantize())
    assert logit_error(found, logits(model)) <= 2 * TOLERANCES[torch.float32].logits
    assert (found - plain).abs().max() > TOLERANCES[torch.float32].differs


def test_error_feedback_keeps_outputs_closer() -> None:
    ratio = {}
    for fit in ("clip", "gptq"):
        model = patch_model(small(), Int4(mode="weight_only", group=128, fit=fit, calibration=TEXT), verbose=False)  # type: ignore[arg-type]
        ratio[fit] = [facts["snr_db"] for facts in report(model).patches[0].modules.values()]
    assert sum(ratio["gptq"]) > sum(ratio["clip"]) + len(ratio["clip"])


# -- GGUF --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_weights_of_a_gguf_file_keep_their_values(kind: str) -> None:
    gguf: Any = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")
    model = small(tied=False)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            packed = gguf.quantize(module.weight.detach().numpy(), gguf.GGMLQuantizationType[kind])
            module.weight.data = torch.from_numpy(np.array(gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])))
    plain, before = logits(model), {name: weight.detach().clone() for name, weight in model.named_parameters()}
    patch_model(model, Int4(scope="all+head", mode="weight_only"), verbose=False)
    assert len(converted(model)) == 15
    for name in converted(model):
        assert torch.equal(model.get_submodule(name).weight.dequantize(), before[f"{name}.weight"]), name
    assert logit_error(logits(model), plain) <= 2 * TOLERANCES[torch.float32].logits


# -- memory, saving, weights that change --------------------------------------------------------------------------------------------


def test_freed_originals_leave_a_sixth_and_cannot_be_undone() -> None:
    model = patch_model(small(), Int4(keep_original=False), verbose=False)
    facts = report(model).patches[0].modules.values()
    stored, original = (sum(entry[f"{key}_bytes"] for entry in facts) for key in ("weight", "original"))
    held = sum(model.get_submodule(name).weight.stored_bytes() for name in converted(model))
    assert stored == held <= 0.18 * original  # rows of 64 and 96; a unit weighs less in longer ones
    expected = logits(model)
    with pytest.raises(IrreversiblePatch, match="load it again"):
        unpatch_model(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("keep_original", [True, False])
def test_a_checkpoint_in_floating_point_is_the_same_model_again(keep_original: bool, tmp_path: Path) -> None:
    """Also where the original weights are gone: the rounded ones are on their own grids."""
    model = patch_model(small(tied=False), Int4(scope="all+head", mode="weight_only", keep_original=keep_original), verbose=False)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert getattr(loaded.config, "quantization_config", None) is None
    patch_model(loaded.eval(), Int4(scope="all+head", mode="weight_only"), verbose=False)
    assert torch.equal(logits(loaded), logits(model))


def test_symmetric_weights_are_saved_packed(tmp_path: Path) -> None:
    """Read here by the format's description: 8 levels in 32 bits, the first in the lowest ones."""
    from safetensors.torch import load_file

    model = patch_model(small(), Int4(scope="all+head", symmetric=True, mode="weight_only"), verbose=False)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name in converted(model) - {"lm_head"}:
        packed, scale, shape = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape"))
        assert f"{name}.weight" not in stored and packed.dtype == torch.int32 and packed.shape == (shape[0], shape[1] // 8)
        levels = torch.stack([packed.long() >> 4 * i & 15 for i in range(8)], 2).flatten(1) - 8
        assert torch.equal(levels.float() * scale.repeat_interleave(32, 1), model.get_submodule(name).weight.dequantize())
    config = (tmp_path / "config.json").read_text()
    assert '"pack-quantized"' in config and '"lm_head"' in config
    unpatch_model(model)
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("dequantized", [True, False])
def test_stock_transformers_loads_the_packed_checkpoint(dequantized: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="the package compressed-tensors is not installed: pip install compressed-tensors")
    from transformers import CompressedTensorsConfig

    model = patch_model(small(tied=False), Int4(symmetric=True, mode="weight_only"), verbose=False)
    model.save_pretrained(tmp_path)
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantized else {}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, **options).eval()
    assert logit_error(logits(stock), logits(model)) <= 2 * TOLERANCES[torch.float32].logits
    if dequantized:  # and patched again, it has the same bits
        patch_model(stock, Int4(symmetric=True, mode="weight_only"), verbose=False)
        assert torch.equal(logits(stock), logits(model))


def test_weights_that_change_are_rounded_again_in_place() -> None:
    model = patch_model(small(), Int4(scope="all+head"), verbose=False)
    before, weight = logits(model), model.get_output_embeddings().weight
    address = weight.qdata.data_ptr()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5).add_(0.01)
    refresh(model)
    # By the inputs of the model that was patched.
    right = mean_squares(Target(unpatched := small()), {"lm_head": unpatched.get_output_embeddings()}, None)
    assert torch.equal(weight.qdata, Int4().scheme.quantize(model.get_input_embeddings().weight, squares=right["lm_head"]).qdata)
    assert weight.qdata.data_ptr() == address
    assert not torch.allclose(logits(model), before) and not refresh(model)


def test_weights_that_were_fitted_to_a_text_cannot_follow() -> None:
    model = small()
    original = model.model.layers[0].mlp.up_proj.weight
    patch_model(model, Int4(fit="gptq", calibration=TEXT), verbose=False)
    expected = logits(model)
    assert not refresh(model) and torch.equal(logits(model), expected)
    original.data[0, 0] += 1
    for _ in range(2):
        with pytest.raises(StaleWeights, match="fitted to calibration text"):
            refresh(model)
    original.data[0, 0] -= 1


def test_a_copy_is_unpatched_on_its_own() -> None:
    model = small()
    plain = logits(model)
    patch_model(model, Int4(scope="all+head"), verbose=False)
    expected, other = logits(model), copy.deepcopy(model)
    assert torch.equal(logits(other), expected)
    unpatch_model(other)
    assert torch.equal(logits(other), plain) and torch.equal(logits(model), expected)


def test_a_patched_model_can_be_cast() -> None:
    model = patch_model(small(), Int4(scope="all+head", mode="weight_only"), verbose=False).to(torch.bfloat16)
    assert logits(model).dtype == torch.bfloat16
    unpatch_model(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


# -- with other patches, and refusals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patches",
    [
        "int4(mode=weight_only) + speculative",
        "int4(scope='all+head', mode=weight_only) + streaming(sinks=2, window=10)",
        "int4(mode=weight_only) + compile(backend=eager)",
        "int4(mode=weight_only) + gemv",
    ],
)
def test_with_other_patches(patches: str) -> None:
    model = tiny_model("llama")
    alone = [part for part in patches.split(" + ") if part.split("(")[0] in ("int4", "streaming")]
    options: dict[str, Any] = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    with patched(model, " + ".join(alone), verbose=False):
        wanted = model.generate(IDS[:1], **options)
    with patched(model, patches, verbose=False):
        assert torch.equal(model.generate(IDS[:1], **options), wanted)


def test_int8_for_some_modules_and_int4_for_the_rest() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    patch_model(model, "mlp_int8(modules='*.down_proj', mode=weight_only) + int4(mode=weight_only)", verbose=False)
    assert {name.rpartition(".")[2] for name in converted(model, Int8Weight)} == {"down_proj"}
    assert "down_proj" not in {name.rpartition(".")[2] for name in converted(model)} and len(converted(model)) == 12
    logits(model)
    unpatch_model(model)
    assert_restored(before, model)


def test_a_gpu_is_refused_with_what_serves_there(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "device", torch.device("cuda"))
        with pytest.raises(UnsupportedModel, match=r"is on cuda.*torchao.*GemLite"):
            patch_model(model, "int4", verbose=False)
    assert_restored(before, model)


def test_what_int8_refuses_is_refused_too() -> None:
    model = tiny_model("llama")
    with pytest.raises(NothingMatched, match="matches no linear layer"):
        patch_model(model, Int4(modules=["*.none"]), verbose=False)  # type: ignore[arg-type]
    with pytest.raises(NothingMatched, match="min_snr"):
        patch_model(model, Int4(min_snr=200), verbose=False)
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.empty(128, 64, device="meta"))
    with pytest.raises(PatchError):
        patch_model(model, "int4", verbose=False)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"group": 64}, "32 or 128"),
        ({"group": True}, "32 or 128"),
        ({"symmetric": 1}, "True or False"),
        ({"fit": "best"}, "'clip', 'gptq'"),
        ({"scope": "head"}, "'mlp', 'all', 'all\\+head'"),
        ({"mode": "fast"}, "weight_only"),
    ],
)
def test_wrong_options_are_refused_with_the_remedy(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        Int4(**options)


def test_error_feedback_without_a_text_is_refused() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(SpecError, match="needs calibration="):
        patch_model(model, "int4(fit=gptq)", verbose=False)
    assert_restored(before, model)


def test_specs_read_back() -> None:
    for spec in ("int4", "int4(scope='all+head', group=128, symmetric=True)"):
        assert parse_spec(parse_spec(spec)[0].spec) == parse_spec(spec)
