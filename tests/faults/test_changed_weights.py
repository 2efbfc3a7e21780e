"""Models whose weights change after they were patched: training, adapters, other checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support import cache_of, cached

from patchkit import StaleWeights, patch_model, refresh, report, unpatch_model
from patchkit.anatomy.target import Target
from patchkit.errors import PatchConflict, PatchError
from patchkit.freshness import WeightWatch
from patchkit.linear.state import LinearState
from patchkit.patches.linear import LinearAttention
from patchkit.patches.speculative import Speculative
from patchkit.speculation import Adaptive, Chain, Controller, CostModel, Eagle, Medusa, PromptLookup, SelfDraft, load_heads
from patchkit.speculation.controllers import ControllerSession
from patchkit.speculation.heads import EagleHead, Heads, MedusaHeads
from patchkit.speculation.shared import speculation_of
from patchkit.speculation.statistics import StepRecord
from patchkit.testing import tiny_model
from patchkit.trained_for import TrainedFor
from patchkit.training.heads import train_heads
from patchkit.views import twin

IDS = torch.arange(12)[None] % 5 * 7 + 5
INT8 = "mlp_int8(mode=weight_only)"


def generate(model: Any, ids: torch.Tensor = IDS, new: int = 20, **options: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=new, do_sample=False, **options)


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def pair(family: str = "llama", spec: str = INT8) -> tuple[Any, Any]:
    """A model, and a patched second tree over its weights."""
    model = tiny_model(family)
    return model, patch_model(twin(model), spec, verbose=False)


def anew(model: Any, spec: str = INT8) -> Any:
    """A copy of ``model`` that is patched now."""
    return patch_model(copy.deepcopy(model), spec, verbose=False)


def step(model: Any, parameters: Any = None, fused: bool = True, lr: float = 1e-2) -> None:
    optimizer = torch.optim.AdamW([*(parameters or model.parameters())], lr=lr, fused=fused)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _edit(model: Any) -> None:
    for each in model.model.layers:
        each.mlp.up_proj.weight.data.add_(0.05)


def _load(model: Any) -> None:
    model.load_state_dict({name: value * 1.05 for name, value in model.state_dict().items()})


CHANGES: dict[str, Callable[[Any], None]] = {"step": step, "single": lambda model: step(model, fused=False), ".data": _edit, "load": _load}


# -- int8 ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", CHANGES)
def test_int8_weights_follow_at_the_next_prompt(change):
    model, patched = pair()
    before = logits(patched)
    CHANGES[change](model)
    after = logits(patched)
    assert torch.equal(after, logits(anew(model))) and not torch.equal(after, before)
    CHANGES[change](model)
    assert torch.equal(generate(patched), generate(anew(model)))
    assert report(patched).patches[0].hits["requantised"] == 2
    assert torch.equal(logits(patched), logits(anew(model))) and not refresh(patched)
    assert report(patched).patches[0].hits["requantised"] == 2


def test_a_layer_that_was_given_another_weight_does_not_stop_the_others():
    model, patched = pair()
    mlp = patched.model.layers[0].mlp
    for name, shape in (("gate_proj", (32, 64)), ("up_proj", (32, 64)), ("down_proj", (64, 32))):  # as structured pruning does
        getattr(mlp, name).weight = torch.nn.Parameter(torch.ones(shape))
    _edit(model)
    assert refresh(patched)
    follows, right = (each.model.layers[1].mlp.up_proj.weight.qdata for each in (patched, anew(model)))
    assert torch.equal(follows, right) and mlp.up_proj.weight.shape == (32, 64)
    del mlp.up_proj.weight  # a parametrization or a mask computes it instead
    mlp.up_proj.weight = torch.ones(32, 64)
    _edit(model)
    assert refresh(patched) and logits(patched).isfinite().all()


@pytest.mark.parametrize(("family", "spec"), [
    ("gpt2", INT8), ("qwen3_moe", INT8), ("gpt_oss", INT8), ("llama", "mlp_int8(mode=dynamic)"),
    ("llama", f"{INT8} + streaming(sinks=2, window=60)"), ("llama", f"{INT8} + compile(backend=eager)"),
    ("llama", f"{INT8} + speculative(k=2)"), ("llama", "mlp_int8(mode=weight_only, modules='*.down_proj')"),
])  # fmt: skip
def test_int8_weights_of_every_kind_follow(family, spec):
    model, patched = pair(family, spec)
    generate(patched)
    step(model)
    assert torch.equal(generate(patched), generate(anew(model, spec)))
    step(model)
    assert refresh(patched) and not refresh(patched)
    assert torch.equal(logits(patched), logits(anew(model, spec)))
    unpatch_model(patched)
    assert torch.equal(logits(patched), logits(model))


def test_int8_weights_keep_their_addresses():
    model, patched = pair()
    weight = patched.model.layers[0].mlp.up_proj.weight
    addresses = weight.qdata.data_ptr(), weight.scale.data_ptr()
    step(model)
    assert refresh(patched)
    assert patched.model.layers[0].mlp.up_proj.weight is weight
    assert (weight.qdata.data_ptr(), weight.scale.data_ptr()) == addresses


def test_a_step_between_two_turns_of_one_cache():
    model, patched = pair()
    with torch.no_grad():
        mine = cache_of(patched(IDS, use_cache=True))
    theirs = copy.deepcopy(mine)
    # A single token is fed after an optimizer's step, and three after a change that no optimizer saw.
    for tokens, change in ((1, step), (3, _load), (40, _edit)):
        change(model)
        ids = IDS.repeat(1, 4)[:, :tokens]
        with torch.no_grad():
            assert torch.equal(patched(ids, **cached(mine)).logits, anew(model)(ids, **cached(theirs)).logits)


def test_steps_of_decoding_do_not_look_at_weights(monkeypatch):
    _, patched = pair()
    looks = []
    stamp = WeightWatch.stamp
    monkeypatch.setattr(WeightWatch, "stamp", lambda self: looks.append(self) or stamp(self))
    generate(patched, new=30)
    assert len(looks) == 1


def test_a_saved_model_has_the_weights_of_now():
    model, patched = pair()
    step(model)
    saved, wanted = patched.state_dict(), anew(model).state_dict()
    for name, value in wanted.items():
        if "mlp" in name:
            assert torch.equal(saved[name].qdata, value.qdata) and torch.equal(saved[name].scale, value.scale)


def test_a_model_that_was_cast_follows_in_its_new_dtype():
    patched = tiny_model("llama")
    weights = [layer.mlp.up_proj.weight for layer in patched.model.layers]
    patch_model(patched, INT8, verbose=False).to(torch.bfloat16)
    for weight in weights:
        weight.data.add_(0.05)
    assert refresh(patched)
    assert torch.equal(logits(patched), logits(anew(unpatch_model(copy.deepcopy(patched)))))


@pytest.mark.parametrize("change", ["shape", "meta"])
def test_weights_that_cannot_be_followed_are_refused_every_time(change):
    model, patched = pair()
    weight = model.model.layers[0].mlp.up_proj.weight
    kept = weight.data
    weight.data = torch.zeros(3, 3) if change == "shape" else weight.data[:1]
    if change == "meta":
        model.model.layers[1].mlp.up_proj.weight.data = torch.zeros(1)
    for call in (generate, logits, refresh, generate):
        with pytest.raises(StaleWeights, match=r"patchkit.refresh\(model\)"):
            call(patched)
    weight.data = kept + 0.01
    if change == "meta":
        model.model.layers[1].mlp.up_proj.weight.data = torch.ones(model.model.layers[0].mlp.up_proj.weight.shape)
    assert refresh(patched)
    assert torch.equal(logits(patched), logits(anew(model)))


def test_freed_weights_cannot_change():
    patched = patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only, keep_original=False)", verbose=False)
    before = logits(patched)
    patched.model.layers[0].self_attn.q_proj.weight.data.add_(0.1)
    assert not refresh(patched) and not torch.equal(logits(patched), before)  # attention runs over its own weights


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("stale", [False, True])
def test_a_copy_of_a_patched_model(copied, stale):
    model, patched = pair()
    if stale:
        step(model)
    other = copied(patched)
    assert refresh(other) is stale and not refresh(other)
    assert torch.equal(logits(other), logits(anew(model)))
    _edit(unpatch_model(copied(patched)))
    assert refresh(patched) is stale


def test_threads_see_whole_weights():
    model, patched = pair()
    found: list[Any] = []
    for _ in range(5):
        step(model)
        wanted = logits(anew(model))
        threads = [threading.Thread(target=lambda: found.append(logits(patched))) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(found) == 4 and all(torch.equal(each, wanted) for each in found)
        found.clear()


@torch.inference_mode()
def test_int8_weights_that_were_made_in_inference_mode():
    model = tiny_model("llama")
    patched = patch_model(twin(model), INT8, verbose=False)
    _edit(model)
    with torch.inference_mode(False):
        assert refresh(patched)
    assert torch.equal(logits(patched), logits(anew(model)))


def _converted(model: Any) -> tuple[str, LinearState]:
    """The name of a projection, and linear attention that adapts it."""
    target = Target(model)
    state = LinearState.start(target, "elu1", 8, 0, 16, [0, 1])
    name = f"{target.attention_layers[0].name}.q_proj"
    rows, columns = model.get_submodule(name).weight.shape
    torch.manual_seed(0)
    state.lora[name] = torch.randn(2, columns) * 0.1, torch.randn(rows, 2) * 0.1
    return name, state


def test_converted_attention_follows():
    model = tiny_model("llama")
    name, state = _converted(model)
    patched = patch_model(twin(model), LinearAttention(state_dict=state), verbose=False)
    before = logits(patched)
    model.get_submodule(name).weight.data.add_(0.1)
    assert refresh(patched) and not refresh(patched)
    a, b = state.lora[name]
    assert torch.allclose(patched.get_submodule(name).weight, model.get_submodule(name).weight + b @ a, atol=1e-6)
    assert not torch.equal(logits(patched), before)


# -- speculation -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [f"speculative(draft=self_draft({INT8}), k=3)", "speculative(draft=self_draft(streaming(window=8)), k=3)"])
def test_a_training_loop_with_a_self_draft(spec):
    """Generate, learn, generate, with the optimizer that transformers' Trainer uses."""
    model = patch_model(tiny_model("llama"), spec, verbose=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for _ in range(4):
        text = generate(model)
        plain = tiny_model("llama")
        plain.load_state_dict(model.state_dict())
        assert torch.equal(text, generate(plain))
        view = speculation_of(model).drafter.model
        assert torch.equal(logits(view), logits(patch_model(plain, spec[spec.index("self_draft(") + 11 : -7], verbose=False)))
        model(text, labels=text).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert report(model).patches[0].hits["accepted"] > 0


def test_a_training_loop_beside_an_int8_model_for_rollouts():
    model, rollout = pair(spec=f"{INT8} + speculative(k=2)")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    texts = []
    for _ in range(3):
        texts.append(generate(rollout))
        assert torch.equal(texts[-1], generate(anew(model)))
        model(texts[-1], labels=texts[-1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len({tuple(each[0].tolist()) for each in texts}) > 1


def _with_adapters() -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="one")
    model.add_adapter("two", config)
    return model.eval()


@pytest.mark.parametrize("patches", [INT8, "streaming(sinks=2, window=100)"])
def test_a_self_draft_uses_the_adapters_of_its_model(patches):
    def make() -> Any:
        return _with_adapters()

    plain, model = make(), patch_model(make(), Speculative(draft=SelfDraft(patches), k=3), verbose=False)
    view = speculation_of(model.get_base_model()).drafter.model

    def same(exactly: bool = True) -> None:
        assert torch.equal(generate(model), generate(plain))
        if "int8" not in patches:  # nothing was evicted: the view computes what the model does
            assert torch.allclose(logits(view), logits(plain), atol=1e-4)
        else:
            assert (logits(view) - logits(plain)).abs().max() < 0.3

    same()
    for change in (
        lambda each: each.set_adapter("two"),
        lambda each: each.merge_adapter(),
        lambda each: each.unmerge_adapter(),
        lambda each: each.base_model.disable_adapter_layers(),
        lambda each: each.base_model.enable_adapter_layers(),
        lambda each: each.set_adapter("one"),
    ):
        for each in (plain, model):
            change(each)
        same()
    for each in (plain, model):
        each.merge_adapter()
    same()
    with plain.disable_adapter(), model.disable_adapter():  # each takes its adapters out of its weights, once
        same()
    same()
    assert torch.allclose(logits(model), logits(plain), atol=1e-5)


def test_other_tensors_than_a_self_draft_shares_are_reported(caplog):
    model = patch_model(tiny_model("llama"), Speculative(draft=SelfDraft(INT8), k=3), verbose=False)
    plain = tiny_model("llama")
    weights = {name: value * 1.1 for name, value in plain.state_dict().items()}
    for each in (plain, model):
        each.load_state_dict(weights, assign=True)
    with caplog.at_level(logging.WARNING, "patchkit"):
        for _ in range(2):
            assert torch.equal(generate(model), generate(plain))
    assert sum("other tensors" in line for line in caplog.messages) == 1


def _heads(model: Any, kind: str) -> Heads:
    facts = TrainedFor.of(model)
    heads = MedusaHeads.start(model, 2) if kind == "medusa" else EagleHead(facts.hidden_size, facts.embedding_size).eval()
    heads.trained_for = facts
    return heads


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_heads_of_weights_that_have_changed_are_reported_once(kind, caplog):
    model, plain = tiny_model("llama"), tiny_model("llama")
    drafter = (Medusa if kind == "medusa" else Eagle)(heads=_heads(model, kind))
    patch_model(model, Speculative(draft=Chain((PromptLookup(), drafter)), k=2), verbose=False)
    with caplog.at_level(logging.WARNING, "patchkit"):
        generate(model)
        edited = model.model.norm.weight
        edited.data = edited.data.clone()  # other places, the same values
        generate(model)
        assert not caplog.messages
        for each in (model, plain):
            with torch.no_grad():
                each.model.norm.weight.mul_(1.5)
        for _ in range(3):
            assert torch.equal(generate(model), generate(plain))
    assert sum(f"{kind} heads were trained for other weights" in line for line in caplog.messages) == 1


def test_heads_of_another_adapter_are_reported():
    model = _with_adapters()
    patch_model(model, Speculative(draft=Medusa(heads=_heads(model.get_base_model(), "medusa")), k=2), verbose=False)
    assert not refresh(model)
    model.set_adapter("two")
    assert refresh(model) and not refresh(model)
    assert [text for text in report(model).patches[0].warnings if "other weights" in text]


def _record(k: int, accepted: int) -> StepRecord:
    return StepRecord(k, 1, (k,), (accepted,), accepted + 1, 0.1 * k, 1.0, 0.01)


@pytest.mark.parametrize("options", [CostModel(), Adaptive()], ids=str)
def test_acceptance_is_forgotten(options: Controller):
    def learn(session: ControllerSession, accepts: bool, rounds: int) -> None:
        for _ in range(rounds):
            k = session.choose()
            session.observe(_record(k, k if accepts else 0))

    session = options.begin()
    session.new_text(10)
    learn(session, accepts=False, rounds=200)
    kept = copy.deepcopy(session)
    session.new_weights()
    for each in (session, kept):
        learn(each, accepts=True, rounds=8)
    assert session.choose() > kept.choose()


def test_the_controller_is_told():
    told: list[int] = []

    class Told(ControllerSession):
        def choose(self) -> int:
            return 2

        def new_weights(self) -> None:
            told.append(1)

    model = patch_model(tiny_model("llama"), "speculative(k=2)", verbose=False)
    speculation_of(model).controller = Told()
    generate(model)
    assert not told
    step(model)
    generate(model)
    generate(model)
    assert len(told) == 1


# -- refresh ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["none", INT8, "speculative(k=2)", "streaming(window=20)", "linear(window=8)", "compile(backend=eager)",
                                  f"speculative(draft=self_draft({INT8})) + {INT8}"])  # fmt: skip
def test_nothing_is_stale_after_patching(spec):
    model = patch_model(tiny_model("llama"), spec, verbose=False)
    assert not refresh(model)
    generate(model)
    assert not refresh(model)


@pytest.mark.parametrize("kind", ["int8", "experts", "adapted", "self_draft"])
def test_refresh_follows_an_edit_that_no_sign_shows(kind):
    """A few values of a weight, edited through .data, are none of the 16 that are compared."""
    model = tiny_model("qwen3_moe" if kind == "experts" else "llama")
    patch: Any = f"speculative(draft=self_draft({INT8}))" if kind == "self_draft" else INT8
    edited = model.model.layers[0].mlp.experts.down_proj if kind == "experts" else model.model.layers[0].mlp.up_proj.weight
    if kind == "adapted":
        name, state = _converted(model)
        patch, edited = LinearAttention(state_dict=state), model.get_submodule(name).weight
    patched = patch_model(twin(model), patch, verbose=False)
    derives = speculation_of(patched).drafter.model if kind == "self_draft" else patched
    before = logits(derives)
    edited.data[..., 3, 1:4] += 2.0
    assert torch.equal(logits(derives), before), "this edit is seen: choose another"
    assert refresh(patched) or kind == "self_draft"
    assert not torch.equal(logits(derives), before) and not refresh(patched)


def test_an_unpatched_model_cannot_be_refreshed():
    with pytest.raises(PatchConflict):
        refresh(tiny_model("llama"))


def test_a_model_is_refreshed_through_its_wrapper():
    model = _with_adapters()
    patch_model(model, "speculative(k=2)", verbose=False)
    model.set_adapter("two")
    assert refresh(model) and not refresh(model.get_base_model())


def test_two_models_are_watched_apart():
    (one, first), (_, second) = pair(), pair()
    step(one)
    assert not refresh(second) and refresh(first)
    unpatch_model(first)
    assert not refresh(second)


# -- files of heads --------------------------------------------------------------------------------------------------------


def _as_before(path: Path, samples: dict[str, Any] | None) -> None:
    """Write a file of heads as it was when fewer weights were sampled, or none."""
    with safe_open(path, "pt") as file:
        metadata, tensors = dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    facts = json.loads(metadata["trained_for"])
    del facts["samples"]
    metadata["trained_for"] = json.dumps(facts if samples is None else facts | {"samples": samples})
    save_file(tensors, path, metadata)


@pytest.mark.parametrize("kept", ["all", "few", "none"])
def test_files_of_heads_know_the_whole_model(kept, tmp_path):
    model = tiny_model("llama")
    path = tmp_path / "heads.safetensors"
    heads = _heads(model, "medusa")
    heads.save(path)
    every = TrainedFor.of(model).samples
    assert set(every) == {name for name, _ in model.named_parameters()}
    few = {name: values for name, values in every.items() if name.endswith("q_proj.weight")}
    if kept != "all":
        _as_before(path, few if kept == "few" else None)
    load_heads(path).check_fits(model)
    load_heads(path).check_fits(copy.deepcopy(model).to(torch.bfloat16))
    for name, _ in model.named_parameters():
        other = copy.deepcopy(model)
        other.get_parameter(name).data.mul_(1.1).add_(0.01)
        known = kept == "all" or (kept == "few" and name in few) or "lm_head" in name
        if known:
            with pytest.raises(Exception, match="Train heads for this model"):
                load_heads(path).check_fits(other)
        else:
            load_heads(path).check_fits(other)


def test_more_weights_than_are_kept_are_spread_alike(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("patchkit.trained_for._SAMPLED", 5)
    few = TrainedFor.of(model)
    monkeypatch.undo()
    every = TrainedFor.of(model)
    assert len(few.samples) == 5 and few.samples.items() <= every.samples.items()
    assert few.other_weight(every) is None and dataclasses.replace(every, samples={}).other_weight(few) is None


def test_a_checkpoint_of_heads_for_another_model_is_refused(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama")
    other.model.norm.weight.data.mul_(1.5)  # the LM head is the same
    tokens, options = torch.arange(400) % 90 + 5, dict(depth=2, batch=2, length=16, progress=False)
    checkpoint = tmp_path / "heads.pt"
    train_heads(model, tokens, "medusa", steps=2, checkpoint=checkpoint, **options)
    saved = torch.load(checkpoint, weights_only=True)
    with pytest.raises(PatchError, match=r"model with another model\.norm\.weight"):
        train_heads(other, tokens, "medusa", steps=2, checkpoint=checkpoint, **options)
    train_heads(model, tokens, "medusa", steps=2, checkpoint=checkpoint, **options)
    del saved["trained_for"]  # as it was written before
    torch.save(saved, checkpoint)
    train_heads(model, tokens, "medusa", steps=2, checkpoint=checkpoint, **options)
