"""Private names of other libraries are in `patchkit/_compat/` only, and each module there declares those that it relies on."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from private_names import classes_of, foreign_names, is_private, with_bases

ROOT = Path(__file__).resolve().parents[1]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "patchkit").rglob("*.py"))}
CLASSES = classes_of(TREES)
COMPAT = [path for path in TREES if "_compat" in path.parts]
OTHERS = [path for path in TREES if path not in COMPAT]

# Names that the scanner takes for private names, and why they are none.
ALLOWED = {
    ("patchkit/measure/stdlib_text.py", "_bundled"): "the name of a folder",
    ("patchkit/search/sweep_files.py", "_low"): "the end of a column's name",
    ("patchkit/search/sweep_files.py", "_high"): "the end of a column's name",
}
# Methods of our subclasses that a library calls, so that they must have its name.
OVERRIDDEN = {
    ("PatchkitLM", "_loglikelihood_tokens"): "lm-eval scores requests by it",
    ("PatchkitLM", "_model_generate"): "lm-eval generates by it",
    ("PatchkitLM", "_detect_batch_size"): "lm-eval finds batch_size=auto by it",
}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", OTHERS, ids=name_of)
def test_private_names_of_other_libraries_are_in_compat(path: Path) -> None:
    found = [f"{name_of(path)}:{line} {name}" for line, name in foreign_names(TREES[path], CLASSES) if (name_of(path), name) not in ALLOWED]
    assert found == [], "give it a function in patchkit/_compat/, and declare it there"


def test_what_is_allowed_is_there() -> None:
    found = {(name_of(path), name) for path in OTHERS for _, name in foreign_names(TREES[path], CLASSES)}
    assert found == {*ALLOWED}


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("def f(config): return config._attn_implementation", "_attn_implementation"),
        ("def f(config): config._attn_implementation = 'sdpa'", "_attn_implementation"),
        ("import torch\ntorch._dynamo.reset()", "_dynamo"),
        ("import torch._dynamo", "_dynamo"),
        ("from torch._dynamo import reset", "_dynamo"),
        ("from lm_eval.models import _private", "_private"),
        ("def f(model): return getattr(model, '_tp_size', None)", "_tp_size"),
        ("def f(module): return vars(module)['_compiled_call_impl']", "_compiled_call_impl"),
        ("NAMES = ('_forward_hooks', '_modules')", "_modules"),
        ("import sys\nLOADED = 'torch._inductor.config' in sys.modules", "_inductor"),
        ("class Model(HFLM):\n    def length(self): return self._max_length", "_max_length"),
        ("class Model(HFLM):\n    def size(self): return super()._detect()", "_detect"),
        ("class Mine:\n    def __init__(self): self._own = 1\nclass Other:\n    def f(self): return self._own", "_own"),
    ],
)
def test_a_planted_name_is_found(code: str, name: str) -> None:
    tree = ast.parse(code)
    assert name in [found for _, found in foreign_names(tree, classes_of({Path("planted.py"): tree}))]


@pytest.mark.parametrize(
    "code",
    [
        "class Mine:\n    def __init__(self): self._own = 1\n    def f(self, other): return other._own + self._own",
        "class Base:\n    def _own(self): ...\nclass Mine(Base):\n    def f(self): return super()._own() or self._own",
        "class Mine:\n    _own = 1\ndef f(mine): return mine._own",
        "from patchkit import _compat\nfrom patchkit._compat.modules import parameters_of",
        "def f(module): return vars(module).get('_patchkit_streaming'), module.__dict__, f'{module}_bias'",
        "def f(name): return name.endswith('_states')",
    ],
)
def test_names_of_our_own_are_none(code: str) -> None:
    tree = ast.parse(code)
    assert foreign_names(tree, classes_of({Path("planted.py"): tree})) == []


def declared(module: ModuleType) -> set[str]:
    """The parts of every name that a module of `_compat` declares."""
    rows = [*getattr(module, "RELIED_ON", {}), *getattr(module, "RELIED_ON_WHEN_USED", {}), *getattr(module, "MAY_BE_MISSING", {})]
    return {part.removesuffix("()") for row in rows for part in re.split("[.:]", row)}


@pytest.mark.parametrize("path", COMPAT, ids=name_of)
def test_a_module_of_compat_declares_the_private_names_that_it_uses(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    used = {name for _, name in foreign_names(TREES[path], CLASSES)}
    assert sorted(used - declared(module)) == []


def test_an_undeclared_name_is_found() -> None:
    module = ModuleType("seam")
    vars(module)["RELIED_ON"] = {"torch:_int_mm": None, "torch.nn:Module()._buffers": None}
    vars(module)["MAY_BE_MISSING"] = {"_tp_size": "the reason"}
    assert {"_int_mm", "_buffers", "Module", "_tp_size"} <= declared(module) and "_parameters" not in declared(module)


# -- subclasses ------------------------------------------------------------------------------------------------------------


def redefined(cls: type[Any], names: set[str]) -> set[str]:
    """Those of ``names`` that a base of ``cls`` in another library has, in its body or on ``self``."""
    theirs: set[str] = set()
    for base in cls.__mro__:
        if not base.__module__.startswith(("patchkit", "builtins", "test")):
            theirs |= {name for name in vars(base) if is_private(name)}
            module = inspect.getmodule(base)
            if getattr(module, "__file__", "").endswith(".py"):  # else it is compiled, and hides nothing in its methods
                theirs |= with_bases(base.__name__, classes_of({Path(base.__module__): ast.parse(inspect.getsource(module))}))
    return names & theirs


def subclasses() -> list[tuple[str, str]]:
    """(module, class) of each class of ours that defines private names and has a base that is not ours."""
    found = []
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and CLASSES[node.name].names and set(CLASSES[node.name].bases) - {*CLASSES}:
                found.append((".".join(path.relative_to(ROOT).with_suffix("").parts), node.name))
    return found


@pytest.mark.parametrize(("module", "name"), subclasses())
def test_a_subclass_redefines_no_private_name_of_its_library(module: str, name: str) -> None:
    if name == "PatchkitLM":
        pytest.importorskip("lm_eval")
    cls = getattr(importlib.import_module(module), name)
    found = redefined(cls, CLASSES[name].names)
    assert found == {method for owner, method in OVERRIDDEN if owner == name}


def test_a_redefined_name_is_found() -> None:
    from torch import nn

    class Mine(nn.Module):
        pass

    assert redefined(Mine, {"_buffers", "_call_impl", "_own"}) == {"_buffers", "_call_impl"}
