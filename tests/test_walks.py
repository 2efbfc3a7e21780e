"""How far one has to read: the files that an argument passes through, and how often it goes up again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_rooms import FLOOR_OF, ROOT

from patchkit import patch_model
from patchkit.anatomy.target import Target
from patchkit.patches.streaming import StreamingLLM
from patchkit.testing import tiny_model


class Walk:
    """Calls of patchkit's functions that hold an object, as it passes from file to file.

    Attributes:
        stays: the files in the order of reading, back to the caller after each call; a stay may be several functions long.
        calls: (caller's file, callee's file) of each call.
    """

    def __init__(self, holds: Callable[[Any], bool]) -> None:
        self.holds = holds
        self.stays: list[str] = []
        self.calls: list[tuple[str, str]] = []
        self._stack: list[str] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        before = sys.getprofile()
        sys.setprofile(self._on_event)
        try:
            yield
        finally:
            sys.setprofile(before)

    def _on_event(self, frame: FrameType, event: str, arg: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(ROOT) or not any(map(self.holds, frame.f_locals.values())):
            return
        if event == "call":
            if self._stack:
                self.calls.append((self._stack[-1], str(path.relative_to(ROOT))))
            self._stack.append(str(path.relative_to(ROOT)))
            self._stay(self._stack[-1])
        elif self._stack:
            self._stack.pop()
            if self._stack:
                self._stay(self._stack[-1])

    def _stay(self, file: str) -> None:
        if not self.stays or self.stays[-1] != file:
            self.stays.append(file)


def climbs(before: str, after: str) -> bool:
    rooms = [file.split("/")[0].removesuffix(".py") for file in (before, after)]
    return FLOOR_OF[rooms[1]] > FLOOR_OF[rooms[0]]


def test_the_target_of_streaming_stays_in_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    walk, apply = Walk(lambda value: isinstance(value, Target)), StreamingLLM.apply

    def followed(self: StreamingLLM, *args: Any) -> None:
        with walk.watching():
            apply(self, *args)

    monkeypatch.setattr(StreamingLLM, "apply", followed)
    patch_model(tiny_model("llama"), "streaming(window=12)")
    assert walk.stays[0] == "patches/streaming.py"
    assert len(walk.stays) <= 10, walk.stays
    assert sum(map(climbs, walk.stays, walk.stays[1:])) <= 3, walk.stays


@pytest.mark.parametrize("spec", ["streaming(window=12)", "linear(window=12)", "mlp_int8", "compile(backend=eager)", "speculative"])
def test_a_model_is_never_passed_up(spec: str) -> None:
    patch_model(tiny_model("llama"), spec)  # so that nothing is imported on the way
    model = tiny_model("llama")
    walk = Walk(lambda value: value is model)
    with walk.watching():
        patch_model(model, spec)
    assert len(walk.calls) > 10
    assert [call for call in walk.calls if climbs(*call)] == []
