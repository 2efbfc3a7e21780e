"""Trees of drafts from an EAGLE head: of all paths, those that the head finds likeliest.

Li et al. 2024, "EAGLE-2", https://arxiv.org/abs/2406.16858. Differs from it in that no number of nodes per depth is given: a node is
expanded if one of its children could be among the n likeliest, so the tree is the best of its size, as deep as the head is sure.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.speculation.best_first import Tree, proposal_of
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import Proposal, State
from patchkit.speculation.eagle_chain import EagleChain
from patchkit.speculation.heads.eagle import EagleHead

# Drafts are of one kind if the head's probability of them is in the same tenth.
_KINDS = 10


@dataclass
class _Node:
    """A token that may be drafted.

    Attributes:
        kind: of drafts whose acceptance is estimated together.
        chance, probability: of acceptance, after its parent and of the whole path.
        column: of the last forward in which its parent was expanded, where the parent's output is.
        ancestors: columns of the expanded nodes on its path, itself included once it is expanded.
    """

    token: int
    parent: _Node | None
    kind: int
    chance: float
    probability: float
    column: int
    ancestors: list[int] = field(default_factory=list)


class EagleTree(EagleChain):
    """Drafts the n paths that the head finds likeliest, level by level: one forward of the head for each depth."""

    estimates = True

    def __init__(self, head: EagleHead, model: Any, state: State, calibration: Calibration) -> None:
        super().__init__(head, model, state)
        self.calibration = calibration
        self.drafted: list[tuple[int, Tree] | None] = [None] * state.rows  # the length of each row when it was drafted for

    @torch.no_grad()
    def propose(self, state: State, k: int) -> Proposal | None:
        if self.features is None:
            return None
        for row in range(state.rows):
            self._learn(state, row)
        new = [max(1, known - entered) for known, entered in zip(self.known, self.entered, strict=True)]
        hidden = self._catch_up(state, new)
        roots: list[list[_Node | None]] = [[None]] * state.rows
        pools = self._children(roots, hidden, k)
        level, columns = [_worth_expanding(pool, pool, k) for pool in pools], 0
        while any(level):
            hidden = self._expand(level, hidden, columns)
            columns += hidden.shape[1]
            born = self._children(level, hidden, k)
            for pool, nodes in zip(pools, born, strict=True):
                pool += nodes
            level = [_worth_expanding(nodes, pool, k) for nodes, pool in zip(born, pools, strict=True)]
        trees = [_tree(pool, k) for pool in pools]
        self.drafted = list(zip(state.lengths, trees, strict=True))
        return proposal_of(trees, state.tokens.device)

    def join(self, other: Any) -> None:
        super().join(other)
        self.drafted = self.drafted + other.drafted

    def select_rows(self, rows: list[int]) -> None:
        super().select_rows(rows)
        self.drafted = [self.drafted[row] for row in rows]

    def _learn(self, state: State, row: int) -> None:
        """Learn from the row's new tokens how often drafts of which the head was so sure are accepted."""
        drafted, self.drafted[row] = self.drafted[row], None
        if drafted is not None:
            length, tree = drafted
            for node, accepted in tree.outcomes(state.tokens[row, length : state.lengths[row]].tolist()):
                self.calibration.add(tree.kinds[node], accepted)

    def _children(self, level: Sequence[Sequence[_Node | None]], hidden: torch.Tensor, k: int) -> list[list[_Node]]:
        """The ``k`` likeliest children of each node of a level, given the head's outputs [R, W, D] for them."""
        likeliest = self.lm_head(hidden).float().softmax(-1)
        likeliest = likeliest.topk(min(k, likeliest.shape[-1]), dim=-1)
        tokens, sure = likeliest.indices.tolist(), likeliest.values.tolist()
        return [
            [
                self._child(node, token, probability, column)
                for column, node in enumerate(nodes)
                for token, probability in zip(tokens[row][column], sure[row][column], strict=True)
            ]
            for row, nodes in enumerate(level)
        ]

    def _child(self, parent: _Node | None, token: int, probability: float, column: int) -> _Node:
        kind = min(int(_KINDS * probability), _KINDS - 1)
        chance = self.calibration.chance(kind, probability)
        return _Node(token, parent, kind, chance, chance if parent is None else chance * parent.probability, column)

    def _expand(self, level: list[list[_Node]], hidden: torch.Tensor, columns: int) -> torch.Tensor:
        """Run the head on a level of nodes, of which ``hidden`` [R, W, D] has their parents' outputs; return [R, widest row, D].

        Node j of a level gets the slot ``columns + j`` after the row's known ones. Rows with fewer nodes compute on filler, in slots that
        no node sees.
        """
        device, width = hidden.device, max(map(len, level))
        blank = [[False] * (columns + width) for _ in range(width)]
        on_path, tokens, source, depths = [], [], [], []
        for nodes in level:
            paths = [list(each) for each in blank]
            for j in range(width):
                paths[j][columns + j] = True
            for j, node in enumerate(nodes):
                node.ancestors = [*(node.parent.ancestors if node.parent is not None else []), columns + j]
                for column in node.ancestors:
                    paths[j][column] = True
            filler = width - len(nodes)
            on_path.append(paths)
            tokens.append([node.token for node in nodes] + [0] * filler)
            source.append([node.column for node in nodes] + [0] * filler)
            depths.append([len(node.ancestors) - 1 for node in nodes] + [0] * filler)
        known = torch.tensor(self.known, device=device)[:, None]
        total = max(self.known) + columns + width
        self.memory.reserve(total)
        nearest = torch.arange(total, device=device) - known  # [R, S], the column in each slot, negative in slots of the text
        drafted = torch.tensor(on_path, device=device)
        there = nearest.clamp(0, columns + width - 1)[:, None].expand(-1, width, -1)
        visible = (drafted.gather(2, there) & (nearest < columns + width)[:, None]) | (nearest < 0)[:, None]
        slots = known + columns + torch.arange(width, device=device)
        features = hidden.gather(1, torch.tensor(source, device=device)[..., None].expand(-1, -1, hidden.shape[-1]))
        embedded = self.embed(torch.tensor(tokens, device=device))
        found: torch.Tensor = self.head(embedded, features, self.memory, slots, known + torch.tensor(depths, device=device), visible)
        return found


def _worth_expanding(nodes: list[_Node], pool: list[_Node], k: int) -> list[_Node]:
    """Those nodes of the last level of which a child could be among the ``k`` likeliest of all."""
    least = heapq.nlargest(k, (node.probability for node in pool))[-1] if len(pool) >= k else 0.0
    return [node for node in nodes if node.probability > least]


def _tree(pool: list[_Node], k: int) -> Tree:
    """The ``k`` likeliest nodes, in this order; of equals the earlier, which a parent is."""
    tree = Tree()
    numbers: dict[int, int] = {}
    for node in sorted(pool, key=lambda node: -node.probability)[:k]:
        parent = -1 if node.parent is None else numbers[id(node.parent)]
        numbers[id(node)] = tree.add(node.token, parent, node.chance, node.kind)
    return tree
