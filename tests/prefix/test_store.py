"""The tree and its bound, against a model that is a plain dict of prefixes."""

from __future__ import annotations

import random
import threading
from collections import Counter

import pytest

from patchkit.prefix.radix import Node, RadixTree, blocks_of
from patchkit.prefix.store import PrefixStore

BLOCK, BOUND = 2, 2000
OF_TOKENS = 8 * BLOCK


class Model:
    """Kept prefixes (namespace, tokens) with size and last use: the oldest that no longer one continues goes first."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        self.pinned: set[tuple[str, tuple[int, ...]]] = set()
        self.clock = self.evictions = self.skipped = 0

    @property
    def bytes(self) -> int:
        return sum(size for size, _ in self.kept.values())

    def find(self, space: str, ids: tuple[int, ...]) -> int:
        depth = 0
        while depth + BLOCK <= len(ids) and (space, ids[: depth + BLOCK]) in self.kept:
            depth += BLOCK
        self.clock += 1
        for end in range(BLOCK, depth + 1, BLOCK):
            self.kept[space, ids[:end]][1] = self.clock
        return depth

    def above(self, space: str, ids: tuple[int, ...]) -> set[tuple[str, tuple[int, ...]]]:
        return {(space, ids[:end]) for end in range(BLOCK, len(ids) + 1, BLOCK)}

    def put(self, space: str, ids: tuple[int, ...], size: int) -> bool:
        parent = (space, ids[:-BLOCK])
        fixed = self.above(*parent).union(*(self.above(*each) for each in self.pinned))
        if self.bytes + size > BOUND and sum(self.kept[each][0] for each in fixed) + size > BOUND:
            self.skipped += 1
            return False
        while self.bytes + size > BOUND:
            inner = {(name, tokens[:-BLOCK]) for name, tokens in self.kept}
            leaves = [each for each in self.kept if each not in inner and each not in fixed]
            del self.kept[min(leaves, key=lambda each: self.kept[each][1])]
            self.evictions += 1
        used = self.kept[parent][1] if len(parent[1]) else self.clock
        self.kept[space, ids] = [size, used]
        return True


def prefixes(tree: RadixTree) -> dict[tuple[str, tuple[int, ...]], int]:
    """Sizes of all nodes of a tree, by namespace and tokens."""
    found = {}
    for space, root in tree.roots.items():
        waiting: list[tuple[Node, tuple[bytes, ...]]] = [(root, ())]
        while waiting:
            node, path = waiting.pop()
            if path:
                tokens = tuple(int.from_bytes(part[i : i + 8], "little") for part in path for i in range(0, OF_TOKENS, 8))
                found[str(space), tokens] = node.size
            waiting += [(child, (*path, block)) for block, child in node.children.items()]
    return found


def test_ten_thousand_random_operations_keep_what_the_model_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, model, hits = random.Random(0), Model(), Counter[str]()
    store = PrefixStore(BOUND, hits)
    seen = []
    for name in ("add", "fill"):
        method = getattr(RadixTree, name)

        def watched(self: RadixTree, *args: object, method=method) -> object:
            result = method(self, *args)
            seen.append(self.bytes)
            return result

        monkeypatch.setattr(RadixTree, name, watched)
    for number in range(10_000):
        space = chance.choice("ab")
        ids = tuple(chance.randrange(2) for _ in range(chance.choice((2, 4, 6, 8, 10))))
        blocks = blocks_of(ids, BLOCK, len(ids) // BLOCK)
        path = store.find(space, blocks)
        depth = model.find(space, ids)
        assert len(path) * BLOCK == depth
        node = path[-1] if path else None
        while depth < len(ids):  # feed the rest
            depth += BLOCK
            size = chance.choice((20, 100, 300, 2100 if number % 50 == 0 else 40))
            node = store.put(space, node, blocks[depth // BLOCK - 1], size, lambda: object())
            assert (node is not None) == model.put(space, ids[:depth], size + OF_TOKENS)
            if node is None:
                break
        if number % 100 == 7 and node is not None and len(model.pinned) < 3:
            store.pin(node)
            model.pinned.add((space, ids[:depth]))
        if number % 400 == 399:
            store.unpin(lambda name: False)
            model.pinned.clear()
        assert store.kept == model.bytes <= BOUND
        if number % 50 == 0:
            assert prefixes(store.tree) == {each: size for each, (size, _) in model.kept.items()}
    assert max(seen) <= BOUND and max(seen) > BOUND // 2
    assert hits["evictions"] == model.evictions > 1000 and hits["skipped"] == model.skipped > 10


def test_the_oldest_leaf_goes_first_and_what_is_too_large_evicts_nothing() -> None:
    hits = Counter[str]()
    store = PrefixStore(3 * (100 + OF_TOKENS), hits)
    a, b, c, d = blocks_of(range(8), BLOCK, 4)
    for block in (a, b, c):
        assert store.put("x", None, block, 100, object) is not None
    store.find("x", [a])
    assert store.put("x", None, d, 400, object) is None and store.tree.count == 3 and hits["skipped"] == 1
    store.put("x", None, d, 100, object)
    assert set(store.tree.roots["x"].children) == {a, c, d} and hits["evictions"] == 1
    node = store.find("x", [c])[0]
    assert store.fill(node, 200, object) and set(store.tree.roots["x"].children) == {c, d}
    assert not store.fill(node, 400, object) and store.tree.count == 2
    store.pin(node)
    assert store.put("x", None, a, 250, object) is None and hits["skipped"] == 3
    store.clear()
    assert store.kept == 0 == hits["bytes"] and not node.alive and store.put("x", node, a, 100, object) is None


def test_an_evicted_node_is_not_built_on() -> None:
    store = PrefixStore(2 * (100 + OF_TOKENS), Counter())
    a, b, c = blocks_of(range(6), BLOCK, 3)
    node = store.put("x", None, a, 100, object)
    store.put("x", None, b, 100, object)
    store.put("x", None, c, 100, object)
    assert node is not None and not node.alive and store.put("x", node, b, 10, object) is None


def test_threads_share_a_store() -> None:
    store, failed = PrefixStore(5000, Counter()), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            for _ in range(400):
                ids = [chance.randrange(2) for _ in range(8)]
                blocks = blocks_of(ids, BLOCK, 4)
                path = store.find("x", blocks)
                node = path[-1] if path else None
                for block in blocks[len(path) :]:
                    node = store.put("x", node, block, 300, object)
                    if node is None:
                        break
                assert store.kept <= 5000
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and store.kept == sum(node.size for node in store.tree.nodes()) > 0
