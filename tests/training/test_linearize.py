"""Conversion of a softmax model: the stages, their order, resumption, and what is left of the model."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import patchkit
from patchkit import patched
from patchkit.anatomy.target import Target
from patchkit.cli import app
from patchkit.errors import PatchConflict, PatchError, UnsupportedModel
from patchkit.linear.hybrid import HybridAttention, hybrid_attention
from patchkit.linear.state import LinearState, load_state
from patchkit.measure.perplexity import by_position, stream_nll
from patchkit.patches.linear import LinearAttention
from patchkit.patches.streaming import StreamingLLM
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model
from patchkit.training import run
from patchkit.training.conversion import Conversion, Rates
from patchkit.training.linearize import linearize
from patchkit.training.student import Student, unrotated
from patchkit.views import twin

SMALL: dict[str, Any] = dict(window=8, batch=2, length=48, progress=False)


@pytest.fixture(autouse=True)
def _few_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_PROBES", 4)
    monkeypatch.setattr(run, "_READOUT_TEXTS", 8)
    monkeypatch.setattr(run, "_TIMED_CONTEXT", 8)


def _tokens(n: int = 3000) -> torch.Tensor:
    """Text that counts upwards, and now and then starts anew."""
    starts = torch.randint(3, 60, (n // 20 + 1, 1), generator=torch.Generator().manual_seed(0))
    return (starts + torch.arange(20)).flatten()[:n]


def _teacher(
    parts: dict[int, HybridAttention], rotary: Any, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any
) -> Any:
    part = parts[module.layer_idx]
    out = hybrid_attention(part, q, k, v, unrotated(q, rotary), unrotated(k, rotary), 8, scaling)
    return out.transpose(1, 2).contiguous(), None


def test_the_closed_form_recovers_a_linear_teacher() -> None:
    model = tiny_model("llama")
    rotary = Target(model).attention_layers[0].rotary
    parts = LinearState.start(Target(model), "elu1", 8, 0, 48, [0, 1]).parts
    random = torch.Generator().manual_seed(0)
    for part in parts.values():
        part.add_readout()
        part.requires_grad_(False).readout += 0.5 * torch.randn(4, 16, 16, generator=random)
    AttentionInterface.register("linear_teacher", functools.partial(_teacher, parts, rotary))
    AttentionMaskInterface.register("linear_teacher", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("linear_teacher")
    result = linearize(model, _tokens(), feature_map="elu1", transfer_steps=0, lora_steps=0, **SMALL)
    assert min(result.start_errors.values()) > 0.1
    assert [stage.name for stage in result.stages] == ["closed form"]
    assert max(result.stages[0].errors.values()) <= 1e-5
    for index, part in parts.items():
        torch.testing.assert_close(result.state.parts[index].readout, part.readout, atol=1e-3, rtol=1e-3)


def test_every_stage_gains_and_the_model_is_untouched() -> None:
    pytest.importorskip("peft")
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    model.train()
    before, wanting = snapshot(model), {name: p.requires_grad for name, p in model.named_parameters()}
    result = linearize(model, _tokens(), transfer_steps=30, lora_steps=30, rank=2, rates=Rates(maps=0.02, factors=0.1, lora=0.01), **SMALL)
    assert_restored(before, model)
    assert model.training and wanting == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.grad is None for p in model.parameters())
    assert [stage.name for stage in result.stages] == ["closed form", "transfer", "recovery"]
    untrained = sum(result.start_errors.values()) / 2
    closed_form, transfer, recovery = result.stages
    assert closed_form.before == untrained > closed_form.after > transfer.after
    assert recovery.after < recovery.before - 0.3
    assert recovery.score is not None and result.start is not None and recovery.score.fresh < result.start.fresh
    assert set(result.state.lora) == {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qkvo"}
    # What was trained is what the patch runs.
    ids = _tokens()[None, :40]
    with torch.no_grad(), patched(model.eval(), LinearAttention(state_dict=result.state), verbose=False):
        loss = torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:]).item()
    assert loss < recovery.before - 0.3
    facts = json.loads(json.dumps(result.to_json()))
    assert facts["layers"] == [0, 1] and facts["stages"][2]["score"]["fresh"] == recovery.score.fresh
    assert result.tables()[0].row_count == 6
    assert result.unpatched is not None and result.unpatched.fresh_ratio == 1 == result.unpatched.streamed_ratio["0-48"]
    # Its streamed figures are those of the whole text, not of pieces as long as the training's.
    nll = stream_nll(model, _tokens()[-150:].long())
    found = by_position(nll, [0, 48, 384])
    assert list(result.unpatched.streamed.values()) == pytest.approx([bucket.perplexity for bucket in found], rel=1e-5)
    with patched(model, StreamingLLM(sinks=0, window=8), verbose=False):
        alone = by_position(stream_nll(model, _tokens()[-150:].long()), [0, 48, 384])
    assert result.window_alone is not None
    assert list(result.window_alone.streamed.values()) == pytest.approx([bucket.perplexity for bucket in alone], rel=1e-5)


@pytest.mark.parametrize("sinks", [0, 3])
def test_the_student_computes_what_the_patch_runs(sinks: int) -> None:
    model = tiny_model("smollm3")  # layers with and without rotation
    target = Target(model)
    state = LinearState.start(target, "hedgehog", 8, sinks, 16, [0, 1])
    student = Student(twin(model), target, state)
    ids = torch.randint(3, 128, (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with student.hybrid() as hybrid:
            mine = hybrid(input_ids=ids, use_cache=False).logits
        softmax = student.model(input_ids=ids, use_cache=False).logits
        assert torch.equal(softmax, model(input_ids=ids, use_cache=False).logits)
        with patched(model, LinearAttention(state_dict=state), verbose=False):
            theirs = model(input_ids=ids, use_cache=False).logits
    assert logit_error(mine, theirs) <= TOLERANCES[torch.float32].logits
    assert logit_error(mine, softmax) > TOLERANCES[torch.float32].differs


class _Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["transfer_loss", "lm_loss"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(run, "_SAVE_EVERY", 2)
    model, options = tiny_model("llama"), dict(transfer_steps=6, lora_steps=6, rank=2, keep_softmax=1, **SMALL)
    whole = linearize(model, _tokens(), **options)
    original, calls = getattr(run, where), []

    def interrupted(*args: Any) -> Any:
        calls.append(args[1].shape)
        # The losses before the recovery's first step are of single texts.
        if sum(shape[0] > 1 for shape in calls) == 6:
            raise _Interrupted
        return original(*args)

    monkeypatch.setattr(run, where, interrupted)
    with pytest.raises(_Interrupted):
        linearize(model, _tokens(), checkpoint=tmp_path / "run.pt", **options)
    n_calls = len(calls)
    resumed = linearize(model, _tokens(), checkpoint=tmp_path / "run.pt", **options)
    assert sum(shape[0] > 1 for shape in calls[n_calls:]) == 2  # four steps of six were in the file
    _same(whole, resumed)
    _same(whole, linearize(model, _tokens(), checkpoint=tmp_path / "run.pt", **options))  # a finished run is only read
    with pytest.raises(PatchError, match=r"belongs to another run \(\{'seed': 0\}\)"):
        linearize(model, _tokens(), checkpoint=tmp_path / "run.pt", seed=1, **options)


def _same(one: Conversion, other: Conversion) -> None:
    a, b = one.state.state_dict(), other.state.state_dict()
    assert a.pop("metadata") == b.pop("metadata") and a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    for left, right in zip(one.stages, other.stages, strict=True):
        assert (left.name, left.before, left.after, left.errors, left.score) == (
            right.name,
            right.before,
            right.after,
            right.errors,
            right.score,
        )
    assert one.kept_softmax == other.kept_softmax


def test_the_worst_layers_keep_their_softmax() -> None:
    model = tiny_model("llama")
    result = linearize(model, _tokens(), transfer_steps=0, lora_steps=0, keep_softmax=1, **SMALL)
    errors = result.stages[0].errors
    worst = max(errors, key=errors.__getitem__)
    assert result.kept_softmax == [worst] and result.state.layers == [1 - worst]


def test_a_conversion_of_nothing_is_the_untrained_state() -> None:
    result = linearize(tiny_model("llama"), _tokens(), closed_form=False, transfer_steps=0, lora_steps=0, layers=[1], **SMALL)
    assert result.stages == [] and result.state.layers == [1] and result.state.parts[1].readout is None
    assert result.start is not None and math.isfinite(result.start.fresh_ratio)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(feature_map="cosine"), ValueError, "feature_map='cosine' is unknown"),
        (dict(window=0), PatchError, "window=0: give at least 1"),
        (dict(layers=[5]), PatchError, "layer 5 has no full attention"),
        (dict(keep_softmax=2), PatchError, "keep_softmax=2 of 2 layers leaves none"),
        (dict(batch=0), PatchError, "batch=0"),
        (dict(lora_steps=-1), PatchError, "lora_steps=-1"),
        (dict(length=4000), PatchError, "fewer than one piece of 4001"),
        (dict(rates=Rates(maps=math.inf)), PatchError, "loss of transfer is nan .* lower rates"),
    ],
)
def test_what_cannot_be_used_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(error, match=message):
        linearize(model, _tokens(), **(SMALL | dict(transfer_steps=3, lora_steps=0) | options))
    assert_restored(before, model)


def test_texts_need_a_tokenizer_and_are_a_list() -> None:
    with pytest.raises(PatchError, match="need the model's tokenizer"):
        linearize(tiny_model("llama"), ["some text"])
    with pytest.raises(PatchError, match="one string: give a list"):
        linearize(tiny_model("llama"), "some text")


def test_models_that_cannot_be_converted_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="rotary frequencies beyond 64 tokens"):
        linearize(tiny_model("llama_dynamic"), _tokens(), window=8, length=100, progress=False)
    with pytest.raises(UnsupportedModel, match="learned positions end at 512"):
        linearize(tiny_model("gpt2"), _tokens(), window=8, length=600, progress=False)
    with pytest.raises(PatchError, match="already has its own window"):
        linearize(tiny_model("mistral"), _tokens(), **SMALL)
    model = tiny_model("llama")
    with patched(model, "streaming(sinks=2, window=6)", verbose=False), pytest.raises(PatchConflict, match="unpatch_model first"):
        patchkit.linearize(model, _tokens(), **SMALL)


def test_the_command_line_converts_and_the_file_loads(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from patchkit.models import load_model

    (tmp_path / "text.txt").write_text("def count(n):\n    return list(range(n))\n" * 120)
    command = ["linearize", "stdlib-1m-draft", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "state.safetensors")]
    command += ["--window", "16", "--length", "64", "--batch", "2", "--transfer-steps", "2", "--lora-steps", "2", "--rank", "2"]
    shown = CliRunner().invoke(app, [*command, "--json"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert [stage["name"] for stage in facts["stages"]] == ["closed form", "transfer", "recovery"]
    assert facts["bytes"] == (tmp_path / "state.safetensors").stat().st_size
    model, _ = load_model("stdlib-1m-draft")
    state = load_state(tmp_path / "state.safetensors", model)
    assert (state.window, state.layers, len(state.lora)) == (16, [0, 1], 8)
    table = CliRunner().invoke(app, [*command, "--lora-steps", "0", "--transfer-steps", "0"])
    assert table.exit_code == 0 and "perplexity" in table.stdout and "relative error of each layer" in table.stdout
    refused = CliRunner().invoke(app, [*command, "--window", "16", "--layers", "9"])
    assert refused.exit_code == 1 and "layer 9" in refused.stderr
