"""patch_model and its relatives, with patches made for the test."""

from __future__ import annotations

import copy
import functools
import io
import json
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

import patchkit
from patchkit import _compat, api
from patchkit import patch as patch_module
from patchkit.errors import IrreversiblePatch, NothingMatched, PatchConflict, SpecError, UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Patch, Stage, available_patches, register_patch
from patchkit.testing import Snapshot, assert_restored, snapshot, tiny_model

IDS = torch.arange(3, 15).view(1, -1)


@dataclass(frozen=True)
class Scale(Patch):
    """Edits weights in place."""

    stage = Stage.WEIGHTS
    factor: float = 2.0

    def __post_init__(self) -> None:
        if self.factor == 0:
            raise ValueError("factor=0: give a factor that is not 0")

    def apply(self, target: Any, handle: Handle) -> None:
        weight = target.model.get_output_embeddings().weight
        handle.on_undo(functools.partial(put_back, weight, weight.detach().clone()))
        with torch.no_grad():
            weight.mul_(self.factor)
        handle.record.changed("output layers", 1)


@dataclass(frozen=True)
class Shift(Patch):
    """Hooks every decoder layer and sets attributes."""

    stage = Stage.ATTENTION
    by: float = 0.5

    def apply(self, target: Any, handle: Handle) -> None:
        layers = target.decoder.layers
        for layer in layers:
            handle.hook(layer, functools.partial(shift_output, self.by, handle.record.hits))
            handle.set_attribute(layer, "_shift", self.by)
        handle.set_attribute(target.model, "_tag", nn.Linear(2, 2))
        handle.set_attribute(target.model.config, "_shift", self.by)
        handle.record.changed("decoder layers", len(layers))
        handle.record.left_alone("the embedding", "it has no hidden states")


@dataclass(frozen=True)
class FailsHalfway(Patch):
    stage = Stage.GENERATION
    error: ClassVar[type[BaseException]] = RuntimeError

    def apply(self, target: Any, handle: Handle) -> None:
        handle.hook(target.decoder, functools.partial(shift_output, 1.0, handle.record.hits))
        handle.set_attribute(target.model, "_tag", "half")
        raise self.error("half-way")


@dataclass(frozen=True)
class FailsToUndo(Patch):
    stage = Stage.GENERATION

    def apply(self, target: Any, handle: Handle) -> None:
        handle.on_undo(raise_in_undo)
        handle.record.changed("nothing worth keeping", 1)


@dataclass(frozen=True)
class Refuses(Patch):
    """Refuses in check, and would leave a trace in apply."""

    stage = Stage.COMPILE

    def check(self, target: Any) -> None:
        raise UnsupportedModel(f"{type(target.model).__name__} is refused: take another")

    def apply(self, target: Any, handle: Handle) -> None:
        raise AssertionError("apply must not run after a refusal")


@dataclass(frozen=True)
class Idle(Patch):
    stage = Stage.COMPILE

    def apply(self, target: Any, handle: Handle) -> None:
        handle.set_attribute(target.model, "_idle", True)
        handle.record.changed("layers", 0)


def put_back(weight: torch.Tensor, old: torch.Tensor) -> None:
    with torch.no_grad():
        weight.copy_(old)


def shift_output(by: float, hits: Counter[str], module: nn.Module, args: Any, output: Any) -> Any:
    hits["forwards"] += 1
    return output + by if torch.is_tensor(output) else None


def raise_in_undo() -> None:
    raise RuntimeError("stuck")


class Wrapper:
    """PEFT's interface, as far as patchkit uses it."""

    def __init__(self, base: Any) -> None:
        self.base = base

    def get_base_model(self) -> Any:
        return self.base


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_module, "_registry", dict(available_patches()))
    for cls in (Scale, Shift, FailsHalfway, FailsToUndo, Refuses, Idle):
        register_patch(f"t_{cls.__name__.lower()}")(cls)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def before(model: Any) -> Snapshot:
    return snapshot(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_patched_differs_and_unpatched_is_the_same_bit_for_bit(model: Any, before: Snapshot) -> None:
    plain = logits(model)
    assert patchkit.patch_model(model, Scale(), Shift(by=1.0)) is model
    assert not torch.equal(logits(model), plain)
    assert patchkit.unpatch_model(model) is model
    assert torch.equal(logits(model), plain)
    assert_restored(before, model)


def test_a_model_is_patched_again_after_unpatching(model: Any, before: Snapshot) -> None:
    patchkit.patch_model(model, "t_shift")
    first = logits(model)
    patchkit.unpatch_model(model)
    patchkit.patch_model(model, "t_shift")
    assert torch.equal(logits(model), first)
    patchkit.unpatch_model(model)
    assert_restored(before, model)


def test_patches_are_sorted_by_stage_whatever_their_form(model: Any) -> None:
    patchkit.patch_model(model, ["t_scale(factor=3.0)", [Shift()]])
    assert [entry.spec for entry in patchkit.report(model).patches] == ["t_shift", "t_scale(factor=3.0)"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_half_way_leaves_nothing(model: Any, before: Snapshot, error: type[BaseException], monkeypatch: Any) -> None:
    monkeypatch.setattr(FailsHalfway, "error", error)
    with pytest.raises(error, match="half-way"):
        patchkit.patch_model(model, Scale(), Shift(), FailsHalfway())
    assert_restored(before, model)


def test_a_failure_that_cannot_be_undone_says_so(model: Any, before: Snapshot) -> None:
    with pytest.raises(IrreversiblePatch, match=r"stuck.*load it again") as caught:
        patchkit.patch_model(model, Shift(), FailsToUndo(), Idle())
    assert isinstance(caught.value.__cause__, NothingMatched)
    assert_restored(before, model)


def test_all_checks_come_before_any_edit(model: Any, before: Snapshot) -> None:
    with pytest.raises(UnsupportedModel, match="LlamaForCausalLM is refused"):
        patchkit.patch_model(model, Shift(), Refuses())
    assert_restored(before, model)


def test_a_patch_that_changes_nothing_is_refused(model: Any, before: Snapshot) -> None:
    with pytest.raises(NothingMatched, match="t_idle changed nothing in LlamaForCausalLM"):
        patchkit.patch_model(model, Idle())
    assert_restored(before, model)


@pytest.mark.parametrize(
    ("patches", "error", "message"),
    [
        ((), SpecError, "no patch given: name at least one, available: .*streaming"),
        (([], ()), SpecError, "no patch given"),
        (("",), SpecError, "empty spec"),
        (("t_shif",), SpecError, "did you mean 't_shift'"),
        (("t_scale(factor=0)",), SpecError, "factor=0"),
        ((3,), SpecError, "3 is not a patch"),
        ((None,), SpecError, "None is not a patch"),
        ((Shift,), SpecError, r"Shift is a class: write Shift\(\)"),
        ((Shift(), "t_shift(by=2.0)"), PatchConflict, "'t_shift' is given 2 times: give it once"),
    ],
)
def test_bad_patches_are_refused(model: Any, before: Snapshot, patches: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        patchkit.patch_model(model, *patches)
    assert_restored(before, model)


def test_an_unregistered_patch_is_refused(model: Any) -> None:
    @dataclass(frozen=True)
    class Nameless(Patch):
        stage = Stage.WEIGHTS

    with pytest.raises(SpecError, match=r"Nameless is not registered: .*@register_patch"):
        patchkit.patch_model(model, Nameless())


def test_patching_twice_and_unpatching_a_foreign_model_conflict(model: Any) -> None:
    patchkit.patch_model(model, Shift())
    shifted = logits(model)
    with pytest.raises(PatchConflict, match="already patched with t_shift: unpatch_model first, or give all patches in one call"):
        patchkit.patch_model(model, Scale())
    assert torch.equal(logits(model), shifted)
    patchkit.unpatch_model(model)
    for call in (patchkit.unpatch_model, patchkit.report):
        for foreign in (model, object(), None):
            with pytest.raises(PatchConflict, match="not patched by patchkit"):
                call(foreign)


def test_only_causal_language_models_are_patched(model: Any) -> None:
    sizes: dict[str, Any] = dict(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)

    class Outer(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    cases = [
        (model.model, "LlamaModel has no language-modelling head"),
        (LlamaForSequenceClassification(model.config), "no language-modelling head"),
        (T5ForConditionalGeneration(T5Config(**sizes)), "encoder-decoder"),
        (nn.Linear(2, 2), "Linear is not a transformers model"),
        (None, "NoneType is not a transformers model"),
        ("gpt2", "'gpt2' is a name, not a model: use patchkit.from_pretrained"),
        (torch.compile(model, backend="eager"), "patch the model first, then compile it"),
        (Outer(model), "patch its .module"),
    ]
    for refused, message in cases:
        with pytest.raises(UnsupportedModel, match=message):
            patchkit.patch_model(refused, Shift())


def test_a_peft_wrapper_is_looked_through(model: Any, before: Snapshot) -> None:
    wrapper = Wrapper(model)
    assert patchkit.patch_model(wrapper, Shift()) is wrapper
    assert patchkit.report(wrapper).to_dict() == patchkit.report(model).to_dict()
    assert patchkit.unpatch_model(wrapper) is wrapper
    assert_restored(before, model)


def test_patched_unpatches_at_the_end_and_after_an_exception(model: Any, before: Snapshot) -> None:
    with patchkit.patched(model, "t_shift + t_scale") as inside:
        assert inside is model
        assert len(patchkit.report(model).patches) == 2
    assert_restored(before, model)
    with pytest.raises(ZeroDivisionError), patchkit.patched(model, Shift()):
        raise ZeroDivisionError
    assert_restored(before, model)


def test_with_patches_keeps_the_shape_of_what_is_returned(model: Any) -> None:
    @patchkit.with_patches("t_shift", Scale())
    def load(shape: str, *, extra: int = 0) -> Any:
        """Loads."""
        return {"model": model, "pair": (model, "tokenizer"), "two": (model, model), "none": ("tokenizer",)}[shape]

    assert (load.__name__, load.__doc__) == ("load", "Loads.")
    assert load("model", extra=1) is model
    patchkit.unpatch_model(model)
    assert load("pair") == (model, "tokenizer")
    patchkit.unpatch_model(model)
    for shape, found in (("two", 2), ("none", 0)):
        with pytest.raises(UnsupportedModel, match=f"tuple with {found} transformers models"):
            load(shape)
    assert "_patchkit" not in vars(model)


def test_with_patches_reads_its_specs_when_it_decorates() -> None:
    with pytest.raises(SpecError, match="t_shif"):
        patchkit.with_patches("t_shif")


def test_from_pretrained_reads_specs_before_loading(tmp_path: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.save_pretrained(tmp_path)
    loaded = patchkit.from_pretrained(tmp_path, patches="t_shift(by=1.0)", dtype=torch.float32)
    with patchkit.patched(model, Shift(by=1.0)):
        assert torch.equal(logits(loaded), logits(model))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded before the spec was read"))
    with pytest.raises(SpecError):
        patchkit.from_pretrained(tmp_path, patches=["t_shift", "t_scal"])


def test_a_patched_model_saves_a_stock_checkpoint(tmp_path: Any, model: Any) -> None:
    plain = logits(model)
    model.save_pretrained(tmp_path / "before")
    patchkit.patch_model(model, Shift())
    model.save_pretrained(tmp_path / "patched")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), plain)


def test_the_report_counts_at_run_time(model: Any) -> None:
    patchkit.patch_model(model, Shift(by=1.0), Scale())
    layers = len(model.model.layers)
    assert patchkit.report(model).patches[0].hits == {}
    logits(model)
    entry = {
        "name": "t_shift",
        "spec": "t_shift(by=1.0)",
        "changed": {"decoder layers": layers},
        "left_alone": {"the embedding": "it has no hidden states"},
        "hits": {"forwards": layers},
        "measured": {},
        "modules": {},
        "same_up_to": 0,
        "notes": {},
        "warnings": {},
    }
    report = patchkit.report(model)
    assert json.loads(json.dumps(report.to_dict()))["patches"][0] == entry
    assert str(report).splitlines() == [
        f"t_shift(by=1.0): {layers} decoder layers; left alone: the embedding (it has no hidden states); hits: forwards {layers}",
        "t_scale: 1 output layers",
    ]


def test_a_deep_copy_is_unpatched_alone(model: Any, before: Snapshot) -> None:
    plain = logits(model)
    patchkit.patch_model(model, Shift(by=1.0), Scale())
    changed = logits(model)
    twin = copy.deepcopy(model)
    patchkit.unpatch_model(twin)
    assert torch.equal(logits(twin), plain)
    assert vars(twin).keys() == before.attributes[""].keys()
    assert torch.equal(logits(model), changed)
    patchkit.unpatch_model(model)
    assert_restored(before, model)


def test_a_patched_model_survives_torch_save(model: Any) -> None:
    plain = logits(model)
    patchkit.patch_model(model, Shift(by=1.0), Scale())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(logits(patchkit.unpatch_model(loaded)), plain)
    assert "_patchkit" in vars(model)


def test_a_shallow_copy_is_refused(model: Any) -> None:
    patchkit.patch_model(model, Shift())
    with pytest.raises(PatchConflict, match="shallow copy"):
        patchkit.unpatch_model(copy.copy(model))
    assert patchkit.report(model).patches


def test_a_compiled_model_notices_patching_and_unpatching(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = logits(model)
    model.compile(backend="eager")
    compiled = model._compiled_call_impl
    assert torch.equal(logits(model), plain)
    with caplog.at_level(logging.INFO, "patchkit"):
        patchkit.patch_model(model, Shift(by=1.0))
    assert "call model.compile() again" in caplog.records[-1].message
    assert model._compiled_call_impl is None
    changed = logits(model)
    assert not torch.equal(changed, plain)
    model.compile(backend="eager")
    assert torch.equal(logits(model), changed), "code compiled before patching must not be found again"
    patchkit.unpatch_model(model)
    assert model._compiled_call_impl is compiled
    assert torch.equal(logits(model), plain), "code compiled while patched must not be found again"


def test_compiled_callables_around_the_model_notice_too(model: Any) -> None:
    plain, outside = logits(model), torch.compile(model, backend="eager")
    assert torch.equal(logits(outside), plain)
    with patchkit.patched(model, Shift(by=1.0)):
        assert not torch.equal(logits(outside), plain)
    assert torch.equal(logits(outside), plain)


def test_a_failed_patch_keeps_the_compiled_call(model: Any) -> None:
    model.compile(backend="eager")
    before = dict(vars(model))
    with pytest.raises(RuntimeError, match="half-way"):
        patchkit.patch_model(model, FailsHalfway())
    assert dict(vars(model)) == before


def test_a_copy_does_not_get_the_compiled_call_of_the_first(model: Any) -> None:
    model.compile(backend="eager")
    patchkit.patch_model(model, Shift())
    twin = copy.deepcopy(model)
    patchkit.unpatch_model(twin)
    assert "_compiled_call_impl" not in vars(twin)


def test_one_line_says_what_was_done(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    layers = len(model.model.layers)
    with caplog.at_level(logging.DEBUG, "patchkit"):
        patchkit.patch_model(model, "t_shift(by=1.0) + t_scale")
        patchkit.unpatch_model(model)
        patchkit.patch_model(model, Scale(), verbose=False)
    first, second = caplog.records
    shift = f"t_shift(by=1.0): {layers} decoder layers; left alone: the embedding (it has no hidden states)"
    assert first.message.startswith(f"patchkit: {shift} | t_scale: 1 output layers  (") and first.message.endswith(" s)")
    assert (first.levelno, second.levelno) == (logging.INFO, logging.DEBUG)


def test_the_line_goes_to_stderr_unless_logging_is_configured(
    model: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger, root = logging.getLogger("patchkit"), logging.getLogger()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    with monkeypatch.context() as context:
        context.setattr(root, "handlers", [])
        for verbose, lines in ((True, 1), (True, 1), (False, 0)):
            with patchkit.patched(model, Shift(), verbose=verbose):
                printed = capsys.readouterr()
            assert (printed.out, printed.err.count("\n")) == ("", lines)
        context.setattr(root, "handlers", [logging.NullHandler()])
        with patchkit.patched(model, Shift()):
            assert capsys.readouterr().err == ""


def test_the_self_check_guards_the_first_patch(model: Any, before: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    _compat.self_check.cache_clear()
    monkeypatch.setattr("patchkit._compat.versions.SUPPORTED", {"transformers": "<1", "torch": ">=2.8"})
    with pytest.raises(patchkit.PatchError, match="patchkit cannot run on transformers"):
        patchkit.patch_model(model, Shift())
    assert_restored(before, model)


def test_every_public_name_resolves() -> None:
    for name in (*patchkit._HOME_OF, "StreamingLLM"):
        assert getattr(patchkit, name) is not None
        assert name in dir(patchkit)
    assert patchkit.patch_model is api.patch_model
    assert patchkit.StreamingLLM is available_patches()["streaming"]


def test_a_patch_is_public_under_its_class_name() -> None:
    assert patchkit.Shift is Shift
    assert "Shift" in dir(patchkit)


@pytest.mark.parametrize("name", ["Shif", "patch_modell", "_private"])
def test_an_unknown_public_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError, match=rf"'patchkit' has no attribute '{name}', available: .*patch_model"):
        getattr(patchkit, name)


def test_one_patch_is_taken_off_and_the_others_stay() -> None:
    model, ids = tiny_model("llama"), torch.arange(40)[None] * 3 % 100 + 5
    before = snapshot(model)
    alone = patchkit.patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)(input_ids=ids).logits
    patchkit.patch_model(model, "streaming(sinks=2, window=12)", "mlp_int8(mode=weight_only)", verbose=False)
    assert not torch.equal(model(input_ids=ids).logits, alone)
    with pytest.raises(PatchConflict, match="streaming, mlp_int8"):
        patchkit.unpatch_model(model, "compile")
    assert patchkit.unpatch_model(model, "mlp_int8") is model
    assert [entry.name for entry in patchkit.report(model).patches] == ["streaming"]
    assert torch.equal(model(input_ids=ids).logits, alone)
    patchkit.unpatch_model(model, "streaming")
    assert_restored(before, model)
