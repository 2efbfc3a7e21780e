"""States as tensors and text: what is read is what was written, to the stride; what cannot be written is refused by name."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from patchkit.prefix.written_state import CannotWrite, WrittenState, part_of_state, read_into, written


class Shared:
    """What all states of a model point at."""


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


class Whole:
    """A state with everything that one may hold."""

    made_when_wanted = ("step",)

    def __init__(self, shared: Shared, module: nn.Module, empty: bool = True) -> None:
        self.shared, self.module = shared, module
        self.step: Any = "made by the empty one" if empty else object()
        self.part = Part(self)
        self.seen = 0

    @property
    def shared_parts(self) -> list[Any]:
        return [self.shared]


class Part:
    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.values: Any = None


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchkit.prefix.written_state._parts", {})
    for kind in (Pair, Whole, Part):
        part_of_state(kind)


def filled(shared: Shared, module: nn.Module) -> Whole:
    state = Whole(shared, module, empty=False)
    state.seen = 7
    both = torch.arange(24.0).reshape(2, 3, 4)
    state.part.values = {
        "numbers": [1, -2.5, float("inf"), True, None, "text"],
        3: (torch.float16, torch.device("cpu")),
        "transposed": both.transpose(0, 2),
        "twice": [both, both],
        "pair": Pair(torch.tensor(5, dtype=torch.int32), 6),
        "nothing": torch.empty(2, 0, dtype=torch.bfloat16),
    }
    state.gained = torch.tensor([True, False])  # type: ignore[attr-defined]
    return state


def through_json(found: WrittenState) -> WrittenState:
    assert all(tensor.is_contiguous() for tensor in found.tensors)
    return WrittenState(json.dumps(json.loads(found.text)), [tensor.clone() for tensor in found.tensors])


def test_what_is_read_is_what_was_written() -> None:
    shared, module = Shared(), nn.Linear(1, 1)
    state, empty = filled(shared, module), Whole(shared, module)
    found = read_into(empty, through_json(written(state)))
    assert found is empty and found.part.whole is found and found.shared is shared and found.module is module
    assert found.step == "made by the empty one" and found.seen == 7 and found.gained.tolist() == [True, False]
    values, expected = found.part.values, state.part.values
    assert list(values) == list(expected)
    assert values["numbers"] == expected["numbers"] and values[3] == expected[3]
    for got, wanted in ((values["transposed"], expected["transposed"]), (values["nothing"], expected["nothing"])):
        assert torch.equal(got, wanted) and got.stride() == wanted.stride() and got.dtype == wanted.dtype
    assert values["twice"][0] is values["twice"][1]
    assert type(values["pair"]) is Pair and values["pair"].first.shape == () and values["pair"] == expected["pair"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (object(), "a object"),
        (len, "builtin_function"),
        (torch.nn.Parameter(torch.ones(1)), "Parameter"),
        (torch.ones(2, 2).to_sparse(), "sparse"),
        ({(1, 2): 3}, "a dict"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(value: Any, words: str) -> None:
    state = Whole(Shared(), nn.Identity())
    state.part.values = [value]
    with pytest.raises(CannotWrite, match=words):
        written(state)


def test_a_state_of_another_kind_is_not_read() -> None:
    shared, module = Shared(), nn.Linear(1, 1)
    found = written(filled(shared, module))
    with pytest.raises(ValueError, match="a Whole was written, and this is a Part"):
        read_into(Part(Whole(shared, module)), found)
    with pytest.raises(ValueError, match="lacks something"):
        read_into(Whole(None, module), found)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        read_into(Whole(shared, module), WrittenState('{"pickle": 1}', []))
