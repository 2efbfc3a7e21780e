"""A scanner for private names of other libraries: names that begin with one underscore and that the code itself does not define."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")
_PRIVATE_MODULE = re.compile(r"(torch|transformers|lm_eval|peft|torchao)(\.\w+)*\._[a-zA-Z]\w*(\.\w+)*")
# Attributes that a patch leaves on a model.
_OURS = "_patchkit"
# What follows is a part of a string, and no name.
_PARTS_OF_STRINGS = {"startswith", "endswith", "removeprefix", "removesuffix", "replace", "split", "partition", "rpartition"}


# Public methods and attributes of a NamedTuple, which begin with an underscore so that no field has their names.
_OF_TUPLES = {"_asdict", "_fields", "_make", "_replace"}


def is_private(name: str) -> bool:
    return name not in _OF_TUPLES and _PRIVATE.fullmatch(name) is not None and not name.startswith(_OURS)


@dataclass
class Class:
    """Private names that a class defines, in its body or on ``self`` and ``cls``, and the names of its bases."""

    names: set[str] = field(default_factory=set)
    bases: list[str] = field(default_factory=list)


def classes_of(trees: dict[Path, ast.Module]) -> dict[str, Class]:
    """The classes of all modules, by name; those of the same name are taken together."""
    found: dict[str, Class] = {}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                own = found.setdefault(node.name, Class())
                own.bases += [ast.unparse(base).split("[")[0].rpartition(".")[2] for base in node.bases]
                own.names |= _defined_in(node)
    return found


def _defined_in(node: ast.ClassDef) -> set[str]:
    found = set(_bound(node.body))
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store) and _is_own(each.value):
            found.add(each.attr)
    return {name for name in found if is_private(name)}


def _bound(body: list[ast.stmt]) -> Iterator[str]:
    """The names that statements bind, those of nested blocks included."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        else:
            yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store))


def _is_own(node: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "super"
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def with_bases(name: str, classes: dict[str, Class]) -> set[str]:
    """Private names that a class or a base of it defines, as far as ``classes`` has them."""
    found, waiting, seen = set[str](), [name], set[str]()
    while waiting:
        current = waiting.pop()
        if current in classes and current not in seen:
            seen.add(current)
            found |= classes[current].names
            waiting += classes[current].bases
    return found


class Scanner(ast.NodeVisitor):
    """Collects ``found``: (line, name) of each private name that is not defined where our own would be."""

    def __init__(self, tree: ast.Module, classes: dict[str, Class]) -> None:
        self.found: list[tuple[int, str]] = []
        self._classes = classes
        self._inside: list[str] = []
        inner = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        # Of the classes of this module, whose attributes its functions may use.
        self._here = {name for each in inner for name in with_bases(each, classes)}
        self._module = set(_bound(tree.body))
        self.visit(tree)

    def _note(self, node: ast.AST, name: str) -> None:
        self.found.append((getattr(node, "lineno", 0), name))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._inside.append(node.name)
        self.generic_visit(node)
        self._inside.pop()

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if is_private(node.attr):
            own = with_bases(self._inside[-1], self._classes) if _is_own(node.value) and self._inside else self._here
            if node.attr not in own:
                self._note(node, node.attr)
        self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for each in node.names:
            self._imported(node, each.name.split("."))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for each in node.names:
            self._imported(node, [*(node.module or "").split("."), each.name])

    def _imported(self, node: ast.AST, path: list[str]) -> None:
        if path[0] != "patchkit":
            for part in filter(is_private, path):
                self._note(node, part)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str):
            if is_private(node.value) and node.value not in self._module | self._here:
                self._note(node, node.value)
            elif _PRIVATE_MODULE.fullmatch(node.value):
                self._note(node, next(part for part in node.value.split(".") if is_private(part)))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        for value in node.values:
            if not isinstance(value, ast.Constant):
                self.visit(value)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Attribute) and node.func.attr in _PARTS_OF_STRINGS:
            self.visit(node.func)
        else:
            self.generic_visit(node)


def foreign_names(tree: ast.Module, classes: dict[str, Class]) -> list[tuple[int, str]]:
    """(line, name) of each private name in a module that neither it nor a class of ours in ``classes`` defines."""
    return Scanner(tree, classes).found
