"""The patch gemv: linear layers of few rows by our kernel, everything else as before."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from patchkit import Patch, parse_spec, patch_model, patched, report, unpatch_model
from patchkit.errors import NothingMatched, SlowerPatch, SpecError
from patchkit.patches.gemv import Gemv
from patchkit.speculation import statistics_of
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model


def ids(rows: int = 1, tokens: int = 12) -> torch.Tensor:
    return torch.randint(5, 90, (rows, tokens), generator=torch.Generator().manual_seed(1))


def hits(model: Any) -> dict[str, int]:
    (facts,) = report(model).patches
    return facts.hits


def linears(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


@torch.no_grad()
def decoded(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last tokens, fed one by one after a prompt."""
    cache, found = None, []
    for piece in (tokens[:, :4], *tokens[:, 4:].split(1, 1)):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits[:, -1:])
    return torch.cat(found, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_run_over_the_kernel_and_give_the_same_logits(dtype: torch.dtype) -> None:
    plain, model = tiny_model("llama").to(dtype), patch_model(tiny_model("llama").to(dtype), "gemv")
    right = decoded(plain, ids())
    assert logit_error(decoded(model, ids()), right) <= TOLERANCES[dtype].logits
    assert hits(model)["products of few rows"] >= 8 * len(linears(model))


def test_tokens_of_a_batch_have_the_bits_of_single_products() -> None:
    layer = tiny_model("llama").model.layers[0].mlp.up_proj
    holder = patch_model(tiny_model("llama"), "gemv").model.layers[0].mlp.up_proj
    x = torch.randn(1, 7, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = holder(x)
        assert torch.equal(together, torch.cat([holder(x[:, i : i + 1]) for i in range(7)], 1))
        assert torch.allclose(together, layer(x), atol=1e-5)


@torch.no_grad()
def test_prompts_and_training_run_as_before() -> None:
    plain, model = tiny_model("llama"), patch_model(tiny_model("llama"), "gemv")
    long = ids(tokens=30)
    assert torch.equal(model(input_ids=long).logits, plain(input_ids=long).logits), "30 rows are not few"
    assert set(hits(model)) == {"products left to torch"}
    with torch.enable_grad():
        short = ids(tokens=4)
        loss = model(input_ids=short, labels=short).loss
        loss.backward()
        assert torch.equal(loss, plain(input_ids=short, labels=short).loss)
    assert all(module.weight.grad is not None for module in linears(model.model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(input_ids=short).logits, plain(input_ids=short).logits)
    assert set(hits(model)) == {"products left to torch"}


@pytest.mark.filterwarnings("ignore")  # torch warns of the age of torch.jit, and of sparse layouts
@torch.no_grad()
def test_calls_that_torch_has_to_follow_are_left_to_it() -> None:
    plain = tiny_model("llama").lm_head
    layer = patch_model(tiny_model("llama"), "gemv", verbose=False).lm_head
    x, direction = torch.randn(2, 3, 1, plain.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.vmap(layer)(x), torch.vmap(plain)(x))
    assert torch.equal(torch.func.jvp(layer, (x,), (direction,))[1], plain(direction))
    traced = torch.jit.trace(layer, x, check_trace=False)
    assert torch.equal(traced(direction), plain(direction))
    assert type(layer(x.as_subclass(Marked))) is Marked


class Marked(torch.Tensor):
    """A tensor that is not to become another kind."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_a_patched_model_may_be_cast(dtype: torch.dtype) -> None:
    model = patch_model(tiny_model("llama"), "gemv", verbose=False).to(dtype)
    assert logit_error(model(input_ids=ids()).logits, tiny_model("llama").to(dtype)(input_ids=ids()).logits) <= TOLERANCES[dtype].logits


@pytest.mark.parametrize("features", [0, 32, 128, 512])
@torch.no_grad()
def test_inputs_and_biases_that_do_not_fit_are_refused_as_before(features: int) -> None:
    layer = patch_model(tiny_model("llama"), "gemv", verbose=False).lm_head
    assert layer.in_features not in (features, 0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, features))
    x = torch.ones(1, layer.in_features)
    for bias, message in ((torch.ones(5), "must match"), (torch.ones(layer.out_features, dtype=torch.bfloat16), "same dtype")):
        layer.bias = nn.Parameter(bias)
        with pytest.raises(RuntimeError, match=message):
            layer(x)
    layer.bias = nn.Parameter(torch.ones(1))
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias)), "torch adds one number to every output"


@pytest.mark.filterwarnings("ignore")  # torch warns of sparse layouts
@torch.no_grad()
def test_sparse_weights_are_left_alone() -> None:
    model = patch_model(tiny_model("llama"), "gemv", verbose=False)
    right, layer = model(input_ids=ids()).logits, model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to_sparse_csr())
    assert logit_error(model(input_ids=ids()).logits, right) <= TOLERANCES[torch.float32].logits
    unpatch_model(model)
    patch_model(model, "gemv", verbose=False)
    assert "not dense" in " ".join(report(model).patches[0].left_alone.values())


def test_nothing_stays_behind() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with patched(model, "gemv", verbose=False):
        assert all("forward" in vars(module) for module in linears(model))
    assert_restored(before, model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_runs_over_its_own_weights(duplicate: Any) -> None:
    model = patch_model(tiny_model("llama"), "gemv", verbose=False)
    right = decoded(model, ids())
    twin = duplicate(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(decoded(twin, ids()), right)
    unpatch_model(twin)
    assert not any("forward" in vars(module) for module in linears(twin))


def test_weights_that_change_are_followed() -> None:
    model, plain = patch_model(tiny_model("llama"), "gemv", verbose=False), tiny_model("llama")
    for each in (model, plain):
        each.lm_head.weight.data.mul_(3.0)
        each.model.layers[0].mlp.up_proj.weight = nn.Parameter(each.model.layers[0].mlp.up_proj.weight.detach() * 2)
    assert logit_error(decoded(model, ids()), decoded(plain, ids())) <= TOLERANCES[torch.float32].logits


@pytest.mark.parametrize("first", ["gemv + mlp_int8", "mlp_int8 + gemv"])
def test_int8_layers_stay_int8_layers(first: str) -> None:
    model = patch_model(tiny_model("llama"), first, verbose=False)
    both = decoded(model, ids())
    unpatch_model(model)
    only = decoded(patch_model(model, "mlp_int8", verbose=False), ids())
    assert logit_error(both, only) <= TOLERANCES[torch.float32].logits
    facts = {patch.name: patch for patch in report(patch_model(tiny_model("llama"), first, verbose=False)).patches}
    assert "Int8Weight" in " ".join(facts["gemv"].left_alone.values())


@pytest.mark.parametrize("spec", ["gemv + streaming(sinks=2, window=6)", "gemv + speculative", "gemv + compile(backend=eager)"])
def test_it_goes_with_others(spec: str) -> None:
    other = spec.removeprefix("gemv + ")
    settings: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    right = patch_model(tiny_model("llama"), other, verbose=False).generate(ids(), **settings)
    model = patch_model(tiny_model("llama"), spec, verbose=False)
    assert torch.equal(model.generate(ids(), **settings), right)
    if "speculative" in spec:
        assert statistics_of(model).steps


def test_modules_are_chosen_by_pattern() -> None:
    model = patch_model(tiny_model("llama"), "gemv(modules=['*.down_proj'])", verbose=False)
    assert report(model).patches[0].changed == {"linear layers": len(model.model.layers)}
    with pytest.raises(NothingMatched, match="matches no linear layer"):
        patch_model(tiny_model("llama"), Gemv(modules="nothing"))


def test_a_class_of_its_own_is_left_alone_and_reported() -> None:
    model = tiny_model("llama")
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    facts = report(patch_model(model, "gemv", verbose=False)).patches[0]
    assert facts.changed == {"linear layers": len(linears(model)) - 1}
    assert facts.left_alone == {"model.layers.0.mlp.up_proj": "it is a ParametrizedLinear, which may compute something else"}


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(NothingMatched, match=r"torch.float64.*both must be"):
        patch_model(tiny_model("llama").double(), "gemv")
    conv1d = tiny_model("gpt2")
    patch_model(conv1d, "gemv", verbose=False)
    assert report(conv1d).patches[0].changed == {"linear layers": 1}, "the head; the others are transformers' Conv1D"


def test_slower_is_an_error_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from patchkit import module_timing

    monkeypatch.setattr(module_timing, "milliseconds", lambda modules, rows: (1.0, 2.0))
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(SlowerPatch, match="gemv is slower"):
        patch_model(model, "gemv(strict=True)")
    assert_restored(before, model)
    patch_model(model, "gemv", verbose=False)
    assert "gemv is slower" in caplog.text


def test_options_are_checked() -> None:
    for wrong in (dict(modules=()), dict(modules=(3,)), dict(modules=3), dict(strict=1)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Gemv(**wrong)  # type: ignore[arg-type]
    assert Gemv(modules=iter(["*.up_proj"])).modules == ("*.up_proj",)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="modules"):
        parse_spec("gemv(module='x')")
    assert isinstance(parse_spec("gemv")[0], Patch)
