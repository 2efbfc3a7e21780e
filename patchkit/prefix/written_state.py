"""A state as tensors and a text, which is what a file can hold of it. A file names no class: a state is read into an empty one.

1. `written` walks over the attributes of a state. Numbers, texts, dtypes and devices go into the text (JSON); tensors are listed.
2. What all caches of a model share (its plan, its modules) is not written.
3. `read_into` walks over an empty state of the same kind, and sets these attributes on it. Bytes and strides are those that were written.

Objects that hold a part of a state are cache layers, and those of classes that say so (`part_of_state`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from patchkit import _compat

C = TypeVar("C", bound=type)

_parts: dict[str, type] = {}
_LAYERS = (_compat.CacheLayerMixin, _compat.LinearAttentionLayer)
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class WrittenState:
    """The text and the tensors of one state, as a file holds them.

    Attributes:
        text: JSON; tensors are numbers in it.
        tensors: by that number, each contiguous and on the CPU.
    """

    text: str
    tensors: list[torch.Tensor]


class CannotWrite(Exception):
    """A state holds something that is neither a number, a text, a tensor nor a known object; the message says what."""


def part_of_state(kind: C) -> C:
    """Class decorator: objects of this class, a `NamedTuple` or a plain class, hold a part of a state, and nothing else.

    A plain class may have ``made_when_wanted``: names of attributes that are not written, since those of an empty state serve as well. A
    cache may have ``shared_parts``: objects that all caches of one model share, which are not written.
    """
    _parts[kind.__name__] = kind
    return kind


def written(state: Any) -> WrittenState:
    """Write a state: a cache, or cache layers by their index.

    Raises:
        CannotWrite: it holds something that cannot be written.
    """
    writer = _Writer(list(getattr(state, "shared_parts", ())))
    text = json.dumps(writer.value(state))
    return WrittenState(text, writer.tensors)


def read_into(empty: Any, found: WrittenState) -> Any:
    """Fill an empty state of the same kind, and return it.

    Raises:
        ValueError, KeyError, TypeError, IndexError, AttributeError: the text does not describe a state of this kind.
    """
    return _Reader(found.tensors).value(json.loads(found.text), empty)


@dataclass
class _Writer:
    """One state while it is written."""

    shared: list[Any]
    tensors: list[torch.Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)  # of tensors, by identity
    _objects: dict[int, int] = field(default_factory=dict)

    def value(self, value: Any) -> Any:
        """What JSON holds of ``value``: itself, or an object whose first key says what it is."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        if isinstance(value, nn.Module) or any(value is each for each in self.shared):
            return {"shared": True}
        if isinstance(value, torch.Tensor):
            return self._tensor(value)
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if kind is dict and all(type(key) in _PLAIN for key in value):
            return {"dict": [[key, self.value(each)] for key, each in value.items()]}
        if kind in (list, tuple):
            return {kind.__name__: [self.value(each) for each in value]}
        if isinstance(value, tuple) and _parts.get(kind.__name__) is kind:
            return {"named": kind.__name__, "values": [self.value(each) for each in value]}
        if isinstance(value, (*_LAYERS, *_parts.values())):
            return self._object(value)
        raise CannotWrite(f"a {kind.__name__}")

    def _object(self, value: Any) -> dict[str, Any]:
        if id(value) in self._objects:
            return {"same": self._objects[id(value)]}
        number = self._objects[id(value)] = len(self._objects)
        left_out = getattr(type(value), "made_when_wanted", ())
        attributes = {name: self.value(each) for name, each in vars(value).items() if name not in left_out}
        return {"object": type(value).__qualname__, "number": number, "attributes": attributes}

    def _tensor(self, tensor: torch.Tensor) -> dict[str, Any]:
        if type(tensor) is not torch.Tensor or tensor.layout is not torch.strided or tensor.is_quantized:
            raise CannotWrite(f"a tensor of type {type(tensor).__name__}, {tensor.layout}")
        # The order of the dimensions in memory is kept: other strides may mean other kernels, and other bits.
        order = sorted(range(tensor.ndim), key=tensor.stride().__getitem__, reverse=True)
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor.detach().permute(order).cpu().contiguous())
        return {"tensor": number, "order": order, "on": str(tensor.device)}


@dataclass
class _Reader:
    """One state while it is read."""

    tensors: Sequence[torch.Tensor]
    _made: dict[int, torch.Tensor] = field(default_factory=dict)
    _objects: dict[int, Any] = field(default_factory=dict)

    def value(self, found: Any, empty: Any) -> Any:
        """The value that ``found`` describes; ``empty`` is what an empty state has in its place."""
        if not isinstance(found, dict):
            return found
        read: Callable[[dict[str, Any], Any], Any] = getattr(self, f"_{next(iter(found))}")
        return read(found, empty)

    def _shared(self, found: dict[str, Any], empty: Any) -> Any:
        if empty is None:
            raise ValueError("an empty state lacks something that all share")
        return empty

    def _tensor(self, found: dict[str, Any], empty: Any) -> torch.Tensor:
        number, order = found["tensor"], found["order"]
        if number not in self._made:
            back = sorted(range(len(order)), key=order.__getitem__)
            self._made[number] = self.tensors[number].permute(back).to(found["on"])
        return self._made[number]

    def _dtype(self, found: dict[str, Any], empty: Any) -> torch.dtype:
        dtype = getattr(torch, found["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{found['dtype']} is no dtype")
        return dtype

    def _device(self, found: dict[str, Any], empty: Any) -> torch.device:
        return torch.device(found["device"])

    def _dict(self, found: dict[str, Any], empty: Any) -> dict[Any, Any]:
        own = empty if isinstance(empty, dict) else {}
        return {key: self.value(each, own.get(key)) for key, each in found["dict"]}

    def _list(self, found: dict[str, Any], empty: Any) -> list[Any]:
        values = found["list"]
        own = empty if isinstance(empty, list) and len(empty) == len(values) else [None] * len(values)
        return [self.value(each, before) for each, before in zip(values, own, strict=True)]

    def _tuple(self, found: dict[str, Any], empty: Any) -> tuple[Any, ...]:
        return tuple(self.value(each, None) for each in found["tuple"])

    def _named(self, found: dict[str, Any], empty: Any) -> Any:
        return _parts[found["named"]](*(self.value(each, None) for each in found["values"]))

    def _object(self, found: dict[str, Any], empty: Any) -> Any:
        if type(empty).__qualname__ != found["object"]:
            raise ValueError(f"a {found['object']} was written, and this is a {type(empty).__qualname__}")
        self._objects[found["number"]] = empty
        own = dict(vars(empty))
        left_out = {name: own[name] for name in getattr(type(empty), "made_when_wanted", ()) if name in own}
        attributes = {name: self.value(each, own.get(name)) for name, each in found["attributes"].items()}
        vars(empty).clear()
        vars(empty).update(attributes | left_out)
        return empty

    def _same(self, found: dict[str, Any], empty: Any) -> Any:
        return self._objects[found["same"]]
