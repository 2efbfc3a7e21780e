"""Calls of generate that a patch cannot serve, or only with care: their texts are the unpatched model's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import cached
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

from patchkit import patch_model, report, unpatch_model
from patchkit.errors import StreamError
from patchkit.models import load_model
from patchkit.testing import tiny_model

IDS = torch.arange(12)[None] % 5 * 7 + 5
SPECULATIVE = "speculative(k=4)"
EVERY = [SPECULATIVE, "streaming(sinks=2, window=60)", "linear(window=60)", "compile(backend=eager)", "mlp_int8(mode=weight_only)"]


def pair(spec: str, family: str = "llama") -> tuple[Any, Any]:
    """An unpatched model, and the same patched."""
    return tiny_model(family), patch_model(tiny_model(family), spec, verbose=False)


def texts(models: tuple[Any, Any], ids: torch.Tensor = IDS, **options: Any) -> list[torch.Tensor]:
    options = {"max_new_tokens": 20, "do_sample": False, **options}
    return [model.generate(input_ids=ids, **options) for model in models]


@pytest.mark.parametrize("spec", EVERY[:4])
@pytest.mark.parametrize("rows", [1, 3])
def test_neither_eos_nor_pad(spec, rows):
    models = pair(spec)
    for model in models:
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        model.config.eos_token_id = model.config.pad_token_id = None
    ids = torch.cat([IDS + 3 * row for row in range(rows)])
    plain, found = texts(models, ids)
    assert torch.equal(plain, found)


class _LastScore(StoppingCriteria):
    """Stops where the last step was sure of itself; keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(float(scores[-1].max()))
        return torch.full((len(input_ids),), len(self.seen) >= 9, dtype=torch.bool)


def test_a_criterion_that_reads_the_scores_sees_those_of_plain_decoding():
    seen = []
    for model in pair(SPECULATIVE):
        criterion = _LastScore()
        model.generate(
            input_ids=IDS, max_new_tokens=20, do_sample=False, stopping_criteria=StoppingCriteriaList([criterion]),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        seen.append(criterion.seen)
    assert len(seen[0]) == 9 and seen[0] == pytest.approx(seen[1], abs=1e-4)


def test_stop_strings_on_a_batch_without_eos_go_on_as_the_stock_method_does():
    model, tokenizer = load_model("stdlib-1m-draft")
    model.generation_config.eos_token_id = None
    ids = torch.tensor([tokenizer("def f(x):\n    return x\n")["input_ids"][:6], tokenizer("import os\nimport sys\n")["input_ids"][:6]])
    options = dict(max_new_tokens=24, do_sample=False, stop_strings=["\n"], tokenizer=tokenizer)
    plain = model.generate(input_ids=ids, **options)
    patch_model(model, SPECULATIVE, verbose=False)
    assert torch.equal(model.generate(input_ids=ids, **options), plain)
    assert "without an EOS token" in " ".join(report(model).patches[0].warnings)


@pytest.mark.parametrize("spec", ["linear(window=60)", "compile(backend=eager)", "streaming(sinks=2, window=60)"])
def test_a_tokenizer_among_the_arguments_disturbs_nobody(spec):
    model, tokenizer = load_model("stdlib-1m-draft")
    ids = torch.tensor([tokenizer("def f(x):\n    return")["input_ids"]])
    options = dict(max_new_tokens=24, do_sample=False, stop_strings=["zzzz"], tokenizer=tokenizer)
    plain = model.generate(input_ids=ids, **options)
    patch_model(model, spec, verbose=False)
    assert torch.equal(model.generate(input_ids=ids, **options), plain)
    if spec.startswith("compile"):
        assert report(model).patches[0].hits["compiled steps"] > 0


def test_a_static_cache_of_the_users_is_for_the_stock_method():
    plain, model = pair(SPECULATIVE)
    found = [
        m.generate(input_ids=IDS, max_new_tokens=20, do_sample=False, **cached(StaticCache(config=m.config, max_cache_len=40)))
        for m in (plain, model)
    ]
    assert torch.equal(*found)
    hits = report(model).patches[0].hits  # whether a static cache takes tokens back depends on transformers
    assert hits.get("stock calls") == 1 or hits["rounds"] > 0


class _Shifted:
    """A `prepare_inputs_for_generation` that changes what the model is fed."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = type(self.model).prepare_inputs_for_generation(self.model, input_ids, **kwargs)
        inputs["input_ids"] = (inputs["input_ids"] + 1) % 100
        return inputs


@pytest.mark.parametrize("on_class", [True, False])
def test_inputs_prepared_by_somebody_else_are_not_passed_over(on_class):
    plain, model = pair(SPECULATIVE)
    before = texts((plain, model))
    for each in (plain, model):
        if on_class:
            own = type(each)
            each.__class__ = type(own.__name__, (own,), {"prepare_inputs_for_generation": _shifted})
        else:
            each.prepare_inputs_for_generation = _Shifted(each)
    after = texts((plain, model))
    assert torch.equal(*before) and torch.equal(*after) and not torch.equal(before[0], after[0])


def _shifted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
    inputs = super(type(self), self).prepare_inputs_for_generation(input_ids, **kwargs)
    inputs["input_ids"] = (inputs["input_ids"] + 1) % 100
    return inputs


@pytest.mark.parametrize("spec", ["streaming(sinks=2, window=60)", "linear(window=60)", "streaming(sinks=2, window=60) + speculative"])
def test_continuous_batching_is_refused_by_name(spec):
    _, model = pair(spec)
    if not hasattr(model, "generate_batch"):
        pytest.skip("this transformers has no generate_batch")
    with pytest.raises(StreamError, match=r"generate_batch.*unpatch_model"):
        model.generate_batch([IDS[0].tolist()])


def test_lossless_takes_any_draft_that_rolls_back():
    """int8 rounds more than the target may, and only drafts."""
    model, tokenizer = load_model("bundled")
    ids = torch.tensor([tokenizer("def parse(text):\n    ")["input_ids"]])
    plain = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False)
    for mode in ("weight_only", "dynamic"):
        patch_model(model, f"mlp_int8(mode={mode})", lossless=True, verbose=False)
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=24, do_sample=False), plain)
        unpatch_model(model)


def test_models_that_share_a_config_are_unpatched_in_any_order():
    for spec in EVERY:
        for order in ((0, 1), (1, 0)):
            first = tiny_model("llama")
            models = [first, type(first)(first.config).eval()]
            before = copy.deepcopy(vars(first.config))
            for model in models:
                patch_model(model, spec, verbose=False)
            unpatch_model(models[order[0]])
            models[order[1]].generate(input_ids=IDS, max_new_tokens=4, do_sample=False)  # still patched, and still works
            unpatch_model(models[order[1]])
            assert vars(first.config) == before, (spec, order)
