"""The contract of every patch (docs/design.md): over the registry and the families, with no list of patches here.

What a patch refuses is in `refusals.REFUSED`; every other family it has to serve.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from refusals import REFUSED, is_refused, refusal
from support import FAMILIES_FAST, fast_first
from transformers import AutoModelForCausalLM

from patchkit import Patch, available_patches, patch_model, report, unpatch_model
from patchkit.errors import PatchConflict, PatchError, SpecError
from patchkit.handle import Handle
from patchkit.patch import Stage
from patchkit.spec import parse_spec
from patchkit.testing import TOLERANCES, assert_restored, families, logit_error, snapshot, tiny_model

PATCHES = [name for name, cls in available_patches().items() if cls.__module__.startswith("patchkit.")]
DIFFERS = TOLERANCES[torch.float32].differs


def small(name: str) -> Patch:
    """The patch with options under which it acts on 30 tokens of a tiny model."""
    return parse_spec(available_patches()[name].example)[0]


def tokens() -> torch.Tensor:
    return torch.randint(4, 100, (1, 30), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=tokens()).logits


SERVED = [(name, family) for name in PATCHES for family in families() if not is_refused(name, family)]
NOT_SERVED = [(name, family) for name in PATCHES for family in families() if is_refused(name, family)]


def in_a_fast_family(case: tuple[str, str]) -> bool:
    return case[1] in FAMILIES_FAST


@pytest.mark.parametrize(("name", "family"), fast_first(SERVED, in_a_fast_family))
def test_a_patch_acts_and_is_gone_when_removed(name, family):
    model = tiny_model(family)
    before, plain = snapshot(model), logits(model)
    patch_model(model, small(name))
    if available_patches()[name].exact:
        assert logit_error(logits(model), plain) <= TOLERANCES[torch.float32].logits
    else:
        assert (logits(model) - plain).abs().max() > DIFFERS
    if available_patches()[name].stage is Stage.GENERATION:
        model.generate(torch.arange(3, 11)[None], max_new_tokens=4, do_sample=False, pad_token_id=0)
    facts = report(model).patches[0]
    assert facts.name == name and sum(facts.changed.values()) > 0 and sum(facts.hits.values()) > 0
    assert unpatch_model(model) is model
    assert_restored(before, model)


@pytest.mark.parametrize(("name", "family"), fast_first(NOT_SERVED, in_a_fast_family))
def test_a_refusal_says_why_and_leaves_no_trace(name, family):
    model = tiny_model(family)
    before = snapshot(model)
    with refusal(name, family):
        patch_model(model, small(name))
    assert_restored(before, model)


def test_most_families_are_served():
    """A table that says of every family that it is refused would leave nothing to test."""
    assert len(families()) >= 25 and REFUSED.keys() <= set(PATCHES)
    for name in PATCHES:
        assert REFUSED.get(name, {}).keys() <= set(families())
        assert sum(not is_refused(name, family) for family in families()) >= 20


@pytest.mark.parametrize("edits", [0, 1, 3, 6])
@pytest.mark.parametrize("name", PATCHES)
def test_an_exception_half_way_restores(name, edits, monkeypatch):
    model = tiny_model("llama")
    before = snapshot(model)
    done = 0

    def failing(method):
        def edit(self, *args, **kwargs):
            nonlocal done
            if done == edits:
                raise RuntimeError("half-way")
            done += 1
            return method(self, *args, **kwargs)

        return edit

    for method in ("pre_hook", "hook", "state_dict_hook", "set_attribute", "on_undo"):
        monkeypatch.setattr(Handle, method, failing(getattr(Handle, method)))
    try:
        patch_model(model, small(name))
    except RuntimeError as error:
        assert str(error) == "half-way"
    else:
        assert 3 < done <= edits  # every patch makes some edits, and none hides a failed one
    monkeypatch.undo()
    if model.__dict__.get("_patchkit"):
        unpatch_model(model)
    assert_restored(before, model)
    patch_model(model, small(name))


@pytest.mark.parametrize("name", PATCHES)
def test_a_saved_patched_model_is_a_stock_checkpoint(name, tmp_path):
    model = tiny_model("llama")
    plain = logits(model)
    patch = small(name)
    if getattr(patch, "mode", None) == "auto":  # which is chosen by timing, so perhaps another one the second time
        patch = dataclasses.replace(patch, mode="weight_only")
    patch_model(model, patch)
    model.save_pretrained(tmp_path)
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    if patch.stage == Stage.WEIGHTS:  # it is the patched model that was saved: what it loads, patched again, is that
        plain = logits(model)
        patch_model(again, patch)
    assert torch.equal(logits(again.eval()), plain)
    assert "patchkit" not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("name", PATCHES)
def test_the_spec_string_reads_back(name):
    assert parse_spec(small(name).spec)[0] == small(name)


@pytest.mark.parametrize("name", PATCHES)
def test_typos_are_answered_with_the_nearest_name(name):
    model = tiny_model("llama")
    before = snapshot(model)
    with pytest.raises(SpecError, match=name):
        patch_model(model, name[:-1] + "x")
    for field in dataclasses.fields(available_patches()[name]):
        with pytest.raises(SpecError, match=field.name):
            patch_model(model, f"{name}({field.name}x=1)")
    assert_restored(before, model)


@pytest.mark.parametrize("name", PATCHES)
def test_patching_twice_is_refused(name):
    model = tiny_model("llama")
    patch_model(model, small(name))
    expected = logits(model)
    with pytest.raises(PatchConflict):
        patch_model(model, small(name))
    assert torch.equal(logits(model), expected)
    unpatch_model(model)
    with pytest.raises(PatchConflict):
        patch_model(model, small(name), small(name))
    with pytest.raises(PatchConflict):
        unpatch_model(model)


@pytest.mark.parametrize("name", PATCHES)
def test_what_is_no_causal_language_model_is_refused(name):
    with pytest.raises(PatchError):
        patch_model(torch.nn.Linear(2, 2), small(name))
    with pytest.raises(PatchError):
        patch_model(tiny_model("llama").model, small(name))
