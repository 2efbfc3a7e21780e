"""A radix tree over token ids. Its edges are blocks of equal length, so no edge is ever split. It knows no tensors.

Leaves are found by last use. A use of a node is a use of all nodes above it, so a node is never older than those below it.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Node:
    """The end of one block of tokens.

    Attributes:
        block: token ids of the block, as the bytes of int64.
        parent: the node before it; None for the root of a namespace.
        depth: number of blocks from the root.
        value: what is kept here; None where only the token ids are known.
        size: bytes of ``block`` and ``value``.
        used: time of the last use.
        pins: how often it was pinned; a pinned node stays.
        alive: it is in the tree.
    """

    block: bytes
    parent: Node | None
    depth: int
    value: Any = None
    size: int = 0
    used: int = 0
    pins: int = 0
    alive: bool = True
    children: dict[bytes, Node] = field(default_factory=dict)


def blocks_of(ids: Sequence[int], block: int, count: int) -> list[bytes]:
    """Return the first ``count`` blocks of ``block`` token ids."""
    return [array("q", ids[start : start + block]).tobytes() for start in range(0, count * block, block)]


class RadixTree:
    """Nodes by namespace and blocks of token ids.

    Attributes:
        roots: the root of each namespace that has nodes.
        bytes: sum of the sizes of all nodes.
        count: number of nodes, without roots.
    """

    def __init__(self) -> None:
        self.roots: dict[Hashable, Node] = {}
        self.bytes = 0
        self.count = 0
        self._clock = 0
        self._serial = 0
        self._leaves: list[tuple[int, int, Node]] = []  # a heap by last use, with entries that are out of date
        self._pinned: set[Node] = set()

    def path(self, namespace: Hashable, blocks: Sequence[bytes]) -> list[Node]:
        """Return the nodes of the longest known prefix of ``blocks``."""
        node, found = self.roots.get(namespace), list[Node]()
        for block in blocks:
            node = None if node is None else node.children.get(block)
            if node is None:
                break
            found.append(node)
        return found

    def use(self, path: Sequence[Node]) -> None:
        """Count all nodes of a path from the root as used now."""
        self._clock += 1
        for node in path:
            node.used = self._clock
        if path:
            self._offer(path[-1])

    def add(self, namespace: Hashable, parent: Node | None, block: bytes, value: Any, size: int) -> Node:
        """Append a node to ``parent``, or to the root of a namespace; it counts as used with its parent.

        Args:
            size: bytes of the value; those of the block are added.
        """
        if parent is None:
            parent = self.roots.setdefault(namespace, Node(b"", None, 0))
        node = Node(block, parent, parent.depth + 1, value, size + len(block), parent.used or self._clock)
        parent.children[block] = node
        self.bytes += node.size
        self.count += 1
        self._offer(node)
        return node

    def fill(self, node: Node, value: Any, size: int) -> None:
        """Replace the value of a node, by one of ``size`` bytes."""
        self.bytes += size + len(node.block) - node.size
        node.value, node.size = value, size + len(node.block)

    def remove(self, node: Node) -> None:
        """Remove a leaf."""
        assert node.parent is not None and not node.children
        del node.parent.children[node.block]
        node.alive = False
        self.bytes -= node.size
        self.count -= 1
        if node.parent.parent is None:
            self.roots = {name: root for name, root in self.roots.items() if root.children}
        else:
            self._offer(node.parent)

    def oldest(self, keep: Node | None = None) -> Node | None:
        """Return the leaf whose last use is longest ago, without ``keep`` and pinned ones; None if there is none."""
        aside: list[tuple[int, int, Node]] = []
        found = None
        while self._leaves and found is None:
            entry = heapq.heappop(self._leaves)
            node = entry[2]
            if not node.alive or node.children or node.used != entry[0] or node.pins:
                continue
            aside.append(entry)
            if node is not keep:
                found = node
        for entry in aside:
            heapq.heappush(self._leaves, entry)
        return found

    def pin(self, node: Node, by: int = 1) -> None:
        """Let a node stay, and with it those above; -1 takes one pin back."""
        node.pins += by
        self._pinned = {each for each in (*self._pinned, node) if each.pins}
        self._offer(node)

    def immovable(self, keep: Node | None) -> int:
        """Bytes of all nodes that cannot be evicted: the pinned ones, ``keep``, and those above them."""
        found: set[Node] = set()
        for each in (*self._pinned, keep):
            node: Node | None = each
            while node is not None and node not in found:
                found.add(node)
                node = node.parent
        return sum(node.size for node in found)

    def nodes(self) -> Iterator[Node]:
        """All nodes, without roots, in no order."""
        waiting = list(self.roots.values())
        while waiting:
            node = waiting.pop()
            waiting += node.children.values()
            if node.parent is not None:
                yield node

    def _offer(self, node: Node) -> None:
        """Note that a node may be a leaf now, at its present time of use."""
        if node.children or not node.alive or node.parent is None:
            return
        self._serial += 1
        heapq.heappush(self._leaves, (node.used, self._serial, node))
        if len(self._leaves) > 4 * self.count + 64:  # most entries are out of date
            self._leaves = [(each.used, number, each) for number, each in enumerate(self.nodes()) if not each.children]
            self._serial = len(self._leaves)
            heapq.heapify(self._leaves)
