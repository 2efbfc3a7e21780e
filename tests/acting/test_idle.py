"""A patch that is idle in a call that it should have served says so once, by the reason; or the call is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from patchkit import patch, patch_model, report, unpatch_model
from patchkit._compat import CACHE
from patchkit.attention_function import attention_patch
from patchkit.errors import StreamError
from patchkit.testing import TOLERANCES, logit_error, tiny_model

STREAMING = "streaming(sinks=2, window=6)"
LINEAR = "linear(window=6)"
COMPILE = "compile(backend=eager)"


def prompt(tokens: int = 20) -> torch.Tensor:
    return torch.randint(5, 90, (1, tokens), generator=torch.Generator().manual_seed(1))


def generated(model: Any, new: int = 8, **kwargs: Any) -> Any:
    return model.generate(prompt(), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **kwargs)


def assert_said_once(model: Any, caplog: pytest.LogCaptureFixture, words: str) -> None:
    lines = [record.message for record in caplog.records if words in record.message and record.levelno == logging.WARNING]
    assert len(lines) == 1, [record.message for record in caplog.records]
    (facts,) = report(model).patches
    (warning,) = (warning for warning in facts.warnings if words in warning)
    assert any(warning in line for line in str(report(model)).splitlines() if line.startswith("warning: "))


@pytest.mark.parametrize("spec", [STREAMING, LINEAR])
def test_a_model_in_training_mode(spec: str, caplog: pytest.LogCaptureFixture) -> None:
    plain, model = tiny_model("llama").train(), patch_model(tiny_model("llama").train(), spec)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(input_ids=prompt(), use_cache=False).logits, plain(input_ids=prompt(), use_cache=False).logits)
    assert_said_once(model, caplog, "training mode")


def test_training_itself_is_not_spoken_of(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(tiny_model("llama").train(), STREAMING)
    model(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
    assert not any(report(model).patches[0].warnings.values())


@pytest.mark.parametrize(
    ("spec", "words"),
    [(STREAMING, "use_cache=False"), (LINEAR, "use_cache=False"), (COMPILE, "use_cache=False"), ("speculative", "without a cache")],
)
def test_generate_without_a_cache(spec: str, words: str, caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(tiny_model("llama"), spec)
    for _ in range(2):
        generated(model, use_cache=False)
    assert_said_once(model, caplog, words)


def test_compile_acts_in_training_mode() -> None:
    model = patch_model(tiny_model("llama").train(), COMPILE)
    generated(model)
    facts = report(model).patches[0]
    assert facts.hits["compiled steps"] == 7 and not facts.warnings


def test_compile_with_a_cache_of_another_kind(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(tiny_model("llama"), COMPILE)
    generated(model, **{CACHE: DynamicCache(config=model.config)})
    assert_said_once(model, caplog, "they are given a DynamicCache")


def test_compile_where_every_forward_has_several_tokens(caplog: pytest.LogCaptureFixture) -> None:
    """As with transformers' own assisted generation, whose forwards verify several tokens at once."""
    model, cache = patch_model(tiny_model("llama"), COMPILE), None
    with torch.no_grad():
        for _ in range(20):
            cache = model(input_ids=prompt(3), use_cache=True, **{CACHE: cache})[CACHE]
    assert_said_once(model, caplog, "none of them of one token with a cache")


def test_a_few_eager_forwards_are_nothing_to_speak_of() -> None:
    model = patch_model(tiny_model("llama"), COMPILE)
    with torch.no_grad():
        for _ in range(30):
            model(input_ids=prompt(40), use_cache=False)  # a scoring run
    generated(model)
    assert not any(report(model).patches[0].warnings.values())


def test_speculative_without_anything_to_propose(caplog: pytest.LogCaptureFixture) -> None:
    """Every token of the text is new, so that there is no earlier place to copy from."""
    from patchkit.patches.speculative import Speculative
    from patchkit.speculation.drafters.prompt_lookup import PromptLookup

    model = patch_model(tiny_model("llama"), Speculative(draft=PromptLookup(max_ngram=64, min_ngram=64), k=4))
    generated(model, new=40)
    assert_said_once(model, caplog, "had nothing to propose")


def test_speculative_with_no_drafts_wanted() -> None:
    model = patch_model(tiny_model("llama"), "speculative(k=0)")
    generated(model, new=40)
    assert not any(report(model).patches[0].warnings.values())


def test_int8_layers_that_were_given_other_weights(caplog: pytest.LogCaptureFixture) -> None:
    model = patch_model(tiny_model("llama"), "mlp_int8(mode=weight_only)")
    layer = model.model.layers[0].mlp.down_proj
    layer.weight = nn.Parameter(torch.zeros(layer.out_features, layer.in_features))
    generated(model)
    assert_said_once(model, caplog, "1 of 6 layers were given another weight")


# -- attention implementations that are set after the patch ------------------------------------------------------------------


def last_three(module, query, key, value, attention_mask, scaling=None, **kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5) + attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def own_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch of one attention function, for the length of a test."""
    monkeypatch.setattr(patch, "_registry", dict(patch.available_patches()))
    attention_patch("idle_last_three", mask=lambda batch, head, query, key: key > query - 3)(last_three)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("spec", [STREAMING, LINEAR, "idle_last_three"])
def test_another_attention_implementation_is_refused(spec: str, implementation: str, own_patch: None) -> None:
    model, plain = patch_model(tiny_model("llama"), spec), tiny_model("llama")
    with torch.no_grad():
        ours, unpatched = model(input_ids=prompt()).logits, plain(input_ids=prompt()).logits
        assert logit_error(ours, unpatched) > TOLERANCES[torch.float32].logits  # the rule matters on this text
        model.set_attn_implementation(implementation)
        with pytest.raises(StreamError, match=rf"set to '{implementation}' after .* unpatch_model, set it"):
            model(input_ids=prompt())
        unpatch_model(model)
        model.set_attn_implementation(implementation)
        assert logit_error(patch_model(model, spec)(input_ids=prompt()).logits, ours) <= TOLERANCES[torch.float32].logits
