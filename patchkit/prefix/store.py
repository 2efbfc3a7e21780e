"""The store of prompts: a tree, a bound on its bytes that holds at every moment, and eviction of the leaf that was used longest ago.

Zheng et al. 2023, "SGLang", https://arxiv.org/abs/2312.07104 (RadixAttention), has the tree and the order of eviction.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from patchkit.prefix.radix import Node, RadixTree


class PrefixStore:
    """Nodes within a bound of bytes. All methods may be called by several threads.

    Args:
        max_bytes: the bound, token ids included.
        hits: counters that it keeps: "bytes", "evictions", and "skipped", what was too large for the bound.
    """

    def __init__(self, max_bytes: int, hits: Counter[str]) -> None:
        self.max_bytes, self.hits = max_bytes, hits
        self.tree = RadixTree()
        self._lock = threading.RLock()

    @property
    def kept(self) -> int:
        """Bytes that are kept now."""
        return self.tree.bytes

    def find(self, namespace: Hashable, blocks: Sequence[bytes]) -> list[Node]:
        """Return the nodes of the longest known prefix, which count as used now."""
        with self._lock:
            path = self.tree.path(namespace, blocks)
            self.tree.use(path)
            return path

    def put(self, namespace: Hashable, parent: Node | None, block: bytes, size: int, make: Callable[[], Any]) -> Node | None:
        """Append a node with the value ``make()``, of ``size`` bytes, once there is room for it.

        Returns:
            The node, also if another thread has made it already; None if there is no room, or if ``parent`` was evicted meanwhile.
        """
        with self._lock:
            if parent is not None and not parent.alive:
                return None
            root = self.tree.roots.get(namespace) if parent is None else parent
            known = None if root is None else root.children.get(block)
            if known is not None:
                return known
            if not self._room(size + len(block), parent):
                return None
            node = self.tree.add(namespace, parent, block, make(), size)
            self.hits["bytes"] = self.tree.bytes
            return node

    def fill(self, node: Node, size: int, make: Callable[[], Any]) -> bool:
        """Replace a node's value by ``make()``, of ``size`` bytes, once there is room for it. Returns whether that was done."""
        with self._lock:
            if not node.alive or not self._room(size + len(node.block) - node.size, node):
                return False
            self.tree.fill(node, make(), size)
            self.hits["bytes"] = self.tree.bytes
            return True

    def pin(self, node: Node) -> None:
        """Never evict a node and those above it."""
        with self._lock:
            self.tree.pin(node)

    def unpin(self, keeps: Callable[[Any], bool]) -> None:
        """Take all pins back, except in the namespaces for which ``keeps`` is true."""
        with self._lock:
            gone = [root for name, root in self.tree.roots.items() if not keeps(name)]
            while gone:
                node = gone.pop()
                gone += node.children.values()
                if node.pins:
                    self.tree.pin(node, -node.pins)

    def clear(self) -> None:
        """Drop everything, pinned nodes too."""
        with self._lock:
            for node in self.tree.nodes():
                node.alive = False
            self.tree = RadixTree()
            self.hits["bytes"] = 0

    def _room(self, size: int, keep: Node | None) -> bool:
        """Evict until ``size`` more bytes fit; the leaf ``keep`` stays. What cannot fit evicts nothing."""
        if self.tree.bytes + size <= self.max_bytes:
            return True
        if size > self.max_bytes or self.tree.immovable(keep) + size > self.max_bytes:
            self.hits["skipped"] += 1
            return False
        while self.tree.bytes + size > self.max_bytes:
            oldest = self.tree.oldest(keep)
            assert oldest is not None  # what is left is immovable, and that fits
            self.tree.remove(oldest)
            self.hits["evictions"] += 1
            self.hits["bytes"] = self.tree.bytes
        return True
