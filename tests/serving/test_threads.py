"""The number of threads of a server's model: chosen by timing, and the server's thread's own."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from patchkit.serving.engine import Engine
from patchkit.serving.metrics import Metrics
from patchkit.serving.threads import choose_threads, measured_threads
from patchkit.testing import tiny_model


@pytest.mark.parametrize(
    ("every", "fewer", "expected"),
    [
        (8.0, 10.5, 3),  # what a round loses is less than what the server needs for eight texts
        (8.0, 8.0, 3),
        (8.0, 13.0, 4),
        (80.0, 79.0, 3),  # one thread has all of the memory's bandwidth
        (300.0, 299.0, 4),  # large models are not timed for long
    ],
)
def test_one_thread_less_where_a_round_loses_little(every: float, fewer: float, expected: int) -> None:
    calls: list[int] = []

    def seconds_with(threads: int) -> float:
        calls.append(threads)
        noise = 30.0 if len(calls) in (1, 4) else 0.0  # a first call, and a moment in which the machine had other work
        return ({4: every, 3: fewer}[threads] + noise) / 1000

    assert choose_threads(seconds_with, 4, rows=8) == expected
    assert len(calls) <= 11 if every < 250 else calls == [4, 4]


def test_a_single_thread_is_not_timed() -> None:
    def seconds_with(threads: int) -> float:
        raise AssertionError

    assert choose_threads(seconds_with, 1, rows=8) == 1


def test_timing_leaves_torch_as_it_was() -> None:
    before = torch.get_num_threads()
    assert measured_threads(tiny_model("llama"), 2) in (before, max(1, before - 1))
    assert torch.get_num_threads() == before


def test_the_thread_of_a_server_has_its_own_number() -> None:
    """Two forwards in the server's thread, with another number than this thread has."""
    model, seen = tiny_model("llama"), list[tuple[str, int]]()
    before = torch.get_num_threads()

    def note(*args: Any) -> None:
        seen.append((threading.current_thread().name, torch.get_num_threads()))

    engine = Engine(model, Metrics("none"), threads=before + 3)  # which is not timed
    engine.start()
    hook = model.register_forward_pre_hook(note)
    try:
        with engine._condition:
            engine._commands.append(lambda: model(input_ids=torch.zeros(1, 1, dtype=torch.int64)) and None)
            engine._condition.notify()
    finally:
        engine.close()
        hook.remove()
    assert seen == [("patchkit-engine", before + 3)]
    assert torch.get_num_threads() == before


def test_a_start_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before, engine = set(vars(model)), Engine(model, Metrics("none"))

    def fails(*args: Any) -> int:
        raise MemoryError("no room for the first forward")

    monkeypatch.setattr("patchkit.serving.engine.measured_threads", fails)
    with pytest.raises(MemoryError):
        engine.start()
    assert set(vars(model)) == before
    monkeypatch.undo()
    engine.start()
    engine.close()
    assert set(vars(model)) == before


def test_two_servers_leave_the_number_that_was() -> None:
    before, seen = torch.get_num_threads(), list[int]()
    first, second = (Engine(tiny_model("llama"), Metrics("none"), threads=before + 1) for _ in range(2))
    for each in (first, second):
        each.start()
    for each in (first, second):
        each.close()
    reader = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    reader.start()
    reader.join()
    assert seen == [before]


@pytest.mark.parametrize("name", ["threads", "max_rows", "prefill"])
def test_a_number_of_threads_is_at_least_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0: give at least 1"):
        Engine(tiny_model("llama"), Metrics("none"), **{name: 0})
