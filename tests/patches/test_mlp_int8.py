"""mlp_int8: what it converts, what it leaves alone, how close it stays, how it saves, and how it goes."""

from __future__ import annotations

import copy
import gc
import io
import logging
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from support import cache_of, cached
from torch import nn
from transformers import AutoModelForCausalLM

from patchkit import (
    IrreversiblePatch,
    MLPInt8,
    NothingMatched,
    PatchConflict,
    PatchError,
    SlowerPatch,
    module_timing,
    patch_model,
    patched,
    report,
    unpatch_model,
)
from patchkit.int8.weight import Int8Weight
from patchkit.patch import Stage
from patchkit.quantised import install, timing
from patchkit.quantised.experts import quantised_experts_of
from patchkit.testing import assert_restored, snapshot, tiny_model
from patchkit.views import twin

IDS = torch.randint(4, 100, (2, 30), generator=torch.Generator().manual_seed(3))
MODES = ("weight_only", "dynamic")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS).logits


def converted(model) -> list[str]:
    return [name for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)]


# -- what is converted -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "leaves"),
    [
        ("llama", ["gate_proj", "up_proj", "down_proj"]),
        ("gpt_neox", ["dense_h_to_4h", "dense_4h_to_h"]),
        ("gpt2", ["c_fc", "c_proj"]),
        ("opt", ["fc1", "fc2"]),
        ("phi", ["fc1", "fc2"]),
    ],
)
def test_exactly_the_feed_forward_linears(family, leaves):
    model = patch_model(tiny_model(family), "mlp_int8")
    layers = model.config.num_hidden_layers
    assert sorted(name.split(".")[-2] for name in converted(model)) == sorted(leaves * layers)
    assert not any("attn" in name or "attention" in name or "head" in name for name in converted(model))
    facts = report(model).patches[0]
    assert facts.changed == {"feed-forward linears": len(leaves) * layers}
    assert [f"{name}.weight" for name in facts.modules] == converted(model)


def test_routers_stay_and_experts_do_not():
    model = tiny_model("qwen3_moe")
    routers = {name: weight for name, weight in model.named_parameters() if ".gate." in name}
    patch_model(model, "mlp_int8")
    assert routers and all(dict(model.named_parameters())[name] is weight for name, weight in routers.items())
    assert report(model).patches[0].changed == {"layers of fused experts": 2}


@pytest.mark.parametrize("pattern", ["down_proj", "*.down_proj", "model.layers.1.mlp.down_proj"])
def test_modules_can_be_chosen(pattern):
    model = patch_model(tiny_model("llama"), MLPInt8(modules=[pattern]))
    assert converted(model) == [f"model.layers.{i}.mlp.down_proj.weight" for i in ((1,) if pattern.startswith("model") else (0, 1))]


@pytest.mark.parametrize("pattern", ["lm_head", "*.q_proj", "model.layers.9.mlp.down_proj"])
def test_what_is_no_feed_forward_linear_cannot_be_chosen(pattern):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(NothingMatched, match="matches no feed-forward linear"):
        patch_model(model, MLPInt8(modules=[pattern]))
    assert_restored(before, model)


def test_modules_below_the_threshold_are_left_out():
    model = tiny_model("llama")
    with torch.no_grad():  # one weight so much larger than the others of its row that rounding loses those
        model.model.layers[1].mlp.up_proj.weight[:, 0] = 0
        model.model.layers[1].mlp.up_proj.weight[:, 0] += 1e4 * torch.eye(1, len(model.model.layers[1].mlp.up_proj.weight))[0]
        model.model.layers[1].post_attention_layernorm.weight[0] = 0
        model.model.layers[1].mlp.up_proj.weight[1:, 0] = 1e4
    patch_model(model, MLPInt8(mode="weight_only", min_snr=20))
    assert "model.layers.1.mlp.up_proj.weight" not in converted(model) and len(converted(model)) == 5
    assert "below 20" in report(model).patches[0].left_alone["model.layers.1.mlp.up_proj"]
    unpatch_model(model)
    before = snapshot(model)
    with pytest.raises(NothingMatched, match="min_snr"):
        patch_model(model, MLPInt8(min_snr=200))
    assert_restored(before, model)


def test_a_module_without_a_signal_to_noise_ratio_is_below_every_threshold():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.inf
    patch_model(model, MLPInt8(min_snr=20))
    assert "SNR of nan dB" in report(model).patches[0].left_alone["model.layers.1.mlp.down_proj"]
    assert len(converted(model)) == 5


def test_the_report_gives_every_module_its_signal_to_noise_ratio():
    model = patch_model(tiny_model("llama"), MLPInt8(mode="weight_only", calibration=IDS))
    for facts in report(model).patches[0].modules.values():
        assert 30 < facts["snr_db"] < 60 and facts["mode"] == "weight_only"
    dynamic = patch_model(tiny_model("llama"), MLPInt8(mode="dynamic", calibration=IDS))
    for name, facts in report(dynamic).patches[0].modules.items():
        assert facts["snr_db"] < report(model).patches[0].modules[name]["snr_db"]


# -- how close -------------------------------------------------------------------------------------------------------------------


def fake_quantised(model, dynamic: bool) -> None:
    """The same arithmetic by hand, in floating point, for models with `nn.Linear`: every mlp weight rounded, every input too."""

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        step = rows.double().abs().amax(-1, keepdim=True) / 127
        return ((rows.double() / step).round() * step).float()

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            module.weight.data = rounded(module.weight.data)
            if dynamic:
                module.register_forward_pre_hook(lambda module, args: (rounded(args[0]),))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_logits_are_those_of_rounded_weights(family, mode):
    model, oracle = tiny_model(family), tiny_model(family)
    plain = logits(model)
    fake_quantised(oracle, dynamic=mode == "dynamic")
    patch_model(model, MLPInt8(mode=mode))
    # A rounding tie may fall the other way where the input differs in its last bit, and the next layers then carry it on.
    assert (logits(model) - logits(oracle)).abs().max() < (2e-3 if mode == "weight_only" else 2e-2)
    assert (logits(oracle) - plain).abs().max() > 3 * (logits(model) - logits(oracle)).abs().max()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_compute_what_the_rounded_experts_would(family):
    model, oracle = tiny_model(family), tiny_model(family)
    for module in oracle.modules():
        if hasattr(module, "down_proj") and torch.is_tensor(module.down_proj) and module.down_proj.ndim == 3:
            for key in ("gate_up_proj", "down_proj"):
                weight = getattr(module, key).data
                inputs = -2 if module.is_transposed else -1
                step = weight.abs().amax(inputs, keepdim=True) / 127
                weight.copy_((weight / step).round() * step)
    patch_model(model, MLPInt8(mode="weight_only"))
    assert (logits(model) - logits(oracle)).abs().max() < 1e-3
    assert (logits(oracle) - logits(tiny_model(family))).abs().max() > 3 * (logits(model) - logits(oracle)).abs().max()


def test_a_batch_computes_what_its_rows_alone_do():
    model = patch_model(tiny_model("llama"), MLPInt8(mode="dynamic"))
    with torch.no_grad():
        alone = torch.cat([model(input_ids=row[None]).logits for row in IDS])
    assert torch.allclose(logits(model), alone, atol=1e-4)


@pytest.mark.parametrize("spec", ["streaming(sinks=2, window=6)"])
def test_together_with_streaming(spec):
    model = tiny_model("llama")
    patch_model(model, spec, MLPInt8(mode="weight_only"))
    with torch.no_grad():
        whole = model(input_ids=IDS).logits
        cache, steps = None, []
        for i in range(IDS.shape[1]):
            out = model(input_ids=IDS[:, i : i + 1], **cached(cache), use_cache=True)
            cache = cache_of(out)
            steps.append(out.logits)
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-3)


# -- saving ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_original", [True, False])
def test_saving_and_loading_is_bit_exact(mode, keep_original, tmp_path):
    model = patch_model(tiny_model("llama"), MLPInt8(mode=mode, keep_original=keep_original))
    expected = logits(model)
    values = {name: (weight.qdata, weight.scale) for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    model.save_pretrained(tmp_path)
    stock, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, weight in stock.named_parameters():
        assert (type(weight).__name__ == "Int8Tensor") == (name in values)
        if name in values:
            assert torch.equal(weight.qdata, values[name][0]) and torch.equal(weight.scale[:, 0], values[name][1])
    # Stock transformers runs it, by torchao; patched again, it gives the same bits.
    assert torch.allclose(logits(stock.eval()), expected, atol=1e-3 if mode == "weight_only" else 5e-2)
    parameters = dict(stock.named_parameters())
    patch_model(stock, "mlp_int8")
    assert torch.equal(logits(stock), expected)
    assert {facts["mode"] for facts in report(stock).patches[0].modules.values()} == {mode}
    unpatch_model(stock)
    assert all(weight is parameters[name] for name, weight in stock.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_what_torchao_cannot_hold_is_saved_in_floating_point(family, tmp_path):
    model = tiny_model(family)
    plain = logits(model)
    patch_model(model, MLPInt8(mode="weight_only")).save_pretrained(tmp_path / "kept")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "kept").eval()), plain)
    unpatch_model(model)
    patch_model(model, MLPInt8(mode="weight_only", keep_original=False))
    expected = logits(model)
    model.save_pretrained(tmp_path / "freed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "freed").eval()
    assert torch.allclose(logits(again), expected, atol=1e-3) and not torch.equal(logits(again), plain)


def test_saving_without_torchao_is_refused_with_the_remedy(monkeypatch, tmp_path):

    for module in ("patchkit._compat", "patchkit._compat.torchao"):
        monkeypatch.setattr(f"{module}.has_torchao", lambda: False)
    model = patch_model(tiny_model("llama"), "mlp_int8")
    with pytest.raises(PatchError, match="pip install torchao"):
        model.save_pretrained(tmp_path)
    unpatch_model(model).save_pretrained(tmp_path)


# -- copies, undo, memory --------------------------------------------------------------------------------------------------------


def pickled(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_copy_works_and_is_unpatched_on_its_own(family, again: Callable):
    model = tiny_model(family)
    plain = logits(model)
    patch_model(model, "mlp_int8")
    expected = logits(model)
    other = again(model)
    assert torch.equal(logits(other), expected)
    unpatch_model(other)
    assert torch.equal(logits(other), plain) and torch.equal(logits(model), expected)


def test_fused_experts_run_in_a_process_that_only_loads_them(tmp_path):
    model = patch_model(tiny_model("qwen3_moe"), "mlp_int8")
    torch.save((model, IDS, logits(model)), tmp_path / "model.pt")
    code = f"""
import torch
model, ids, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(model(input_ids=ids).logits, expected)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, nn.Parameter) and item.layout == torch.strided and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_freed_originals_are_gone_and_unpatching_says_so():
    model = tiny_model("llama")
    plain = tensor_bytes()
    originals = sum(module.weight.nbytes for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".mlp." in name)
    patch_model(model, MLPInt8(keep_original=False))
    facts = report(model).patches[0].modules.values()
    stored = sum(entry["weight_bytes"] for entry in facts)
    assert plain - tensor_bytes() >= originals - stored - 1000  # a scale or two elsewhere
    assert sum(entry["original_bytes"] for entry in facts) == originals
    assert stored <= 0.3 * originals  # rows of 64 and 128; a scale weighs less in longer ones
    expected = logits(model)
    with pytest.raises(IrreversiblePatch, match="load it again"):
        unpatch_model(model)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("keep_original", [True, False])
def test_the_weights_of_fused_experts_cannot_be_used_unnoticed(keep_original):
    model = patch_model(tiny_model("qwen3_moe"), MLPInt8(keep_original=keep_original))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    expected = logits(model)
    for moved in (model, copy.deepcopy(model)):
        experts = moved.model.layers[0].mlp.experts
        with pytest.raises(PatchError, match="unpatch_model"):
            experts.down_proj * 2
        with pytest.raises((PatchError, RuntimeError), match="unpatch_model"):
            moved.load_state_dict(state)
        assert torch.equal(logits(moved), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_patched_model_can_be_cast(family):
    model = patch_model(tiny_model(family), MLPInt8(mode="weight_only")).to(torch.bfloat16)
    ids = IDS[:, :8]
    with torch.no_grad():
        assert model(input_ids=ids).logits.dtype == torch.bfloat16
        assert all(weight.dtype == torch.bfloat16 for weight in model.state_dict().values() if weight.is_floating_point())
        unpatch_model(model)
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        expected = tiny_model(family).to(torch.bfloat16)(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize("family", ["gpt2", "gpt_oss"])
def test_transposed_weights_are_stored_as_the_kernel_reads_them(family):
    model = patch_model(tiny_model(family), "mlp_int8")
    stored = [weight.qdata for weight in model.parameters() if isinstance(weight, Int8Weight)]
    for module in model.modules():
        for weights in (quantised_experts_of(module) or {}).values():
            stored += weights.values
    assert stored and all(qdata.is_contiguous() for qdata in stored)


def test_weights_that_are_computed_are_left_alone():
    from torch.nn.utils import parametrizations, prune

    model = tiny_model("llama")
    prune.l1_unstructured(model.model.layers[0].mlp.up_proj, "weight", 0.5)
    parametrizations.weight_norm(model.model.layers[1].mlp.down_proj)
    before = set(model.state_dict())
    patch_model(model, "mlp_int8")
    assert len(converted(model)) == 4 and len(report(model).patches[0].left_alone) == 2
    unpatch_model(model)
    assert set(model.state_dict()) == before


def test_a_block_that_could_not_be_left_is_refused():
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(IrreversiblePatch, match="end of the block"), patched(model, MLPInt8(keep_original=False)):
        pass
    assert_restored(before, model)
    patch_model(model, MLPInt8(keep_original=False))
    with pytest.raises(PatchConflict, match="load it again"):
        patch_model(model, "streaming(window=8)")


def test_an_error_in_a_later_patch_keeps_the_originals(monkeypatch):
    from patchkit.patches.streaming import StreamingLLM

    model = tiny_model("llama")
    before = snapshot(model)
    monkeypatch.setattr(StreamingLLM, "stage", Stage.COMPILE)
    monkeypatch.setattr(StreamingLLM, "apply", lambda self, target, handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patch_model(model, MLPInt8(keep_original=False), "streaming(window=8)")
    assert_restored(before, model)


# -- refusals and warnings -------------------------------------------------------------------------------------------------------


def all_take(monkeypatch, milliseconds):
    """From now on layers take so long, whoever asks."""
    for module in (timing, module_timing):
        monkeypatch.setattr(module, "milliseconds", milliseconds)


def test_slower_is_said_or_refused(monkeypatch, caplog):
    model = tiny_model("llama")
    before = snapshot(model)
    all_take(monkeypatch, lambda blocks, rows: (1.0, 2.0))
    with pytest.raises(SlowerPatch, match="2 ms in these layers, 1 ms unpatched"):
        patch_model(model, MLPInt8(strict=True))
    assert_restored(before, model)
    with caplog.at_level(logging.WARNING, "patchkit"):
        patch_model(model, MLPInt8())
    assert "slower" in caplog.text and "2 ms" in caplog.text and "1 ms" in caplog.text
    unpatch_model(model)
    caplog.clear()
    all_take(monkeypatch, lambda blocks, rows: (2.0, 1.0))
    with caplog.at_level(logging.WARNING, "patchkit"):
        patch_model(model, MLPInt8(strict=True))
    assert "slower" not in caplog.text and "2 -> 1 ms" in str(report(model))


@pytest.mark.parametrize(("float_cost", "mode"), [(1.2, "weight_only"), (1.4, "dynamic")])
def test_auto_takes_what_is_faster_and_prefers_weight_only(float_cost, mode, monkeypatch):
    def cost(blocks, rows):
        return 9.0, float_cost if blocks[0].activation == "float" else 1.0

    all_take(monkeypatch, cost)
    model = patch_model(tiny_model("llama"), "mlp_int8")
    assert {facts["mode"] for facts in report(model).patches[0].modules.values()} == {mode}


def test_views_of_one_model_choose_alike_and_other_models_for_themselves(monkeypatch):
    costs = iter([1.0, 2.0, 9.0, 2.0])  # float and int8 of the first model, then of the second

    def modes(model):
        patch_model(model, "mlp_int8(modules=['*.up_proj'])", verbose=False)
        found = {facts["mode"] for facts in report(model).patches[0].modules.values()}
        unpatch_model(model)
        return found

    all_take(monkeypatch, lambda blocks, rows: (9.0, next(costs)))
    monkeypatch.setattr(install, "report_speed", lambda *args: None)
    first, second = tiny_model("llama"), tiny_model("llama")
    view = twin(first)
    assert modes(first) == modes(view) == modes(first) == {"weight_only"}  # measured once
    assert modes(second) == {"dynamic"}


def test_training_is_refused_when_a_gradient_is_asked_for():
    model = patch_model(tiny_model("llama"), "mlp_int8")
    loss = model(input_ids=IDS, labels=IDS).loss  # a forward with gradients enabled runs
    with pytest.raises(PatchError, match="unpatch_model"):
        loss.backward()


def test_offloaded_weights_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.empty(128, 64, device="meta"))
    with pytest.raises(PatchError):
        patch_model(model, "mlp_int8")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mode": "fast"}, "weight_only"),
        ({"modules": []}, "down_proj"),
        ({"min_snr": "high"}, "decibels"),
        ({"keep_original": 1}, "True or False"),
        ({"calibration": [0.5]}, "token ids"),
        ({"calibration": [None]}, "token ids"),
        ({"modules": 3}, "down_proj"),
    ],
)
def test_wrong_options_are_refused_with_the_remedy(options, word):
    with pytest.raises(ValueError, match=word):
        MLPInt8(**options)
