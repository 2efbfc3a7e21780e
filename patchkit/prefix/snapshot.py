"""Copies of what a cache holds of a prompt: made at a border of blocks (`freeze`), and put into an empty cache (`thaw`).

Shapes: G kv heads, t tokens of a block, K key dim, V value dim, D hidden size. A cache that is frozen has one row.

1. *Slices* of layers that keep all keys: keys [1, G, t, K] and values [1, G, t, V] of one block.
2. *States* of all other layers (windows, rings, linear and recurrent ones): everything that they hold at the end of the block.

A kind of cache that is a state as a whole is named by the decorator `state_as_whole`, beside its class.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from patchkit import _compat
from patchkit.prefix.written_state import part_of_state
from patchkit.static_step import FixedCache, FixedLayer

C = TypeVar("C", bound=type)

_whole: list[type] = []


@dataclass(frozen=True, eq=False)
class FrozenBlock:
    """The part of a cache that one node keeps.

    Attributes:
        slices: by the index of a layer, keys and values of the block; without layers that are not used.
        state: by the index of a layer, a copy of it; or a copy of the whole cache; None: not kept here.
        hidden: [1, t, D], the target's last hidden states, where a drafter wants them.
    """

    slices: dict[int, tuple[torch.Tensor, torch.Tensor]]
    state: Any = None
    hidden: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in tensors_of([self.slices, self.state, self.hidden]))

    @property
    def is_empty(self) -> bool:
        """Whether nothing but the token ids is known."""
        return not self.slices and self.state is None and self.hidden is None


def state_as_whole(kind: C) -> C:
    """Class decorator: caches of this kind are frozen as a whole, by `copy.deepcopy`. Their size must not grow with the text for long.

    The class has ``append_rows(others)``, which appends the rows of other caches of the same length. On disk it is a `part_of_state`.
    """
    _whole.append(kind)
    return part_of_state(kind)


def is_served(cache: Any) -> bool:
    """Whether caches of this kind can be frozen."""
    if isinstance(cache, FixedCache) or _is_whole(cache):
        return True
    return type(cache) is _compat.DynamicCache and not getattr(cache, "offloading", False) and bool(cache.layers)


def has_state(cache: Any) -> bool:
    """Whether a cache holds states, which are kept at few borders because each costs all its bytes."""
    return _is_whole(cache) or len(_sliced(cache)) < len(cache.layers)


def has_slices(cache: Any) -> bool:
    """Whether a cache has layers that keep all keys, which every block holds its part of."""
    return bool(_sliced(cache))


def copied_state(cache: Any) -> Any:
    """A copy of the part of a cache that is kept as a state."""
    return copied(_state(cache))


def _is_whole(cache: Any) -> bool:
    """Whether a cache is a state as a whole."""
    return isinstance(cache, tuple(_whole))


def _sliced(cache: Any) -> list[int]:
    """Indices of the layers that keep all keys."""
    if _is_whole(cache):
        return []
    return [i for i, layer in enumerate(cache.layers) if type(layer) is _compat.DynamicLayer or isinstance(layer, FixedLayer)]


def _state(cache: Any) -> Any:
    """The part of a cache that is kept as a state."""
    if _is_whole(cache):
        return cache
    sliced = _sliced(cache)
    return {i: layer for i, layer in enumerate(cache.layers) if i not in sliced}


def size_of(cache: Any, start: int, end: int, with_state: bool, hidden: torch.Tensor | None = None) -> int:
    """Bytes of what `freeze` would copy."""
    parts: list[torch.Tensor] = [part for pair in _views(cache, start, end).values() for part in pair]
    if with_state:
        parts += tensors_of(_state(cache))
    if hidden is not None:
        parts.append(hidden)
    return sum(part.numel() * part.element_size() for part in parts)


def freeze(cache: Any, start: int, end: int, with_state: bool, hidden: torch.Tensor | None = None) -> FrozenBlock:
    """Copy tokens ``start`` to ``end - 1`` of a cache of one row, which holds ``end`` tokens.

    Args:
        with_state: copy states too.
        hidden: [1, end - start, D], to be kept with it.
    """
    slices = {
        i: (_own(cache.layers[i], cache.layers[i].keys, keys), _own(cache.layers[i], cache.layers[i].values, values))
        for i, (keys, values) in _views(cache, start, end).items()
    }
    state = copied_state(cache) if with_state and has_state(cache) else None
    return FrozenBlock(slices, state, None if hidden is None else hidden.clone())


def _own(layer: Any, whole: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A copy of a part of what a layer holds; no copy where that is all of it, and the layer replaces tensors and never writes to them."""
    is_all = part.shape == whole.shape and whole.is_contiguous() and whole.untyped_storage().nbytes() == whole.nbytes
    return whole.detach() if is_all and type(layer) is _compat.DynamicLayer else part.clone()


def _views(cache: Any, start: int, end: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    layers = {i: cache.layers[i] for i in _sliced(cache)}
    return {i: (each.keys[:, :, start:end], each.values[:, :, start:end]) for i, each in layers.items() if each.is_initialized}


def thaw(snapshots: Sequence[FrozenBlock], cache: Any) -> None:
    """Fill an empty cache, of the kind that was frozen, with the snapshots of all blocks from the first token on.

    The cache gets copies of what it may write to. At least one more token is to be fed, with which a `DynamicLayer` replaces its tensors.
    """
    if not snapshots:
        return
    state = snapshots[-1].state
    if isinstance(state, dict):
        for i, layer in copied(state).items():
            cache.layers[i] = layer
    elif state is not None:
        vars(cache).clear()
        vars(cache).update(vars(copied(state)))
    for i in snapshots[0].slices:
        layer = cache.layers[i]
        if isinstance(layer, FixedLayer):
            layer.reserve(sum(each.slices[i][0].shape[2] for each in snapshots))
            for each in snapshots:
                layer.update(*each.slices[i])
        else:
            keys, values = zip(*(each.slices[i] for each in snapshots), strict=True)
            layer.lazy_initialization(keys[0], values[0])
            layer.keys, layer.values = (parts[0] if len(parts) == 1 else torch.cat(parts, 2) for parts in (keys, values))
    if hasattr(cache, "autocast"):  # a cache of a model whose steps may be compiled
        cache.just_thawed = True  # the next forward begins a sequence, as far as compiled code is concerned
        # Of the last eager forward, which a prompt that was fed has had.
        device = next(iter(tensors_of(cache))).device.type
        cache.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def can_join(cache: Any) -> bool:
    """Whether rows that were fed one by one can be put together in caches of this kind."""
    return not _is_whole(cache) or bool(getattr(cache, "can_append_rows", True))


def joined(caches: Sequence[Any]) -> Any:
    """Put rows together that were fed one by one, and hold equal numbers of tokens: row r is that of ``caches[r]``.

    Returns:
        The first of the caches, which holds all rows now.
    """
    first: Any = caches[0]
    if len(caches) > 1:
        if _is_whole(first):
            first.append_rows(caches[1:])
        else:
            for layers in zip(*(cache.layers for cache in caches), strict=True):
                for name, values in _by_row(layers).items():
                    vars(layers[0])[name] = _concatenated(values)
    return first


def repeat_rows(cache: Any, order: Sequence[int]) -> None:
    """Let row r of a cache be what is row ``order[r]`` now."""
    device = next(iter(tensors_of(cache))).device
    cache.reorder_cache(torch.tensor(list(order), device=device))


def _by_row(layers: Sequence[Any]) -> dict[str, list[Any]]:
    """The attributes of layers that have a batch dimension."""
    names = [name for name in vars(layers[0]) if name in ("keys", "values") or name.endswith("_states")]
    found = {name: [vars(layer)[name] for layer in layers] for name in names}
    return {name: values for name, values in found.items() if isinstance(values[0], torch.Tensor | dict)}


def _concatenated(values: Sequence[Any]) -> Any:
    if isinstance(values[0], dict):
        return {key: _concatenated([each[key] for each in values]) for key in values[0]}
    return torch.cat(list(values)) if isinstance(values[0], torch.Tensor) else values[0]


def copied(thing: Any) -> Any:
    """A deep copy in which every tensor has memory for its own elements only: a view does not bring what it is a view of."""
    tensors = list(tensors_of(thing))
    return copy.deepcopy(thing, {id(tensor): tensor.detach().clone() for tensor in tensors})


def tensors_of(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor that ``thing`` holds, once. Modules and functions are left out: a cache may point at its model."""
    seen: set[int] = set()
    waiting = [thing]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            yield item
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__"):
            waiting += vars(item).values()
