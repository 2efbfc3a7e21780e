"""pytest plug-in: the CPU seconds of every test file, by which `.ci/matrix.py` chooses what CI can afford.

On a shared machine they say what clocks do not.

    make seconds        # everything, and writes .ci/seconds.json

A test's seconds are those of its process and of the processes that it ran and waited for, set-up and teardown included.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

_NAME = "cpu_seconds"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", metavar="FILE", help="write the CPU seconds of every test file, fast layer and matrix, as JSON")


def _used() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_started] = _used()
    return (yield)


_started = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report = yield
    if call.when == "teardown":
        layer = "matrix" if item.get_closest_marker("matrix") else "fast"
        report.user_properties.append((_NAME, [layer, _used() - item.stash[_started]]))
    return report


class _Sum:
    def __init__(self, path: str) -> None:
        self.path, self.files = Path(path), defaultdict(lambda: {"fast": 0.0, "matrix": 0.0, "cases": 0})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == _NAME and report.when == "teardown":
                layer, seconds = value
                found = self.files[report.nodeid.split("::")[0]]
                found[layer] += seconds
                found["cases"] += 1

    def pytest_sessionfinish(self) -> None:
        rounded = {file: {name: round(value, 1) for name, value in found.items()} for file, found in sorted(self.files.items())}
        self.path.write_text(json.dumps(rounded, indent=1) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--cpu-seconds")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Sum(path))
