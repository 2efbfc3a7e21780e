"""The record of a patch, and the report."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from patchkit.record import Record, Report


def record_of(name: str) -> Record:
    patch: Any = SimpleNamespace(name=name, spec=f"{name}()", stage=0)
    return Record(patch)


def test_a_report_begins_with_the_warnings_of_all_patches() -> None:
    first, second = record_of("first"), record_of("second")
    first.changed("layers", 2)
    first.note("mode", "dynamic")
    first.measured("1 row", "2 -> 1 ms")
    first.left_alone("1 layer", "it is small")
    second.changed("heads")
    second.start()
    second.warn("positions are not bounded")
    second.warnings.add("idle")
    second.warnings.add("idle")
    second.hits["steps"] += 3
    assert str(Report([first.report(), second.report()])).splitlines() == [
        "warning: second: positions are not bounded",
        "warning: second: idle (2 times)",
        "first(): 2 layers; mode dynamic; 1 row 2 -> 1 ms; left alone: 1 layer (it is small)",
        "second(): 1 heads; hits: steps 3",
    ]


def test_starting_forgets_what_patching_counted_and_keeps_what_lasts() -> None:
    record = record_of("patch")
    record.warn("positions are not bounded")
    record.warnings.add("idle while patching")
    record.hits["probes"] += 1
    record.start()
    found = record.report()
    assert (found.warnings, found.hits) == ({"positions are not bounded": 0}, {})
    record.warnings.add("idle")
    assert found.warnings == {"positions are not bounded": 0}, "a report is a copy"


def test_a_warning_is_logged_once_at_run_time_and_on_demand_while_patching(caplog: pytest.LogCaptureFixture) -> None:
    record = record_of("patch")
    with caplog.at_level(logging.WARNING, "patchkit"):
        record.warn("silent")
        record.warn("slower", log=True)
        record.warnings.add("idle")
        record.warnings.add("idle")
    assert [each.message for each in caplog.records] == ["patchkit: slower", "patchkit: idle"]
