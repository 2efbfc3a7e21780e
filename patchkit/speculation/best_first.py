"""Trees of drafts that grow where acceptance is likeliest: the n nodes whose paths are most probably accepted.

Wang et al. 2024, "OPT-Tree", https://arxiv.org/abs/2406.17276: the expected number of accepted drafts of a tree is the sum, over its nodes,
of the probability that the node's whole path is accepted. A path is never likelier than its beginning, so a search that always takes the
likeliest open node next finds the best tree of every size on its way.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from patchkit.speculation.drafter import Proposal

S = TypeVar("S")


@dataclass
class Tree:
    """The drafts of one row, likeliest paths first, so that the first n are the best tree of n nodes.

    Attributes:
        tokens: of each node.
        parents: as in `Proposal.parents`.
        chances: of each node, the estimated probability that it is accepted when its parent is.
        kinds: of each node, drafts whose acceptance is estimated together with its own, for drafters that need to know it later.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    kinds: list[Hashable] = field(default_factory=list)

    def add(self, token: int, parent: int, chance: float, kind: Hashable = None) -> int:
        """Append a node; return its number, from 0 on."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.chances.append(chance)
        self.kinds.append(kind)
        return len(self.tokens) - 1

    def outcomes(self, following: list[int]) -> Iterator[tuple[int, bool]]:
        """Yield the nodes whose parents are on the path of the tokens that followed, and whether each is on it too."""
        path, on_path = -1, iter(following)
        while (token := next(on_path, None)) is not None:
            children = [node for node, parent in enumerate(self.parents) if parent == path]
            path = len(self.tokens)
            for node in children:
                accepted = self.tokens[node] == token
                yield node, accepted
                path = node if accepted else path


def best_tree(start: S, children: Callable[[S], Iterable[tuple[int, Hashable, float, S]]], most: int, chain: bool = False) -> Tree:
    """Grow the tree of at most ``most`` nodes with the largest expected number of accepted drafts.

    Args:
        start: what ``children`` needs to know of the last known token.
        children: tokens that may follow a node, each with its kind, its chance of acceptance, 0 to 1, and what is to be known of it.
        chain: take the likeliest child of each node only, for caches that cannot verify trees.
    """
    tree = Tree()
    order = itertools.count()  # decides between equals, so that nothing else of the entries is compared
    waiting: list[tuple[float, int, int, int, Hashable, float, S]] = []
    node, probability, known = -1, 1.0, start
    while len(tree.tokens) < most:
        offered = list(children(known))
        for token, kind, chance, state in [max(offered, key=_chance)] if chain and offered else offered:
            heapq.heappush(waiting, (-probability * chance, next(order), node, token, kind, chance, state))
        if not waiting:
            break
        negative, _, parent, token, kind, chance, known = heapq.heappop(waiting)
        node, probability = tree.add(token, parent, chance, kind), -negative
    return tree


def _chance(child: tuple[int, Hashable, float, S]) -> float:
    return child[2]


def proposal_of(trees: list[Tree], device: torch.device) -> Proposal | None:
    """Put the trees of all rows into one proposal, as chains where all of them are; None if none has a node."""
    counts = [len(tree.tokens) for tree in trees]
    longest = max(counts)
    if not longest:
        return None
    tokens = torch.tensor([tree.tokens + [0] * (longest - len(tree.tokens)) for tree in trees], device=device)
    parents = None
    if any(tree.parents != list(range(-1, len(tree.parents) - 1)) for tree in trees):
        parents = [(*tree.parents, *[-1] * (longest - len(tree.parents))) for tree in trees]
    return Proposal(tokens, counts, parents=parents, chances=[tree.chances for tree in trees])
