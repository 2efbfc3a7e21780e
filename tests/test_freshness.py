"""`WeightWatch`: every way to change weights moves its stamp, and nothing else does."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim import optimizer as optimizers

from patchkit import patch_model, unpatch_model
from patchkit.freshness import WeightWatch
from patchkit.int8.weight import Int8Weight
from patchkit.quantised.freed import FreedWeight
from patchkit.testing import assert_restored, snapshot, tiny_model

IDS = torch.arange(12)[None] % 5 * 7 + 5


def hooks() -> int:
    gc.collect()
    return len(optimizers._global_optimizer_post_hooks)


def trained(optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        made = optimizer([each for each in model.parameters() if each.requires_grad], lr=1e-3, **options)
        model(IDS, labels=IDS).loss.backward()
        made.step()

    return step


def edit(model: Any) -> nn.Parameter:
    return model.model.layers[0].mlp.up_proj.weight


@torch.no_grad()
def _copied(model: Any) -> None:
    edit(model).copy_(edit(model) * 1.01)


def _pointed_elsewhere(model: Any) -> None:
    edit(model).data = edit(model).detach().clone()


def _replaced(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(edit(model).detach().clone())


def _loaded(model: Any, **options: Any) -> None:
    model.load_state_dict({name: value * 1.01 for name, value in model.state_dict().items()}, **options)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "AdamW fused": trained(torch.optim.AdamW, fused=True),
    "AdamW foreach": trained(torch.optim.AdamW, foreach=True),
    "AdamW single": trained(torch.optim.AdamW, foreach=False),
    "SGD fused": trained(torch.optim.SGD, fused=True),
    "SGD foreach": trained(torch.optim.SGD, foreach=True),
    "SGD single": trained(torch.optim.SGD, foreach=False),
    ".data.add_": lambda model: edit(model).data.add_(1e-3),
    ".data =": _pointed_elsewhere,
    "another parameter": _replaced,
    "load_state_dict": _loaded,
    "load_state_dict(assign)": lambda model: _loaded(model, assign=True),
    "copy_": _copied,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "norms": lambda model: model.model.norm.weight.data.mul_(1.01),
    "gone": lambda model: model.model.layers.__delitem__(0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_moves_the_stamp(name):
    model = tiny_model("llama")
    watch = WeightWatch(model)
    before = watch.stamp()
    hash(before)
    model(IDS, labels=IDS).loss.backward()
    assert watch.stamp() == before and not watch.changes()
    CHANGES[name](model)
    assert watch.stamp() != before and watch.changes()
    watch.settle()
    assert not watch.changes() and watch.stamp() == watch.stamp()


@pytest.mark.parametrize("name", ["AdamW fused", "SGD fused", ".data.add_"])
def test_what_version_counters_do_not_show(name):
    """The reason for the other signs: fails when torch begins to count these, and then only says so."""
    model = tiny_model("llama")
    before = [(each.data_ptr(), each._version) for each in model.parameters()]
    CHANGES[name](model)
    assert [(each.data_ptr(), each._version) for each in model.parameters()] == before


def test_a_step_too_small_for_the_sampled_values_is_seen():
    model = tiny_model("llama").to(torch.bfloat16)
    watch = WeightWatch(model)
    before = watch.stamp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12, fused=True)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    after = watch.stamp()
    assert after.values == before.values and after.places == before.places
    assert watch.changes() == {"steps"}


def test_steps_of_other_models_are_not_counted():
    mine, other = tiny_model("llama"), tiny_model("llama")
    watches = WeightWatch(mine), WeightWatch(other)
    CHANGES["AdamW fused"](other)
    assert not watches[0].changes() and "steps" in watches[1].changes()


def adapted(**options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"], **options)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    return model.eval()


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "merge": lambda model: model.merge_adapter(),
    "set_adapter": lambda model: model.set_adapter("b"),
    "disable": lambda model: model.base_model.disable_adapter_layers(),
    "delete": lambda model: model.delete_adapter("b"),
    "scale": lambda model: [each.scale_layer(2.0) for each in model.modules() if hasattr(each, "scale_layer")],
    "train": trained(torch.optim.AdamW, fused=True),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_change_of_adapters_moves_the_stamp(name):
    model = adapted()
    watch = WeightWatch(model.get_base_model())
    before = watch.stamp()
    with torch.no_grad():
        logits = model(IDS).logits
    assert watch.stamp() == before
    ADAPTERS[name](model)
    assert watch.stamp() != before
    watch.settle()
    if name == "merge":
        merged = watch.stamp()
        model.unmerge_adapter()
        assert watch.stamp() not in (merged, before)  # the weights are back up to rounding only
    elif name == "disable":
        with torch.no_grad():
            assert not torch.equal(model(IDS).logits, logits)
        model.base_model.enable_adapter_layers()
        assert watch.stamp() == before


def test_the_adapters_of_modules_to_save_are_seen():
    model = adapted(modules_to_save=["lm_head"])
    watch = WeightWatch(model.get_base_model())
    with model.disable_adapter():
        assert "adapters" in watch.changes()
    assert not watch.changes()


def _with_nan() -> Any:
    model = tiny_model("llama")
    edit(model).data.fill_(float("nan"))
    return model


def _tied() -> Any:
    model = tiny_model("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _views() -> list[torch.Tensor]:
    base = torch.randn(40, 30)
    return [base.T, base[::2, 3:9], base[5], base.expand(2, 40, 30), base[:, :3].T, torch.randn(3, 1)[:, 0]]


# What is hard to look at.
UNCHANGING: dict[str, Callable[[], Any]] = {
    "nan": _with_nan,
    "inference": torch.inference_mode()(lambda: tiny_model("llama")),
    "inference tensors": torch.inference_mode()(lambda: [torch.randn(7, 5), torch.randn(0, 5), torch.tensor(3.0)]),
    "meta": lambda: nn.Linear(30, 30, device="meta"),
    "tied": _tied,
    "views": _views,
    "dtypes": lambda: [
        torch.zeros(20, 20).to(each) for each in (torch.float8_e4m3fn, torch.bool, torch.uint16, torch.complex64, torch.bfloat16)
    ],
    "odd": lambda: [torch.eye(4).to_sparse(), FreedWeight(torch.Size((4, 4)), torch.float32, torch.device("cpu"))],
    "int8 weights": lambda: [Int8Weight.quantize(torch.randn(30, 20), transposed=each) for each in (False, True)],
    "int8": lambda: patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only)", verbose=False),
    "int8 experts": lambda: patch_model(tiny_model("qwen3_moe"), "mlp_int8(mode=weight_only)", verbose=False),
    "converted": lambda: patch_model(tiny_model("llama"), "linear(window=8)", verbose=False),
    "recurrent": lambda: tiny_model("qwen3_next"),
    "positions": lambda: tiny_model("gpt2"),
}


@pytest.mark.parametrize("name", UNCHANGING)
def test_100_looks_without_a_change(name):
    watched = UNCHANGING[name]()
    watch = WeightWatch(watched)
    first = watch.stamp()
    for look in range(100):
        with torch.inference_mode(look % 3 == 0), torch.set_grad_enabled(look % 2 == 0):
            if isinstance(watched, nn.Module) and name != "meta" and look % 25 == 7:
                with torch.no_grad():
                    watched(IDS, use_cache=False)
                    watched.generate(IDS, max_new_tokens=3)
                watched.train(look > 50)
            if look == 60:
                gc.collect()
            assert watch.stamp() == first and not watch.changes()
    assert hash(first) == hash(watch.stamp())


def test_views_are_looked_at_where_they_are():
    base = torch.zeros(40, 30)
    for watched in (base[::2, 3:9], base.T[1:4], base[5]):
        watch = WeightWatch([watched])
        outside = torch.ones_like(base, dtype=torch.bool)
        outside[::2, 3:9] = outside[:, 1:4] = outside[5] = False
        base.data[outside] += 1
        assert "values" not in watch.changes()
        watched.data.add_(1)
        assert "values" in watch.changes()


def test_int8_weights_are_looked_at():
    weight = Int8Weight.quantize(torch.randn(30, 20))
    watch = WeightWatch([weight])
    weight.scale.data.mul_(2)
    assert watch.changes() == {"values"}


def test_a_copy_goes_on():
    model = tiny_model("llama")
    watch = WeightWatch(model)
    for copied in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert copied.watched is not model and not copied.changes() and not copied.stepped
        CHANGES[".data ="](copied.watched)
        assert copied.changes() and not watch.changes()
    CHANGES["AdamW fused"](model)
    for copied in (copy.deepcopy(watch), pickle.loads(pickle.dumps(watch))):
        assert copied.changes()  # what it goes with is out of date as the original's
        copied.settle()
        assert not copied.changes() and watch.changes()


def test_weights_that_are_loaded_into_a_copy_before_it_is_looked_at():
    copied = copy.deepcopy(WeightWatch(tiny_model("llama")))
    CHANGES["load_state_dict"](copied.watched)
    assert copied.changes()


def test_the_hook_lives_as_long_as_a_watch():
    before = hooks()
    assert before <= 1
    first, second = WeightWatch(tiny_model("llama")), WeightWatch(tiny_model("llama"))
    assert hooks() == 1
    first.close()
    first.close()
    if before == 0:
        assert hooks() == 1
        del second
        assert hooks() == 0
    else:  # of a patched model in another test
        second.close()


@pytest.mark.parametrize("spec", ["mlp_int8(mode=weight_only)", "speculative(k=2)", "mlp_int8(mode=weight_only) + speculative(k=2)"])
def test_no_hook_stays_behind(spec):
    before = hooks()
    model, other = tiny_model("llama"), tiny_model("llama")
    state = snapshot(model)
    patch_model(model, spec, verbose=False)
    patch_model(other, spec, lossless="int8" in spec and "spec" not in spec, verbose=False)
    model.generate(IDS, max_new_tokens=3)
    assert hooks() == 1
    unpatch_model(model)
    assert hooks() == 1
    assert_restored(state, model)
    del other
    assert hooks() <= before


def test_a_watch_that_goes_in_the_middle_of_a_step_disturbs_nobody():
    watch: list[Any] = []

    def drop(*args: Any) -> None:
        watch.clear()
        gc.collect()

    early = optimizers.register_optimizer_step_post_hook(drop)
    watch.append(WeightWatch([torch.zeros(3)]))
    try:
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        weight.grad = torch.ones(3)
        optimizer.step()
        assert torch.allclose(weight, torch.full((3,), 0.9))
    finally:
        early.remove()


def test_a_patched_model_is_saved_and_loaded_whole():
    model = patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only) + speculative(k=2)", verbose=False)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded.generate(IDS, max_new_tokens=8, do_sample=False), model.generate(IDS, max_new_tokens=8, do_sample=False))
    unpatch_model(loaded)
