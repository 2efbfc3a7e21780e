"""The two layers of the tests: how a case gets into one, and whose matrix CI runs."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import FAMILIES_FAST, fast_first

from patchkit.testing import families

ROOT = Path(__file__).resolve().parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_matrix", ROOT / ".ci" / "matrix.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["ci_matrix"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


ci = load()


def layers(cases: list) -> dict[str, list]:
    found: dict[str, list] = {"fast": [], "matrix": []}
    for case in cases:
        found["matrix" if any(mark.name == "matrix" for mark in case.marks) else "fast"].append(case.values)
    return found


def test_no_case_is_lost_between_the_layers() -> None:
    assert layers(fast_first("abc", ["b"])) == {"fast": [("b",)], "matrix": [("a",), ("c",)]}
    pairs = [("a", 1), ("b", 1), ("a", 2)]
    assert layers(fast_first(pairs, lambda pair: pair[1] == 2)) == {"fast": [("a", 2)], "matrix": [("a", 1), ("b", 1)]}
    assert len(layers(fast_first(families()))["fast"]) == len(FAMILIES_FAST) == 8


def test_a_fast_case_that_is_none_of_the_cases_is_an_error() -> None:
    with pytest.raises(ValueError, match="'d'"):
        fast_first("abc", ["b", "d"])
    with pytest.raises(ValueError, match="none is among"):
        fast_first("abc", lambda case: case == "d")


def test_every_rule_of_ci_speaks_of_what_exists() -> None:
    for prefix, tests in ci.CONCERNS.items():
        for path in (prefix, *tests):
            assert (ROOT / path).exists(), path
    with_a_matrix = ci.files_with_a_matrix()
    assert {"tests/test_contract.py", "tests/speculation/test_sampling.py"} <= set(with_a_matrix)
    assert "tests/test_handle.py" not in with_a_matrix


def test_ci_runs_the_matrix_of_what_changed_as_far_as_it_fits() -> None:
    files = [
        "tests/speculation/test_exact.py",
        "tests/speculation/test_sampling.py",
        "tests/kernels/test_op.py",
        "tests/patches/test_linear.py",
    ]
    seconds = {file: {"matrix": 900.0} for file in files}
    assert ci.chosen(["README.md", "docs/results.md"], files, seconds) == ([], [])
    assert ci.chosen(["patchkit/kernels/op.py"], files, seconds) == (["tests/kernels/test_op.py"], [])
    assert ci.chosen(["tests/patches/test_linear.py"], files, seconds) == (["tests/patches/test_linear.py"], [])
    taken, left = ci.chosen(["patchkit/streaming/cache.py", "tests/speculation/test_exact.py"], files, seconds)
    assert taken == [files[3], files[0]] and left == [files[1]]
    assert ci.chosen(["patchkit/linear/state.py"], files, {"tests/patches/test_linear.py": {"matrix": 2401.0}})[1] == [files[3]]
