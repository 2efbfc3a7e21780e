"""The names of transformers that change between versions: which are used, and what is said where one is missing or new."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache, LlamaForCausalLM

from patchkit import _compat, patch_model
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.testing import tiny_model


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    _compat.self_check.cache_clear()
    yield
    _compat.self_check.cache_clear()


def test_the_cache_is_called_what_this_version_calls_it() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        out = model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    assert _compat.CACHE in out and isinstance(_compat.cache_of(out), DynamicCache)
    assert _compat.CACHE in _compat.argument_names(model) and _compat.CACHE in _compat.argument_names(model.model)
    assert (_compat.CACHE == "cache") == (tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24))


def test_a_cache_under_its_old_name_is_found() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    assert _compat.by_name(model, (), {"past_key_values": cache}) == {_compat.CACHE: cache}
    assert _compat.by_name(model, (), {_compat.CACHE: cache}) == {_compat.CACHE: cache}
    assert _compat.cache_given({"past_key_values": cache}) is cache and _compat.cache_given({_compat.CACHE: cache}) is cache


class OldCode(LlamaForCausalLM):
    """A model whose own code says past_key_values, as code on the hub does."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:  # type: ignore[override]
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **{_compat.CACHE: past_key_values}, **kwargs)


@pytest.mark.skipif(_compat.CACHE == "past_key_values", reason="this transformers uses that name")
def test_code_with_the_old_name_only_is_refused_by_name() -> None:
    model = OldCode(tiny_model("llama").config).eval()
    with pytest.raises(UnsupportedModel, match="OldCode takes its cache as past_key_values, which is called cache since"):
        patch_model(model, "streaming(window=24)")


@pytest.mark.parametrize(
    ("version", "said"), [("5.24.0", False), ("5.24.3", False), ("5.25.0", True), ("5.25.0.dev0", True), ("6.0.0", True), ("5.15.0", False)]
)
def test_newer_versions_are_used_with_a_warning(
    version: str, said: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    patch_model(tiny_model("llama"), "streaming(window=24)", verbose=False)
    patch_model(tiny_model("llama"), "streaming(window=24)", verbose=False)
    lines = [record.message for record in caplog.records if f"not tested on transformers {version} (tested up to" in record.message]
    assert len(lines) == said and all(record.levelno == logging.WARNING for record in caplog.records if record.message in lines)


def test_a_fact_about_instances_that_no_longer_holds_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.GenerationConfig, "__annotations__", {})
    with pytest.raises(PatchError, match=r"GenerationConfig\._pad_token_tensor is missing"):
        _compat.self_check()


def one(self: Any, query_length: int) -> None: ...
def optional(self: Any, query_length: int, more: int = 0, *, another: Any = None, **kwargs: Any) -> None: ...
def required(self: Any, query_length: int, more: int) -> None: ...
def renamed(self: Any, length: int) -> None: ...


@pytest.mark.parametrize(("found", "right"), [(one, True), (optional, True), (required, False), (renamed, False)])
def test_an_argument_that_was_added_is_no_change_unless_it_is_required(found: Any, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.cache_utils.CacheLayerMixin.get_mask_sizes", found)
    if right:
        _compat.self_check()
        return
    with pytest.raises(PatchError, match=r"CacheLayerMixin.get_mask_sizes takes .*, expected "):
        _compat.self_check()
