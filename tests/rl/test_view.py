"""``view=True``: quantised weights beside those that are trained."""

from __future__ import annotations

import copy
import io
from typing import Any

import peft
import pytest
import torch
from support import matrix
from torch import nn

from patchkit import patch_model, refresh, report, unpatch_model
from patchkit.errors import NothingMatched, SpecError
from patchkit.freshness import WeightWatch
from patchkit.patches.int4 import Int4
from patchkit.patches.mlp_int8 import MLPInt8
from patchkit.testing import assert_restored, snapshot, tiny_model
from patchkit.views import twin

IDS = torch.arange(12)[None] % 5 * 7 + 5
VIEW = "int8(scope=all, mode=weight_only, view=True)"


def generate(model: Any, new: int = 20) -> torch.Tensor:
    return model.generate(input_ids=IDS, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)


def step(model: Any, fused: bool = True) -> None:
    """One step of training, large enough to change texts."""
    wanting = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(wanting, lr=3e-2, fused=fused)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "spec",
    [
        'int8(scope="all+head", mode=weight_only, view=True)',
        matrix("mlp_int8(mode=dynamic, view=True)"),
        matrix("int4(scope=all, view=True)"),
    ],
)
def test_a_view_is_the_quantised_model_over_trainable_weights(spec: str) -> None:
    plain = tiny_model("llama")
    before, weights = snapshot(plain), list(plain.parameters())
    replaced = patch_model(tiny_model("llama"), spec.replace(", view=True", ""), verbose=False)
    model = patch_model(plain, spec, verbose=False)
    assert torch.equal(logits(model), logits(replaced)) and torch.equal(generate(model), generate(replaced))
    assert all(now is old and now.requires_grad for now, old in zip(model.parameters(), weights, strict=True))
    assert set(model.state_dict()) == set(tiny_model("llama").state_dict())
    assert not getattr(model, "is_quantized", False)  # or a trainer would refuse it
    assert report(model).patches[0].changed == report(replaced).patches[0].changed
    assert_restored(before, unpatch_model(model))


def test_conv1d_has_a_view_and_experts_do_not() -> None:
    replaced, model = (patch_model(tiny_model("gpt2"), f"mlp_int8(mode=weight_only{each})", verbose=False) for each in ("", ", view=True"))
    assert torch.equal(logits(model), logits(replaced))
    with pytest.raises(NothingMatched, match="fused experts have no view"):
        patch_model(tiny_model("qwen3_moe"), "mlp_int8(view=True)")


@pytest.mark.parametrize(("spec", "fused"), [(f"{VIEW} + speculative(k=4)", True), matrix(VIEW, True), matrix(VIEW, False)])
def test_after_a_step_the_next_rollout_is_that_of_a_freshly_patched_model(spec: str, fused: bool) -> None:
    model = patch_model(tiny_model("llama").train(), spec, verbose=False)
    before = generate(model)
    for count in (1, 2):
        step(model, fused)
        fresh = patch_model(unpatch_model(copy.deepcopy(model)), spec, verbose=False)
        assert torch.equal(generate(model), generate(fresh))
        assert report(model).patches[0].hits["requantised"] == count
    assert not torch.equal(generate(model), before)


def test_without_the_watch_the_next_rollout_would_be_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shows that the test above can fail."""
    model = patch_model(tiny_model("llama").train(), VIEW, verbose=False)
    with monkeypatch.context() as patched:
        patched.setattr(WeightWatch, "changes", lambda self: frozenset())
        patched.setattr(WeightWatch, "stepped", property(lambda self: False))
        patched.setattr(WeightWatch, "glance", lambda self: False)
        step(model)
        fresh = patch_model(unpatch_model(copy.deepcopy(model)), VIEW, verbose=False)
        assert not torch.equal(generate(model), generate(fresh))
    assert torch.equal(generate(model), generate(fresh))


def test_int4_follows_as_it_does_without_a_view() -> None:
    """Where a patch that is made now would weigh inputs anew."""
    model = tiny_model("llama")
    replaced = patch_model(twin(model), "int4(scope=all)", verbose=False)
    patch_model(model, "int4(scope=all, view=True)", verbose=False)
    before = logits(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight.mul_(torch.linspace(0.5, 1.5, weight.shape[-1]))
    assert torch.equal(logits(model), logits(replaced)) and not torch.equal(logits(model), before)
    assert report(model).patches[0].hits["requantised"] == 1


def test_training_forwards_do_not_quantise() -> None:
    model = patch_model(tiny_model("llama").train(), VIEW, verbose=False)
    for _ in range(3):
        step(model)
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
    hits = report(model).patches[0].hits
    assert hits.get("requantised", 0) == hits.get("forwards", 0) == 0 and hits["forwards over the trained weights"] == 6
    assert refresh(model) and report(model).patches[0].hits["requantised"] == 1 and not refresh(model)


def test_lora_over_a_view() -> None:
    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["up_proj", "q_proj"])
        return peft.get_peft_model(model, config).train()

    model = adapted(patch_model(tiny_model("llama"), VIEW, verbose=False))  # a trainer wraps what it is given
    before = generate(model)
    assert torch.equal(before, generate(patch_model(adapted(tiny_model("llama")), VIEW, verbose=False)))
    step(model)
    assert not torch.equal(generate(model), before) and report(model).patches[0].hits.get("requantised", 0) == 0  # the base has not changed
    wanted = logits(model.eval())
    model.merge_adapter()
    merged = logits(model)
    assert report(model).patches[0].hits["requantised"] == 1 and not torch.equal(merged, wanted)  # now they are rounded too
    fresh = patch_model(unpatch_model(copy.deepcopy(model)), VIEW, verbose=False)
    assert torch.equal(merged, logits(fresh))


def test_a_copy_has_a_view_of_its_own() -> None:
    model = patch_model(tiny_model("llama"), VIEW, verbose=False)
    wanted = logits(model)
    for other in (copy.deepcopy(model), _pickled(model)):
        step(other)
        assert torch.equal(logits(model.eval()), wanted)
        fresh = patch_model(unpatch_model(copy.deepcopy(other)), VIEW, verbose=False)
        assert torch.equal(logits(other.eval()), logits(fresh.eval()))


def _pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_layer_that_was_given_another_weight_uses_that() -> None:
    model, plain = patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only, view=True)", verbose=False), tiny_model("llama")
    for each in (model, plain):
        for layer in each.model.layers:
            for name in ("gate_proj", "up_proj", "down_proj"):
                module = getattr(layer.mlp, name)
                module.weight = nn.Parameter(module.weight.detach() * 1.5)
    assert torch.equal(logits(model), logits(plain))
    assert any("6 of 6 layers were given another weight" in warning for warning in report(model).patches[0].warnings)


def test_a_view_follows_dtype() -> None:
    model = patch_model(tiny_model("llama"), VIEW, verbose=False)
    logits(model)
    model.to(torch.bfloat16)
    fresh = patch_model(unpatch_model(copy.deepcopy(model)), VIEW, verbose=False)
    assert torch.equal(logits(model), logits(fresh)) and logits(model).dtype is torch.bfloat16


@pytest.mark.matrix
def test_compiled_steps_and_gemv_beside_a_view() -> None:
    plain = patch_model(tiny_model("llama").train(), "mlp_int8(mode=weight_only, view=True)", verbose=False)
    model = patch_model(tiny_model("llama").train(), "mlp_int8(mode=weight_only, view=True) + gemv + compile(backend=eager)", verbose=False)
    for _ in range(2):
        assert torch.equal(generate(model), generate(plain))
        for each in (plain, model):
            step(each)
    int8, gemv, compiled = report(model).patches
    assert compiled.hits["compiled steps"] > 30 and gemv.hits["products of few rows"] > 0 and int8.hits["requantised"] == 1
    assert any("own forward" in why for why in gemv.left_alone.values())


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="leave one of the two out"):
        MLPInt8(view=True, keep_original=False)
    with pytest.raises(ValueError, match="leave one of the two out"):
        Int4(view=True, fit="gptq")
    with pytest.raises(SpecError, match="must be True or False"):
        patch_model(tiny_model("llama"), "mlp_int8(view=1)")
