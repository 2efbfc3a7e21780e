"""The registry of patches and the spec strings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from patchkit import patch as patch_module
from patchkit.errors import PatchConflict, PatchError, SpecError
from patchkit.patch import Patch, Stage, available_patches, register_patch
from patchkit.spec import parse_spec


@dataclass(frozen=True)
class Dummy(Patch):
    stage = Stage.ATTENTION

    size: int = 8
    mode: str = "cache"
    layers: object = None
    fast: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: give at least 1")


@dataclass(frozen=True)
class NeedsDraft(Patch):
    stage = Stage.GENERATION
    example = "t_needs_draft(draft=small)"

    draft: object
    tags: list[str] = field(default_factory=list)


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two dummies beside the real patches, for one test."""
    monkeypatch.setattr(patch_module, "_registry", dict(available_patches()))
    register_patch("t_dummy")(Dummy)
    register_patch("t_needs_draft")(NeedsDraft)


def test_discovery_finds_the_patches_of_the_folder() -> None:
    assert available_patches()["streaming"].__module__ == "patchkit.patches.streaming"
    assert list(available_patches()) == sorted(available_patches())


def test_the_result_of_discovery_is_a_copy() -> None:
    available_patches().clear()
    assert "t_dummy" in available_patches()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("t_dummy", [Dummy()]),
        ("t_dummy()", [Dummy()]),
        ("  t_dummy ( size = 3 )  ", [Dummy(size=3)]),
        ("t_dummy(size=3, mode=true)", [Dummy(size=3, mode="true")]),
        ("t_dummy(mode='two words')", [Dummy(mode="two words")]),
        ('t_dummy(mode="a + b")', [Dummy(mode="a + b")]),
        ("t_dummy(layers=[0, 1, -1])", [Dummy(layers=[0, 1, -1])]),
        ("t_dummy(layers=(0,))", [Dummy(layers=(0,))]),
        ("t_dummy(layers=[a, 'b c', 2.5, None])", [Dummy(layers=["a", "b c", 2.5, None])]),
        ("t_dummy(layers=None, fast=False)", [Dummy(fast=False)]),
        ("t_dummy(fast=False, layers=[1], mode=x, size=3)", [Dummy(size=3, mode="x", layers=[1], fast=False)]),
        ("t_dummy(layers={'a': 1e-3})", [Dummy(layers={"a": 1e-3})]),
        ("t_dummy + t_needs_draft(draft=small)", [Dummy(), NeedsDraft("small")]),
        ("t_needs_draft(draft='org/name')\n  + t_dummy(\n size=3)", [NeedsDraft("org/name"), Dummy(size=3)]),
    ],
)
def test_specs_are_read(text: str, expected: list[Patch]) -> None:
    assert parse_spec(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty spec: .*available: .*t_dummy"),
        ("  \n", "empty spec"),
        ("t_dumy", "unknown patch 't_dumy', did you mean 't_dummy'\\? available: .*t_dummy, t_needs_draft"),
        ("zzz", "unknown patch 'zzz': available: "),
        ("t_dummy(sise=3)", "unknown option of t_dummy 'sise', did you mean 'size'\\? available: size, mode, layers, fast"),
        ("t_dummy(size=0)", "t_dummy\\(size=0\\): size=0: give at least 1"),
        ("t_dummy(size=word)", "t_dummy\\(size=word\\): .*not supported between"),
        ("t_dummy(fast=false)", "t_dummy: fast=false must be True or False"),
        ("t_dummy(3)", "t_dummy: '3' is given without its option's name: write t_dummy\\(option=value\\)"),
        ("t_dummy(*size)", "'\\*size' is given without"),
        ("t_dummy(**size)", "'\\*\\*' is not allowed"),
        ("t_dummy(size=1, size=2)", "option 'size' is given twice"),
        ("t_dummy(size=1+1)", "size=1 \\+ 1 is not a literal"),
        ("t_dummy(size=open('x'))", "is not a literal"),
        ("t_dummy(mode=org/name)", "mode=org / name is not a literal: .*quoted string"),
        ("t_needs_draft", "t_needs_draft: .*draft"),
        ("t_dummy(", "cannot read the spec"),
        ("t_dummy +", "cannot read the spec"),
        ("t_dummy(mode=1b)", "cannot read the spec.*quote values"),
        ("t_dummy - t_dummy", "is not a patch: join patches with '\\+'"),
        ("t_dummy, t_needs_draft", "is not a patch: join patches with"),
        ("t_dummy.size", "is not a patch"),
        ("'t_dummy'", "is not a patch"),
        ("t_dummy\0", "cannot read the spec"),
    ],
)
def test_bad_specs_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(text)


def test_a_spec_error_is_a_value_error_and_a_patch_error() -> None:
    with pytest.raises(ValueError) as caught:
        parse_spec("t_dummy(size=0)")
    assert isinstance(caught.value, PatchError)
    assert isinstance(caught.value.__cause__, ValueError)


@pytest.mark.parametrize(
    ("given", "spec"),
    [
        (Dummy(), "t_dummy"),
        (Dummy(size=8, mode="cache"), "t_dummy"),
        (Dummy(size=3, fast=False), "t_dummy(size=3, fast=False)"),
        (Dummy(mode="two words"), "t_dummy(mode='two words')"),
        (Dummy(mode="None"), "t_dummy(mode='None')"),
        (Dummy(layers=[0, "a b", None]), "t_dummy(layers=[0, 'a b', None])"),
        (Dummy(layers=(0,)), "t_dummy(layers=(0,))"),
        (Dummy(layers=1.0), "t_dummy(layers=1.0)"),
        (Dummy(layers=()), "t_dummy(layers=())"),
        (NeedsDraft("small"), "t_needs_draft(draft=small)"),
        (NeedsDraft("org/name", ["x"]), "t_needs_draft(draft='org/name', tags=[x])"),
    ],
)
def test_the_spec_of_a_patch_reads_back(given: Patch, spec: str) -> None:
    assert given.spec == spec
    assert parse_spec(spec) == [given]


def test_a_one_that_replaces_true_is_not_the_default() -> None:
    assert Dummy(fast=1).spec == "t_dummy(fast=1)"  # type: ignore[arg-type]


def test_an_option_without_a_literal_shows_its_class() -> None:
    assert NeedsDraft(draft=object()).spec == "t_needs_draft(draft=<object>)"


def test_a_taken_name_is_refused() -> None:
    with pytest.raises(PatchConflict, match=r"'t_dummy' belongs to .*\.Dummy: register NeedsDraft under another name"):
        register_patch("t_dummy")(NeedsDraft)
    assert available_patches()["t_dummy"] is Dummy


def test_the_same_class_defined_again_replaces_the_first() -> None:
    again = type("Dummy", (Patch,), {"__module__": Dummy.__module__, "__qualname__": "Dummy", "stage": Stage.WEIGHTS})
    again = dataclass(frozen=True)(again)
    register_patch("t_dummy")(again)
    assert available_patches()["t_dummy"] is again


def test_only_frozen_dataclass_patches_with_a_stage_are_registered() -> None:
    class Plain(Patch):
        stage = Stage.WEIGHTS

    @dataclass(frozen=True)
    class Stageless(Patch):
        pass

    @dataclass(frozen=True)
    class NotAPatch:
        stage = Stage.WEIGHTS

    with pytest.raises(TypeError, match=r"Plain is not a frozen dataclass: put @dataclass\(frozen=True\)"):
        register_patch("t_plain")(Plain)
    with pytest.raises(TypeError, match=r"has no stage: set `stage = Stage.ATTENTION`"):
        register_patch("t_stageless")(Stageless)
    with pytest.raises(TypeError, match="is not a subclass of"):
        register_patch("t_not_a_patch")(NotAPatch)  # type: ignore[type-var]
    for name in ("t-dash", "None", "", "a b"):
        with pytest.raises(ValueError, match="use a Python identifier"):
            register_patch(name)
    assert not {"t_plain", "t_stageless", "t_not_a_patch"} & set(available_patches())


def test_the_example_of_a_patch_is_its_own() -> None:
    @dataclass(frozen=True)
    class Larger(Dummy):
        pass

    @dataclass(frozen=True)
    class Exampleless(Patch):
        stage = Stage.WEIGHTS
        factor: float

    @dataclass(frozen=True)
    class Borrowed(Patch):
        stage = Stage.WEIGHTS
        example = "t_dummy(size=3)"

    assert Dummy.example == "t_dummy"
    assert NeedsDraft.example == "t_needs_draft(draft=small)"
    assert register_patch("t_larger")(Larger).example == "t_larger"  # not the one that it inherits
    with pytest.raises(TypeError, match=r"Exampleless has no example, and factor no default: set `example = 't_exampleless\(\.\.\.\)'`"):
        register_patch("t_exampleless")(Exampleless)
    with pytest.raises(ValueError, match=r"'t_dummy\(size=3\)', which is no spec of it: start it with 't_borrowed'"):
        register_patch("t_borrowed")(Borrowed)
    assert not {"t_exampleless", "t_borrowed"} & set(available_patches())


def test_a_patch_without_apply_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Dummy has no apply"):
        Dummy().apply(None, None)  # type: ignore[arg-type]


def test_importing_patchkit_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, patchkit, patchkit.api; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
