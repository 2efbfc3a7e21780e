"""One prompt of a call: how much of it is kept already, and what is to be kept while it is fed."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch

from patchkit.prefix.disk import DiskSpace
from patchkit.prefix.radix import Node, blocks_of
from patchkit.prefix.snapshot import FrozenBlock, freeze, has_state, size_of, thaw
from patchkit.prefix.store import PrefixStore


class Prompt:
    """A prompt without padding. Whoever feeds it ends every forward at the next `border`, or before it, and then calls `freeze`.

    Borders are the multiples of ``block``, counted from the first token, that leave at least one token to feed. So the same forwards
    are made whatever is kept, and a hit gives the bits of a miss.

    Args:
        store: where it is looked up.
        namespace: of the model, its state and the kind of cache.
        ids: the token ids.
        block: tokens between borders.
        cache: an empty cache, of the kind that will be fed.
        pinned: what is kept of it may not be evicted.
        disk: where blocks are read that are not in the store, and written; None for nowhere. Blocks with states are not.

    Attributes:
        past: number of tokens whose cache is kept.
        last: the last border; 0 where there is none.
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
    ) -> None:
        self.store, self.namespace, self.block = store, namespace, block
        self.last = (len(ids) - 1) // block * block
        self._blocks = blocks_of(ids, block, self.last // block)
        self._has_state, self._pinned = has_state(cache), pinned
        self._disk = None if self._has_state else disk
        path = store.find(namespace, self._blocks)
        path += self._read(path[-1] if path else None, len(path))
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
        if self._disk is not None:
            self._disk.write(self._blocks[:number], node.value)
        if wanted and node.value.state is None:
            self.store.fill(node, size_of(cache, start, fed, True, hidden), lambda: make(with_state=True))
        self._pin_last(fed)

    def _read(self, node: Node | None, known: int) -> list[Node]:
        """Read the blocks behind the ``known`` first ones from the disk, and keep them behind ``node``."""
        found = list[Node]()
        for number in range(known + 1, len(self._blocks) + 1):
            value = None if self._disk is None else self._disk.read(self._blocks[:number])
            if value is None:
                break
            node = self.store.put(self.namespace, node, self._blocks[number - 1], value.size, functools.partial(_value, value))
            if node is None:
                break
            found.append(node)
        return found

    def _keeps_state(self, number: int) -> bool:
        """Whether states are kept behind block ``number``: the last one, 1, 2, 4, 8, ..., and where prompts branch off."""
        return number * self.block == self.last or number & (number - 1) == 0 or number == self._known

    def _pin_last(self, fed: int) -> None:
        if self._pinned and fed and fed == self.last and self._node is not None:
            self.store.pin(self._node)


def _value(value: FrozenBlock) -> FrozenBlock:
    return value
