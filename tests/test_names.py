"""Names: every public class has one of its own, and every public docstring can be read alone."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "patchkit"
# Rooms whose docstrings still begin with a reference to another one; this only gets shorter.
TO_DO: frozenset[str] = frozenset()
# A docstring that begins so is a riddle, or cannot be understood without another docstring.
OPENERS = ("The same", "As ", "See ", "What ")

Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def parsed() -> list[tuple[str, Path, ast.Module]]:
    """Room, path and syntax tree of every module of patchkit."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        found.append((relative.parts[0].removesuffix(".py"), relative, ast.parse(path.read_text(encoding="utf-8"))))
    return found


ROOMS = sorted({room for room, _, _ in parsed()})


def public_classes() -> dict[str, list[str]]:
    """Files by the name of the class that they define at module level."""
    found = defaultdict(list)
    for _, path, tree in parsed():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path))
    return found


def public_definitions(node: Definition) -> Iterator[Definition]:
    """A module, class or function, and the public definitions in it."""
    yield node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
                yield from public_definitions(child)


def relative_docstrings(tree: ast.Module) -> list[str]:
    """First lines of public docstrings that begin with one of ``OPENERS``."""
    documented = (ast.get_docstring(node) or "" for node in public_definitions(tree))
    return [text.splitlines()[0] for text in documented if text.startswith(OPENERS)]


def test_no_two_public_classes_share_a_name() -> None:
    assert {name: paths for name, paths in public_classes().items() if len(paths) > 1} == {}


def test_no_class_shadows_a_public_name_of_transformers() -> None:
    import transformers

    taken = {name for name in dir(transformers) if not name.startswith("_")}
    assert {"DynamicCache", "Trainer"} <= taken
    assert {name: paths for name, paths in public_classes().items() if name in taken} == {}


@pytest.mark.parametrize("room", ROOMS)
def test_public_docstrings_can_be_read_alone(room: str) -> None:
    found = {str(path): lines for name, path, tree in parsed() if name == room if (lines := relative_docstrings(tree))}
    if room in TO_DO:
        assert found, f"{room} is done: take it out of TO_DO"
    else:
        assert found == {}


def test_rooms_to_do_exist() -> None:
    assert set(ROOMS) >= TO_DO


def test_a_relative_docstring_is_seen() -> None:
    tree = ast.parse('class A:\n    """A thing."""\n    def b(self):\n        """See `C`."""\n    def _c(self):\n        """As `b`."""')
    assert relative_docstrings(tree) == ["See `C`."]
