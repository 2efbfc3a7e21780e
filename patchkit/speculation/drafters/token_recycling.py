"""Token recycling: what the model found likely after a token when it last saw it is drafted after that token again, as a tree.

Luo et al. 2024, "Turning Trash into Treasure", https://arxiv.org/abs/2408.08696. Differs from it in that

* what follows a token in the prompt comes first, before the model has seen the token with what it makes of it,
* and the tree is not a fixed one: it has the nodes whose paths are most probably accepted, by the acceptance of each rank so far, and the
  controller cuts it where further nodes cost more than they bring.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from patchkit.speculation.best_first import Tree, best_tree, proposal_of
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.speculation.successors import Successors

if TYPE_CHECKING:
    from patchkit.anatomy.target import Target

# Acceptance of each rank before anything was learned; of further ranks the last.
_PRIORS = (0.45, 0.12, 0.06, 0.04, 0.03, 0.02)


@dataclass(frozen=True)
class TokenRecycling(Drafter, name="token_recycling"):
    """Draft a tree of the tokens that the model found likeliest after each token the last time. Needs no training.

    Args:
        scope: "model" remembers the calls of the patched model, until its weights change; "call" only the call itself.
        width: tokens that are remembered after each token of the vocabulary, at 4 bytes each.

    Raises:
        ValueError: an option out of range.
    """

    example = "token_recycling"

    scope: str = "model"
    width: int = 8

    def __post_init__(self) -> None:
        if self.scope not in ("model", "call"):
            raise ValueError(f"scope={self.scope!r}: give 'model' or 'call'")
        if not isinstance(self.width, int) or isinstance(self.width, bool) or self.width < 1:
            raise ValueError(f"width={self.width!r}: give a whole number of tokens, at least 1")

    def prepared(self, target: Target) -> Drafter:
        return RememberingRecycling(self, Successors(self.width), Calibration())

    def begin(self, model: Any, state: State) -> Session:
        return RecyclingSession(Successors(self.width), Calibration(), state)

    def __str__(self) -> str:
        return f"token_recycling({self.scope})"


@dataclass(frozen=True, eq=False)
class RememberingRecycling(Drafter):
    """Token recycling for one patched model, with what its calls have in common."""

    options: TokenRecycling
    successors: Successors
    calibration: Calibration

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        """Return a drafter that has seen nothing: the distributions were those of other weights."""
        return dataclasses.replace(self, successors=Successors(self.options.width), calibration=Calibration())

    def begin(self, model: Any, state: State) -> Session:
        successors = Successors(self.options.width) if self.options.scope == "call" else self.successors
        return RecyclingSession(successors, self.calibration, state)

    def __str__(self) -> str:
        return str(self.options)


@dataclass
class _Drafted:
    """The last drafts of one row.

    Attributes:
        length: of the row when it was drafted.
        tree: its nodes.
        offered: of the nodes that were expanded, the last known token first, their successors by rank.
    """

    length: int
    tree: Tree
    offered: list[list[int]]


class RecyclingSession(Session):
    """One call, whose rows write to one matrix and draft from it."""

    estimates = wants_logits = True

    def __init__(self, successors: Successors, calibration: Calibration, state: State) -> None:
        self.successors, self.calibration = successors, calibration
        self.drafted: list[_Drafted | None] = [None] * state.rows
        for row in range(state.rows):
            self.successors.read(state.text(row).tolist())

    def propose(self, state: State, k: int) -> Proposal | None:
        for row in range(state.rows):
            self._learn(state, row)
        chances = [self.calibration.chance(rank, _PRIORS[min(rank, len(_PRIORS) - 1)]) for rank in range(self.successors.width)]
        trees = [self._tree(state, row, k, chances) for row in range(state.rows)]
        return proposal_of(trees, state.tokens.device)

    def observe_logits(self, tokens: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:
        likeliest = logits.topk(min(self.successors.width, logits.shape[-1]), dim=-1).indices
        fed = torch.arange(tokens.shape[1], device=tokens.device) < torch.tensor(counts, device=tokens.device)[:, None]
        self.successors.update(tokens[fed], likeliest[fed], logits.shape[-1])

    def join(self, other: Any) -> None:
        self.drafted = self.drafted + other.drafted

    def select_rows(self, rows: list[int]) -> None:
        self.drafted = [self.drafted[row] for row in rows]

    def _tree(self, state: State, row: int, k: int, chances: list[float]) -> Tree:
        offered: list[list[int]] = []

        def children(token: int) -> Iterator[tuple[int, int, float, int]]:
            offered.append(self.successors.after(token))
            return ((each, rank, chances[rank], each) for rank, each in enumerate(offered[-1]))

        length = state.lengths[row]
        tree = best_tree(int(state.tokens[row, length - 1]), children, k, chain=not state.trees)
        self.drafted[row] = _Drafted(length, tree, offered)
        return tree

    def _learn(self, state: State, row: int) -> None:
        """Follow the row's new tokens through its last tree, and learn which ranks they had."""
        drafted = self.drafted[row]
        if drafted is None:
            return
        node = -1
        for token in state.tokens[row, drafted.length : state.lengths[row]].tolist():
            if node + 1 == len(drafted.offered):
                break
            for rank, each in enumerate(drafted.offered[node + 1]):
                self.calibration.add(rank, each == token)
            tree = drafted.tree
            following = [i for i, parent in enumerate(tree.parents) if parent == node and tree.tokens[i] == token]
            if not following:
                break
            node = following[0]
        self.drafted[row] = None
