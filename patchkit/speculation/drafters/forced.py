"""Drafts from a grammar: where it leaves one token, that token is drafted without asking anybody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.speculation.constraint import Constraint
from patchkit.speculation.drafter import Drafter, Proposal, Session, State
from patchkit.speculation.tree import trunk

# A verification of 17 tokens is the longest for which there is a compiled step.
LONGEST_FORCED = 16

Worth = Callable[[Sequence[Sequence[float]]], int]


@dataclass(frozen=True, eq=False)
class Forced(Drafter):
    """Draft what the grammar forces; elsewhere let another drafter propose, and cut its chain at the first token that is not allowed.

    What the grammar forces after the end of a chain is appended to it. The loop puts this in front of the configured drafter in calls of
    `generate` with a `Grammar`.

    Args:
        other: the configured drafter.
        constraint: the grammars of the rows of the call.
        worth: the controller's, which cuts drafts that come with chances: see `ControllerSession.worth`.
    """

    other: Drafter
    constraint: Constraint
    worth: Worth

    def begin(self, model: Any, state: State) -> Session:
        return ForcedSession(self.other.begin(model, state), self.constraint, self.worth)


class ForcedSession(Session):
    """The other drafter's session.

    Attributes:
        forced: whether the last proposal had tokens that the grammar forced.
        room: tokens that every row may still get besides the target's own; set before each proposal.
    """

    def __init__(self, other: Session, constraint: Constraint, worth: Worth) -> None:
        self.other, self.constraint, self.worth = other, constraint, worth
        self.wants_hidden, self.wants_logits = other.wants_hidden, other.wants_logits
        self.aligned, self.estimates = other.aligned, other.estimates
        self.layers = other.layers
        self.forced, self.room = False, 0

    def propose(self, state: State, k: int) -> Proposal | None:
        """Return the round's drafts, and leave their masks in the constraint; ``k`` counts the other drafter's tokens only."""
        constraint = self.constraint
        constraint.follow(state)
        most = min(self.room, LONGEST_FORCED)
        drafts = [constraint.forced(row, most) if most > 0 else [] for row in range(state.rows)]
        self.forced = any(drafts)
        proposal = self.other.propose(state, k) if k > 0 and not all(drafts) else None
        if proposal is None:
            return self._proposal(state, drafts)
        constraint.follow(state)  # drafting may have moved the parsers
        proposal = trunk(proposal)
        own = [row for row, draft in enumerate(drafts) if not draft]
        for row in own:
            drafts[row] = proposal.tokens[row, : min(proposal.counts[row], k)].tolist()
        counts = constraint.fill(drafts)
        drafts = [draft[:count] for draft, count in zip(drafts, counts, strict=True)]
        followed = {row for row in own if len(drafts[row]) < most and constraint.only[row][len(drafts[row])] is not None}
        self.forced = self.forced or bool(followed)
        chances = proposal.chances
        if chances is not None:
            chances = [chances[row][: len(draft)] for row, draft in enumerate(drafts)]
            if self.forced:  # certain tokens are not for the controller to weigh
                kept = self.worth([chances[row] for row in own])
                followed = {row for row in followed if len(drafts[row]) <= kept}
                drafts = [draft[:kept] if row in own else draft for row, draft in enumerate(drafts)]
                chances = None
        lengths = [len(draft) if row in own else 0 for row, draft in enumerate(drafts)]
        for row in followed:
            drafts[row] = drafts[row] + constraint.forced(row, most - len(drafts[row]), after=drafts[row])
        probabilities = None if proposal.probabilities is None else _with_forced(proposal.probabilities, drafts, lengths)
        return self._proposal(state, drafts, probabilities, chances)

    def _proposal(
        self,
        state: State,
        drafts: list[list[int]],
        probabilities: torch.Tensor | None = None,
        chances: list[list[float]] | None = None,
    ) -> Proposal | None:
        """The drafts of each row as far as they are allowed; their masks stay in the constraint."""
        counts = self.constraint.fill(drafts)
        longest = max(counts)
        if not longest:
            return None
        padded = [(draft[:count] + [0] * longest)[:longest] for draft, count in zip(drafts, counts, strict=True)]
        tokens = torch.tensor(padded, device=state.tokens.device)
        return Proposal(tokens, counts, None if probabilities is None else probabilities[:, :longest], chances=chances)

    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:
        self.other.observe(hidden, counts)

    def finished(self, state: State, rows: list[int]) -> None:
        self.other.finished(state, rows)

    def join(self, other: Any) -> None:
        self.other.join(other.other)
        self.constraint.join(other.constraint)

    def observe_logits(self, tokens: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:
        self.other.observe_logits(tokens, logits, counts)

    def select_rows(self, rows: list[int]) -> None:
        self.other.select_rows(rows)
        self.constraint.select_rows(rows)

    def close(self, state: State) -> None:
        self.other.close(state)


def _with_forced(probabilities: torch.Tensor, drafts: list[list[int]], lengths: list[int]) -> torch.Tensor:
    """The distributions [R, n, V] that drafts were drawn from; from each row's ``lengths`` on they are certain."""
    longest = max(map(len, drafts))
    result = probabilities.new_zeros(len(drafts), max(longest, 1), probabilities.shape[-1])
    for row, (draft, length) in enumerate(zip(drafts, lengths, strict=True)):
        result[row, :length] = probabilities[row, :length]
        for i in range(length, len(draft)):
            result[row, i, draft[i]] = 1.0
    return result
