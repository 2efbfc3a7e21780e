"""What probing finds, against what each family's modeling file is known to do."""

from __future__ import annotations

import pytest
import torch

from patchkit import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.testing import assert_restored, snapshot, tiny_model

# family: per attention layer (kind, style, rotated dimensions, first of them in queries and keys, slot of the cache)
ROTARY = {
    "llama": [("full", "half", 16, 0, "keys")] * 2,
    "llama_yarn": [("full", "half", 16, 0, "keys")] * 2,
    "gpt_neox": [("full", "half", 4, 0, "keys")] * 2,
    "phi": [("full", "half", 8, 0, "keys")] * 2,
    "glm": [("full", "interleaved", 8, 0, "keys")] * 2,
    "cohere": [("full", "interleaved", 16, 0, "keys")] * 2,
    "deepseek_v3": [("full", "half", 8, 8, "values")] * 2,
    "deepseek_v2": [("full", "interleaved", 8, 8, "values")] * 2,
    "gemma3_text": [("sliding", "half", 16, 0, "keys"), ("full", "half", 16, 0, "keys")],
}


@pytest.mark.parametrize("family", ROTARY)
def test_rotary_positions(family):
    layers = Target(tiny_model(family)).attention_layers
    assert [(x.kind, x.rotary.style, x.rotary.width, x.rotary.start, x.rotary.slot) for x in layers] == ROTARY[family]
    assert all(x.obstacle is None and x.interface for x in layers)


def test_frequencies_per_layer_type():
    sliding, full = Target(tiny_model("gemma3_text")).attention_layers
    assert "sliding" in sliding.rotary.buffer and "full" in full.rotary.buffer
    assert not torch.equal(sliding.rotary.frequencies, full.rotary.frequencies)


def test_layers_without_positions():
    rotary, none = Target(tiny_model("smollm3")).attention_layers
    assert rotary.rotary is not None and none.rotary is None and none.obstacle is None
    assert all(layer.rotary is None and layer.obstacle is None for layer in Target(tiny_model("nemotron_h")).attention_layers)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_alibi_slopes(family):
    for layer in Target(tiny_model(family)).attention_layers:
        # Four heads: 2^-2, 2^-4, 2^-6, 2^-8 (Press et al. 2022).
        torch.testing.assert_close(layer.slopes, torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]).double())
        assert layer.alibi and layer.obstacle is None


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "baked into"), ("opt", "baked into"), ("falcon", "attention interface")],
)
def test_obstacles_are_named(family, reason):
    assert all(reason in layer.obstacle for layer in Target(tiny_model(family)).attention_layers)


def test_a_rotation_without_frequencies_to_be_found_is_an_obstacle():
    """GPT-J rotates its keys by a table of sines. It computed attention itself until transformers 5.24, which is named first."""
    for layer in Target(tiny_model("gptj")).attention_layers:
        assert layer.rotary is None and ("baked into" if layer.interface else "attention interface") in layer.obstacle


def test_models_without_attention():
    with pytest.raises(NothingMatched, match="no attention"):
        _ = Target(tiny_model("mamba")).attention_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "glm", "deepseek_v3", "gpt2", "smollm3"])
def test_rounding_to_16_bits_does_not_mislead(family, dtype):
    exact, rounded = (Target(tiny_model(family).to(d)).attention_layers for d in (torch.float32, dtype))
    for a, b in zip(exact, rounded, strict=True):
        assert (a.rotary is None, a.obstacle) == (b.rotary is None, b.obstacle)
        assert a.rotary is None or (a.rotary.style, a.rotary.start, a.rotary.buffer) == (b.rotary.style, b.rotary.start, b.rotary.buffer)


def test_probing_leaves_no_trace_and_keeps_training_mode():
    model = tiny_model("llama")
    before = snapshot(model)
    Target(model).describe()
    assert_restored(before, model)
    model.train()
    _ = Target(model).attention_layers
    assert all(module.training for module in model.modules())


def test_a_model_that_cannot_run_is_refused_with_its_error():
    model = tiny_model("llama")
    model.model.layers[0].mlp = None
    with pytest.raises(UnsupportedModel, match="NoneType"):
        _ = Target(model).attention_layers


# family: leaf names of the linear layers of its feed-forward blocks, and whether its experts are fused
FEED_FORWARD = {
    "llama": (["down_proj", "gate_proj", "up_proj"], False),
    "gpt_neox": (["dense_4h_to_h", "dense_h_to_4h"], False),
    "gpt2": (["c_fc", "c_proj"], False),
    "falcon": (["dense_4h_to_h", "dense_h_to_4h"], False),
    "bloom": (["dense_4h_to_h", "dense_h_to_4h"], False),
    "mixtral": ([], True),
    "qwen3_moe": ([], True),
    "deepseek_v3": (["down_proj", "gate_proj", "up_proj"], True),
}


@pytest.mark.parametrize("family", FEED_FORWARD)
def test_feed_forward_blocks(family):
    leaves, fused = FEED_FORWARD[family]
    model = tiny_model(family)
    before = snapshot(model)
    found = Target(model).feed_forward
    assert_restored(before, model)
    assert sorted({name.rpartition(".")[2] for name in found.linears}) == leaves
    assert bool(found.experts) == fused and not found.left_alone
    assert not any(word in name for name in found.linears for word in ("attn", "attention.", "norm", "router"))


def test_adapters_of_lora_layers_are_not_feed_forward_layers():
    model = tiny_model("llama")

    class Lora(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base_layer = base
            self.lora_A = torch.nn.Linear(base.in_features, 8)
            self.lora_B = torch.nn.Linear(8, base.out_features)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base_layer(x) + self.lora_B(self.lora_A(x))

    model.model.layers[0].mlp.up_proj = Lora(model.model.layers[0].mlp.up_proj)
    names = [name for name in Target(model).feed_forward.linears if "layers.0.mlp.up_proj" in name]
    assert names == ["model.layers.0.mlp.up_proj.base_layer"]
