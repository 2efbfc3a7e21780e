"""Every patch acts, on every version of transformers: these tests run on the oldest, the pinned and the newest one.

A version that renames an argument makes a patch idle without an error, so counters are compared with what the call must have come to.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import pipeline

from patchkit import available_patches, patch_model, report, unpatch_model
from patchkit._compat import CACHE, cache_of
from patchkit.models import load_model
from patchkit.testing import tiny_model

SINKS, WINDOW = 2, 6  # of the examples of streaming and linear
PATCHES = [name for name, cls in available_patches().items() if cls.__module__.startswith("patchkit.")]
FAMILIES = ["llama", "gpt_neox", "gemma3_text", "mixtral"]
PROMPT, NEW = 20, 24
IN_GENERATE = ("speculative", "prefix_cache")  # patches that act in generate only


@pytest.fixture(autouse=True)
def nothing_deprecated(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """patchkit itself uses no name that this transformers is about to remove."""
    library = logging.getLogger("transformers")
    library.addHandler(caplog.handler)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is deprecated and will be removed.*")
        yield
    library.removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "are deprecated. Use" in record.message]


def prompt(rows: int = 1, tokens: int = PROMPT) -> torch.Tensor:
    """Tokens that repeat themselves, so that prompt lookup has something to propose."""
    start = torch.arange(rows)[:, None] + 5
    return start + (torch.arange(tokens)[None] % 5) * 7


def patched(name: str, family: str) -> Any:
    return patch_model(tiny_model(family), available_patches()[name].example, verbose=False)


def hits(model: Any) -> dict[str, int]:
    return report(model).patches[0].hits


def assert_acted(name: str, model: Any, fed: int, steps: int, rounds: int) -> None:
    """The counters are those of ``fed`` tokens in ``steps`` forwards of one token after the prompt, in ``rounds`` calls of generate."""
    found = hits(model)
    if name == "compile":
        assert found["compiled steps"] == steps
    elif name == "streaming":
        assert found["tokens evicted"] == fed - rounds * (SINKS + WINDOW)
    elif name == "linear":
        assert found["tokens taken into the state"] > 0
    elif name == "speculative":
        assert found["proposed"] > 0 and found["rounds"] > 0 and "stock calls" not in found
    elif name == "prefix_cache":
        assert found.get("lookups", 0) + found.get("left alone", 0) >= rounds
    else:
        assert any(found.get(counter) for counter in (available_patches()[name].acts or found))
    if name == "prefix_cache" and found.get("left alone"):  # it says so
        return
    assert not any(report(model).patches[0].warnings.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", PATCHES)
def test_generate(name: str, family: str) -> None:
    model = patched(name, family)
    output = model.generate(prompt(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert output.shape[1] == PROMPT + NEW
    assert_acted(name, model, fed=PROMPT + NEW - 1, steps=NEW - 1, rounds=1)
    unpatch_model(model)


@pytest.mark.parametrize("name", PATCHES)
def test_generate_with_the_cache_of_an_earlier_call(name: str) -> None:
    model = patched(name, "llama")
    options: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
    first = model.generate(prompt(), **options)
    more = torch.cat([first.sequences, prompt()], 1)
    second = model.generate(more, **{CACHE: cache_of(first)}, **options)
    assert second.sequences.shape[1] == 2 * (PROMPT + NEW)
    assert_acted(name, model, fed=2 * (PROMPT + NEW) - 1, steps=2 * (NEW - 1), rounds=1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", PATCHES)
def test_a_loop_of_forwards(name: str, rows: int) -> None:
    """With the name that this transformers uses for the cache."""
    model, ids = patched(name, "llama"), prompt(rows)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        for _ in range(NEW):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **{CACHE: cache_of(out)})
    if name not in IN_GENERATE:
        assert_acted(name, model, fed=PROMPT + NEW, steps=NEW, rounds=1)


@pytest.mark.filterwarnings("ignore:.*past_key_values")
@pytest.mark.parametrize("name", PATCHES)
def test_a_loop_with_the_old_name_of_the_cache(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Users' code says past_key_values for as long as transformers takes it."""
    model, ids = patched(name, "llama"), prompt()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model(input_ids=ids, use_cache=True)
        for _ in range(NEW):
            out = model(input_ids=out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)
    caplog.clear()
    if name not in IN_GENERATE:
        assert_acted(name, model, fed=PROMPT + NEW, steps=NEW, rounds=1)


@pytest.mark.parametrize("name", PATCHES)
def test_a_left_padded_batch(name: str) -> None:
    model, ids = patched(name, "llama"), prompt(3)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert_acted(name, model, fed=PROMPT + NEW - 1, steps=NEW - 1, rounds=1)


@pytest.mark.parametrize("name", PATCHES)
def test_pipeline(name: str) -> None:
    """As somebody uses it who never sees a cache; on the bundled model, since it needs a tokenizer."""
    model, tokenizer = load_model("bundled")
    patch_model(model, available_patches()[name].example, verbose=False)
    text = "import os\nimport os\nimport os\nimport"
    generate: Callable[..., Any] = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (answer,) = generate(text, max_new_tokens=NEW, do_sample=False)
    assert answer["generated_text"].startswith(text)
    found = hits(model)
    assert any(found.get(counter) for counter in (available_patches()[name].acts or found))


def test_patches_together() -> None:
    model = patch_model(
        tiny_model("llama"), f"streaming(sinks={SINKS}, window={WINDOW}) + mlp_int8 + compile(backend=eager)", verbose=False
    )
    model.generate(prompt(), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    by_name = {each.name: each.hits for each in report(model).patches}
    assert by_name["streaming"]["tokens evicted"] == PROMPT + NEW - 1 - SINKS - WINDOW
    assert by_name["compile"]["compiled steps"] == NEW - 1 and by_name["mlp_int8"]["forwards"] == NEW
