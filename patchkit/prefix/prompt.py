"""One prompt of a call: how much of it is kept already, and what is to be kept while it is fed."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from patchkit.prefix.disk import DiskPrompt, DiskSpace
from patchkit.prefix.radix import Node, blocks_of
from patchkit.prefix.snapshot import FrozenBlock, copied_state, freeze, has_slices, has_state, size_of, thaw
from patchkit.prefix.store import PrefixStore


def last_border(tokens: int, block: int) -> int:
    """Return the last multiple of ``block`` that leaves at least one of ``tokens`` tokens to feed; 0 where there is none."""
    return (tokens - 1) // block * block


class Prompt:
    """A prompt without padding. Whoever feeds it ends every forward at the next `border`, or before it, and then calls `freeze`.

    Borders are the multiples of ``block``, counted from the first token, that leave at least one token to feed. So the same forwards
    are made whatever is kept, and a hit gives the bits of a miss.

    Args:
        store: where it is looked up.
        namespace: of the model, its state and the kind of cache; None if the prompt has no border.
        ids: the token ids.
        block: tokens between borders.
        cache: an empty cache, of the kind that will be fed.
        pinned: what is kept of it may not be evicted.
        disk: where blocks are read that are not in the store, and written; None for nowhere.
        wants_hidden: hidden states are kept with every block.

    Attributes:
        past: number of tokens whose cache is kept.
        last: the last border; 0 where there is none.
        held: number of tokens that are pinned.
        hidden: [1, past, D], hidden states of these tokens where they are kept, else None.
    """

    def __init__(
        self,
        store: PrefixStore,
        namespace: Hashable,
        ids: list[int],
        block: int,
        cache: Any,
        *,
        pinned: bool = False,
        disk: DiskSpace | None = None,
        wants_hidden: bool = False,
    ) -> None:
        self.store, self.namespace, self.block = store, namespace, block
        self.last, self.held = last_border(len(ids), block), 0
        self._blocks = blocks_of(ids, block, self.last // block)
        self._has_state, self._pinned = has_state(cache), pinned
        self._disk: DiskPrompt | None = None if disk is None else disk.of(self._blocks)
        path = store.find(namespace, self._blocks)
        path += self._read(path, cache, in_order=wants_hidden or has_slices(cache))
        self._known = len(path)  # blocks that were seen before: where the next prompt may branch off too
        usable = [i for i, node in enumerate(path, 1) if not self._has_state or node.value.state is not None]
        self._found = path[: usable[-1]] if usable else []
        self._snapshots: list[FrozenBlock] = [node.value for node in self._found]
        self._node: Node | None = self._found[-1] if self._found else None
        self._keeps = True  # False once a block could not be kept: then those behind it cannot, either
        self.past = len(self._found) * block
        self._pin_last(self.past)
        kept = [each.hidden for each in self._snapshots]
        self.hidden = torch.cat(kept, 1) if kept and kept[0] is not None else None  # type: ignore[arg-type]

    def thaw(self, cache: Any) -> None:
        """Fill an empty cache with the first `past` tokens."""
        thaw(self._snapshots, cache)
        self._snapshots = []

    def border(self, fed: int) -> int | None:
        """The next border behind ``fed`` tokens; None behind the last one."""
        after = (fed // self.block + 1) * self.block
        return after if after <= self.last else None

    def freeze(self, cache: Any, fed: int, hidden: torch.Tensor | None = None) -> None:
        """Keep the last block, if the ``fed`` tokens in ``cache`` end at a border.

        Args:
            hidden: [1, block, D], hidden states of the block, to be kept with it.
        """
        if not self._keeps or fed % self.block or not self.past < fed <= self.last:
            return
        number, start = fed // self.block, fed - self.block
        block, wanted = self._blocks[number - 1], self._has_state and self._keeps_state(number)

        def make(with_state: bool) -> FrozenBlock:
            return freeze(cache, start, fed, with_state, hidden)

        node = self.store.put(self.namespace, self._node, block, size_of(cache, start, fed, False, hidden), lambda: make(with_state=False))
        if node is None:
            self._keeps = False
            return
        self._node = node
        gains_state = wanted and node.value.state is None
        if gains_state:
            gains_state = self.store.fill(node, size_of(cache, start, fed, True, hidden), lambda: make(with_state=True))
        if self._disk is not None and not node.value.is_empty:
            self._disk.write(number, node.value, replace=gains_state)
        self._pin_last(fed)

    def _read(self, path: list[Node], cache: Any, in_order: bool) -> list[Node]:
        """Read blocks behind those of ``path`` from the disk, and keep them in the store.

        Args:
            cache: an empty cache.
            in_order: every block has a part of what is kept; otherwise the last one that is there has all of it.
        """
        if self._disk is None:
            return []
        node, found = path[-1] if path else None, list[Node]()
        numbers, empty = range(len(path) + 1, len(self._blocks) + 1), functools.partial(copied_state, cache)
        if not in_order:
            for number in reversed(numbers):
                value = self._disk.read(number, empty)
                if value is not None:
                    return self._add(node, numbers.start, [*(FrozenBlock({}) for _ in range(numbers.start, number)), value])
            return []
        for number in numbers:
            value = self._disk.read(number, empty)
            added = [] if value is None else self._add(node, number, [value])
            if not added:
                break
            found, node = found + added, added[-1]
        return found

    def _add(self, node: Node | None, number: int, values: list[FrozenBlock]) -> list[Node]:
        """Keep blocks from ``number`` on behind ``node`` in the store, as far as there is room."""
        added = list[Node]()
        for block, value in zip(self._blocks[number - 1 :], values, strict=False):
            node = self.store.put(self.namespace, node, block, value.size, functools.partial(_value, value))
            if node is None:
                break
            added.append(node)
        return added

    def _keeps_state(self, number: int) -> bool:
        """Whether states are kept behind block ``number``: the last one, 1, 2, 4, 8, ..., and where prompts branch off."""
        return number * self.block == self.last or number & (number - 1) == 0 or number == self._known

    def _pin_last(self, fed: int) -> None:
        if self._pinned and fed and fed == self.last and self._node is not None:
            self.store.pin(self._node)
            self.held = fed


def _value(value: FrozenBlock) -> FrozenBlock:
    return value
