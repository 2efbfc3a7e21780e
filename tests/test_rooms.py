"""The rooms of patchkit and their order: a module imports from its own room and from those below, for types and in functions too."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1] / "patchkit"
# From the ground up. A name is a module or a folder of patchkit/; what is on one floor knows nothing of its neighbours.
FLOORS = (
    {"errors", "tolerance"},
    {"_compat"},
    {"record", "exclusive", "freshness", "training_mode", "grammar"},
    {"handle", "views", "trained_for", "chat"},
    {"derived"},
    {"attention", "kernels"},
    {"anatomy", "models"},
    {"spelled", "definitions", "module_timing"},
    {"registered"},
    {"patch"},
    {"spec"},
    {"attention_function", "static_step", "quantised"},
    {"int8", "int4"},
    {"prefix"},
    {"streaming", "speculation"},
    {"linear", "memory", "compiled"},
    {"patches"},
    {"api"},
    {"export"},
    {"measure"},
    {"training", "testing"},
    {"prove", "search", "gates", "bench", "lm_eval", "serving", "rl"},
    {"pytest_plugin", "cli"},
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}


def room_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "patchkit" and len(parts) > 1 else None


def imported(tree: ast.AST) -> set[str]:
    """Rooms that a module imports from, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {room_of(each.name) for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "patchkit":
            found |= {each.name for each in node.names if each.name in FLOOR_OF}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(room_of(node.module))
    return {room for room in found if room is not None}


def climbs(room: str, tree: ast.AST) -> list[str]:
    """Rooms that a module of ``room`` imports from although they are not below it."""
    return sorted(other for other in imported(tree) if other != room and FLOOR_OF[other] >= FLOOR_OF[room])


def modules() -> list[Path]:
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    assert climbs(room, ast.parse(path.read_text(encoding="utf-8"))) == []


def test_a_climb_is_seen_wherever_it_stands() -> None:
    for code in (
        "from patchkit.prove.proof import Proof",
        "if TYPE_CHECKING:\n    from patchkit import api",
        "def f():\n    import patchkit.cli",
        "from patchkit.speculation.loop import speculate",  # a neighbour
    ):
        assert len(climbs("streaming", ast.parse(code))) == 1, code
    assert (
        climbs("streaming", ast.parse("from patchkit.streaming import cache\nfrom patchkit.anatomy.target import Target\nimport torch"))
        == []
    )


def modules_imported(path: Path) -> set[str]:
    """Modules of patchkit that one of them imports, wherever the import is."""
    names = {name_of(each) for each in modules()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    return (found & names) - {name_of(path)}


def name_of(path: Path) -> str:
    return ".".join(("patchkit", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {name_of(path): modules_imported(path) for path in modules()}
    assert sum(map(len, graph.values())) > 500
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph | {"patchkit.errors": {"patchkit.api"}}).static_order())
