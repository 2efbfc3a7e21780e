"""Patches, drafters, acceptance policies and controllers from outside patchkit: one file each, and they are served like patchkit's own."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import test_contract as contract
import torch
from speculation import FEW, plain_text, text_of

from patchkit import Speculative, available_patches, parse_spec, patch_model, patched
from patchkit.errors import PatchConflict, SpecError
from patchkit.prove.proof import Proof
from patchkit.prove.prove import prove
from patchkit.registered import Registered
from patchkit.speculation import Acceptance, Controller, Drafter, Session, State, statistics_of
from patchkit.speculation.controllers import ControllerSession
from patchkit.testing import tiny_model

ROOT = Path(__file__).resolve().parent.parent
EDITS = (0, 1, 3, 6)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """`example(name)`: the module of an example, imported; what it registers is forgotten afterwards."""
    monkeypatch.setattr("patchkit.patch._registry", dict(available_patches()))
    for kind in (Drafter, Acceptance, Controller):
        monkeypatch.setattr(kind, "_classes", dict(kind.available()))

    def example(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return example


@pytest.mark.parametrize("name", ["hotter", "nearest"])
def test_a_patch_in_one_file_keeps_the_contract(
    name: str, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert name not in available_patches()
    example("write_a_patch")
    assert available_patches()[name].example == name
    for family in ("llama", "gemma3_text"):
        contract.test_a_patch_acts_and_is_gone_when_removed(name, family)
    for edits in EDITS:
        with monkeypatch.context() as inner:
            contract.test_an_exception_half_way_restores(name, edits, inner)
    contract.test_a_saved_patched_model_is_a_stock_checkpoint(name, tmp_path)
    contract.test_the_spec_string_reads_back(name)
    contract.test_typos_are_answered_with_the_nearest_name(name)
    contract.test_patching_twice_is_refused(name)
    contract.test_what_is_no_causal_language_model_is_refused(name)


@pytest.mark.parametrize("spec", ["hotter(temperature=0.8)", "nearest"])  # hotter is better on noise, which is suspicious
def test_a_patch_in_one_file_can_be_proved(spec: str, example: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    example("write_a_patch")
    monkeypatch.setattr("patchkit.prove.prove.timed", lambda *args, **kwargs: None)
    generator = torch.Generator().manual_seed(5)
    documents = [torch.randint(3, 100, (120,), generator=generator) for _ in range(3)]
    proof = Proof(spec, "float32")
    prove(proof, tiny_model("llama"), parse_spec(spec), documents, fast=True)
    assert proof.passed and len(proof.checks) > 5, [f"{check.promise}: {check.detail}" for check in proof.broken]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_drafter_in_one_file_changes_no_text(family: str, batch: int, example: Callable[[str], ModuleType]) -> None:
    with pytest.raises(SpecError, match="unknown draft of speculative 'bigram'"):
        parse_spec("speculative(draft=bigram(longest=4))")
    bigram = example("write_a_drafter").Bigram
    given = Speculative(draft=bigram(4), k=4)
    assert given.spec == "speculative(draft=bigram(longest=4), k=4)" and parse_spec(given.spec) == [given]
    assert parse_spec("speculative(draft=bigram)") == [Speculative(draft="bigram")] == [Speculative(draft=bigram())]
    model = tiny_model(family)
    for patch in (given, "speculative(draft=bigram(4), k=4)", "speculative(draft=[prompt_lookup, bigram], k=4)"):
        with patched(model, patch, verbose=False):
            assert torch.equal(text_of(model, batch, FEW), plain_text(family, batch, new=FEW))
            assert statistics_of(model).proposed > 0
    with pytest.raises(SpecError, match="'bigra', did you mean 'bigram'"):
        patch_model(model, "speculative(draft=bigra(4))")


def test_policies_and_controllers_are_known_by_name(example: Callable[[str], ModuleType]) -> None:
    @dataclass(frozen=True)
    class Lenient(Acceptance, name="lenient"):
        share: float = 0.5

        def accepts(self, scores: torch.Tensor, token: int) -> bool:
            return float((scores <= scores[token]).float().mean()) > self.share

    @dataclass(frozen=True)
    class Alternating(Controller, name="alternating"):
        k: int = 2

        def begin(self) -> ControllerSession:
            return _Alternating(self.k)

    given = parse_spec("speculative(k=alternating(3), acceptance=lenient(share=0.2))")[0]
    assert given == Speculative(k=Alternating(3), acceptance=Lenient(0.2)) == Speculative(k="alternating(3)", acceptance="lenient(0.2)")
    assert given.spec == "speculative(k=alternating(k=3), acceptance=lenient(share=0.2))"
    model = tiny_model("llama")
    with patched(model, given, verbose=False):
        text_of(model, 1, FEW)
        assert {step.k for step in statistics_of(model).steps[:-3]} == {0, 3} and statistics_of(model).acceptance == "lenient(0.2)"


class _Alternating(ControllerSession):
    def __init__(self, k: int) -> None:
        self.k, self.rounds = k, 0

    def choose(self) -> int:
        self.rounds += 1
        return self.k if self.rounds % 2 else 0


@pytest.mark.parametrize("kind", [Drafter, Acceptance, Controller], ids=lambda kind: kind.kind)
def test_names_are_checked_when_a_class_is_defined(kind: type[Registered], example: Callable[[str], ModuleType]) -> None:
    taken = next(iter(kind.available()))
    with pytest.raises(PatchConflict, match=f"the {kind.kind} '{taken}' is patchkit\\..*: register .*Mine under another name"):

        class Mine(kind, name=taken): ...  # type: ignore[misc, valid-type]

    with pytest.raises(ValueError, match="use a Python identifier"):

        class Worse(kind, name="no-word"): ...  # type: ignore[misc, valid-type]

    for _ in range(2):  # a notebook cell that is run again

        class Again(kind, name="again"): ...  # type: ignore[misc, valid-type]

    assert kind.available()["again"] is Again


def test_a_drafter_needs_no_name_and_a_named_one_is_a_frozen_dataclass(example: Callable[[str], ModuleType]) -> None:
    class Unnamed(Drafter):
        def begin(self, model: object, state: State) -> Session:
            raise NotImplementedError

    class Plain(Unnamed, name="plain"):
        pass

    assert Speculative(draft=Unnamed()).spec == "speculative(draft=<Unnamed>)"
    with pytest.raises(SpecError, match=r"plain: .*Plain is not a frozen dataclass: put @dataclass\(frozen=True\) above the class"):
        parse_spec("speculative(draft=plain)")


def test_lossless_asks_the_registry(example: Callable[[str], ModuleType]) -> None:
    example("write_a_patch")
    model = tiny_model("llama")
    patch_model(model, "nearest", lossless=True, verbose=False)
    assert torch.equal(text_of(model, 1, FEW), plain_text("llama", 1, new=FEW)) and statistics_of(model).proposed > 0


@pytest.mark.parametrize(("name", "count"), [("write_a_patch", 1), ("write_a_drafter", 1)])
def test_what_the_guide_shows_is_what_runs(name: str, count: int) -> None:
    guide, code = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    shown = [block for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if block.splitlines()[2] in code]
    assert len(shown) == count
    for block in shown:
        lines = [line.partition("  #")[0].rstrip() for line in block.split("\n\n\n")[0].splitlines()]
        assert all(line in code for line in lines if line.strip())
