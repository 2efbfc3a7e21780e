"""The start-up self-check names what is wrong, and the version."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.generation import GenerationMixin

from patchkit import _compat
from patchkit._compat.declared import check_when_used
from patchkit.errors import PatchError


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    _compat.self_check.cache_clear()
    yield
    _compat.self_check.cache_clear()


def test_the_installed_versions_pass() -> None:
    assert _compat.wrong_versions() == []
    assert _compat.changed_names() == []
    _compat.self_check()


def test_the_check_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _compat.self_check()
    monkeypatch.setattr("patchkit._compat.versions.wrong_versions", lambda: pytest.fail("checked twice"))
    _compat.self_check()


@pytest.mark.parametrize(
    ("library", "version"),
    [
        ("transformers", "5.15.0"),
        ("transformers", "5.23.1.dev0"),
        ("transformers", "5.24.0.dev0"),
        ("transformers", "5.24.7"),
        ("torch", "2.8.0+cpu"),
        ("torch", "2.13.0a0+git123"),
    ],
)
def test_versions_that_are_tested_need_no_remark(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, library: str, version: str
) -> None:
    monkeypatch.setattr({"transformers": transformers, "torch": torch}[library], "__version__", version)
    _compat.self_check()
    assert library not in caplog.text


@pytest.mark.parametrize("newer", ["{major}.{next_minor}.0.dev0", "{next_major}.0.0"])
@pytest.mark.parametrize("library", ["transformers", "torch"])
def test_newer_versions_are_used_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, library: str, newer: str
) -> None:
    major, minor = map(int, _compat.TESTED[library].split("."))
    version = newer.format(major=major, next_minor=minor + 1, next_major=major + 1)
    monkeypatch.setattr({"transformers": transformers, "torch": torch}[library], "__version__", version)
    _compat.self_check()
    (warned,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert f"{library} {version} (tested up to {_compat.TESTED[library]})" in warned.getMessage()
    assert "patchkit prove" in warned.getMessage()


@pytest.mark.parametrize(("library", "version"), [("transformers", "5.14.2"), ("transformers", "5.15.0.dev0"), ("torch", "2.7.1")])
def test_older_versions_are_refused(monkeypatch: pytest.MonkeyPatch, library: str, version: str) -> None:
    monkeypatch.setattr({"transformers": transformers, "torch": torch}[library], "__version__", version)
    with pytest.raises(PatchError, match=rf"cannot run on {library} {version}, needs .*pip install"):
        _compat.self_check()


def test_a_failed_check_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setattr(transformers, "__version__", "4.0.0")
        with pytest.raises(PatchError):
            _compat.self_check()
    _compat.self_check()


def update_as_in_5_2(self: Any, key_states: Any, value_states: Any, cache_kwargs: Any = None) -> None: ...


def test_missing_and_changed_names_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheLayerMixin, "update", update_as_in_5_2)
    monkeypatch.delattr(DynamicLayer, "crop")
    monkeypatch.delattr(GenerationMixin, "_prepare_cache_for_generation")
    with pytest.raises(PatchError) as caught:
        _compat.self_check()
    message = str(caught.value)
    assert f"transformers {transformers.__version__}" in message
    assert (
        "CacheLayerMixin.update takes (self, key_states, value_states, cache_kwargs), expected (self, key_states, value_states, args"
        in message
    )
    assert "transformers.cache_utils.DynamicLayer.crop is missing" in message
    assert "GenerationMixin._prepare_cache_for_generation is missing" in message


@pytest.mark.parametrize(
    ("path", "wanted", "problem"),
    [
        ("torch.nn:Module()._buffers", None, None),
        ("torch.nn:Module()._no_such", None, "torch.nn.Module()._no_such is missing"),
        ("torch.nn:Linear().weight", None, "torch.nn.Linear().weight is missing"),  # no instance without arguments
        ("transformers:GenerationConfig._pad_token_tensor", None, None),  # annotated only
        ("transformers:GenerationConfig._no_such", None, "transformers.GenerationConfig._no_such is missing"),
        ("no_such_library:name", None, "no_such_library.name is missing"),
        ("transformers.generation:GenerationMixin.generate", frozenset({"custom_generate"}), None),
        (
            "transformers.generation:GenerationMixin.generate",
            frozenset({"custom_generate", "no_such"}),
            "transformers.generation.GenerationMixin.generate(no_such=) is missing",
        ),
        ("torch.nn:Module.eval", ("self",), None),
        ("torch.nn:Module.eval", (), "torch.nn.Module.eval takes (self), expected ()"),
    ],
)
def test_each_form_of_a_declared_name(path: str, wanted: Any, problem: str | None) -> None:
    assert _compat.changed_names({path: wanted}) == ([] if problem is None else [problem])


@pytest.mark.parametrize("module", [path.stem for path in sorted(Path(_compat.__file__).parent.glob("[!_]*.py"))])
def test_a_name_that_any_module_declares_is_checked(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module(f"patchkit._compat.{module}"), "RELIED_ON", {"torch:_planted": None}, raising=False)
    with pytest.raises(PatchError, match=r"torch\._planted is missing.*pip install"):
        _compat.self_check()


@pytest.mark.parametrize(("module", "library"), [("compiler", "torch"), ("torchao", "torchao"), ("peft", "peft"), ("lm_eval", "lm_eval")])
def test_names_of_optional_libraries_are_checked_when_they_are_used(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    check_when_used.cache_clear()
    with monkeypatch.context() as context:
        context.setattr(f"patchkit._compat.{module}.RELIED_ON_WHEN_USED", {f"{library}:_planted": None})
        _compat.self_check()
        with pytest.raises(PatchError, match=rf"^{library} {re.escape(version(library))} .*{library}\._planted is missing\. Install it$"):
            check_when_used(module, library, "Install it")
    check_when_used(module, library, "Install it")


def test_kernels_load_no_transformers() -> None:
    code = "import sys, patchkit.kernels.int8_linear, patchkit.int8.weight; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_import_without_a_name_says_which_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS")
    monkeypatch.delitem(sys.modules, "patchkit._compat.names")
    with pytest.raises(PatchError, match=rf"transformers {transformers.__version__} .*ALL_MASK_ATTENTION_FUNCTIONS.*pip install"):
        importlib.import_module("patchkit._compat.names")


def test_compiled_calls_are_set_aside_and_come_back() -> None:
    model = SimpleNamespace(_compiled_call_impl="compiled", other=1)
    calls = _compat.CompiledCalls(model)
    assert calls.set_aside()
    assert vars(model) == {"other": 1}
    model._compiled_call = "compiled since"
    calls.restore()
    assert vars(model) == {"other": 1, "_compiled_call_impl": "compiled"}


def test_what_generate_compiled_needs_no_remark() -> None:
    model = SimpleNamespace(_compiled_call="by generate", _last_compile_config="config")
    calls = _compat.CompiledCalls(model)
    assert not calls.set_aside()
    assert vars(model) == {}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda calls: pickle.loads(pickle.dumps(calls))])
def test_a_copy_has_nothing_to_put_back(duplicate: Any) -> None:
    calls = _compat.CompiledCalls(SimpleNamespace(_compiled_call_impl="compiled"))
    calls.set_aside()
    twin = duplicate(calls)
    twin.restore()
    assert vars(twin._model) == {}
    assert twin._model is not calls._model
