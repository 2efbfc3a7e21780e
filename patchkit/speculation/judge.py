"""Judges decide which drafts are accepted, and draw the token after them: greedily, by rejection sampling, or row by row.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192, algorithm 1.

Shapes: R rows, T = 1 + n positions of a verification, V vocabulary. Node 0 is the last known token, node i the draft i.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

import torch

from patchkit.kernels.verify_prefix import verify_prefix
from patchkit.kernels.verify_prefix_sampled import verify_prefix_sampled
from patchkit.speculation.acceptance import Acceptance
from patchkit.speculation.constraint import Constraint, other_than_grammars
from patchkit.speculation.drafter import Proposal
from patchkit.speculation.row import Row
from patchkit.speculation.rows import Rows
from patchkit.speculation.tree import children_of


@dataclass
class Verdict:
    """The outcome of a round, a list per row.

    Attributes:
        tokens: the new tokens: accepted drafts and one token from the target, up to where the row ends.
        paths: the nodes from which these were predicted: 0, then the accepted drafts.
        accepted: number of accepted drafts.
    """

    tokens: list[list[int]]
    paths: list[list[int]]
    accepted: list[int]


class Judge(Protocol):
    """The interface of judges: `judge` takes a proposal and the target's logits [R, T, V], and appends accepted tokens to every row."""

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict: ...


def judge_for(rows: Rows, acceptance: Acceptance) -> Judge:
    """Choose the judge of a batch: for all rows at once where no processor needs earlier tokens, otherwise row by row."""
    row_by_row = RowByRow(rows, acceptance)
    if not acceptance.lossless or any(row.keeps_scores or row.keeps_logits for row in rows.rows):
        return row_by_row
    if rows.draws_freely:
        return Sampled(rows, row_by_row) if rows.processors_see_scores_only else row_by_row
    if any(row.sampled for row in rows.rows):
        return row_by_row
    if not any(len(row.given) for row in rows.rows):
        return Greedy(rows, row_by_row)
    if rows.constraint is not None and not any(other_than_grammars(row.given) for row in rows.rows):
        return Constrained(rows, rows.constraint)
    return row_by_row


class RowByRow:
    """A judge that follows the drafts of each row token by token, like plain decoding. It serves every call, trees and lossy policies."""

    def __init__(self, rows: Rows, acceptance: Acceptance) -> None:
        self.rows, self.acceptance = rows, acceptance

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        walks = [self.walk(row, proposal, logits[row]) for row in range(self.rows.state.rows)]
        return Verdict([new for new, _ in walks], [path for _, path in walks], [len(path) - 1 for _, path in walks])

    def walk(self, row: int, proposal: Proposal | None, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Return the new tokens of one row and the nodes that they were predicted from, given its logits [T, V]."""
        state, own = self.rows.state, self.rows.rows[row]
        drafts = [] if proposal is None else proposal.tokens[row].tolist()
        children = children_of(proposal, row)
        length, node = state.lengths[row], 0
        new: list[int] = []
        path = [0]
        while True:
            raw = logits[node : node + 1].to(copy=True, dtype=torch.float32)
            scores = own.processors(state.tokens[row : row + 1, : length + len(new)], raw)
            if own.keeps_scores:
                own.scores.append(scores[0])
            if own.keeps_logits:
                own.logits.append(logits[node].float())
            token, child = self._choose(scores[0], children.get(node, []), drafts, proposal, row)
            state.tokens[row, length + len(new)] = token
            new.append(token)
            own.finish = own.stops.after(state.tokens, row, length + len(new), token, own.scores if own.keeps_scores else None)
            if child is None or own.finish is not None:
                return new, path
            node = child
            path.append(node)

    def _choose(
        self, scores: torch.Tensor, children: list[int], drafts: list[int], proposal: Proposal | None, row: int
    ) -> tuple[int, int | None]:
        """Return the token after a node with these scores [V], and the drafted node that holds it; None if no node does."""
        own = self.rows.rows[row]
        if not self.acceptance.lossless:
            for child in children:
                if self.acceptance.accepts(scores, drafts[child - 1]):
                    return drafts[child - 1], child
            return _draw(own, scores), None
        if own.sampled and proposal is not None and proposal.probabilities is not None and children:
            child = children[0]
            token, draft = drafts[child - 1], proposal.probabilities[row, child - 1]
            target = scores.softmax(-1)
            if float(torch.rand((), dtype=torch.float32)) * float(draft[token]) < float(target[token]):
                return token, child
            rest = (target - draft).clamp_(min=0)
            # Where rounding leaves a sum of 0, target and draft are the same distribution.
            return int(torch.multinomial(rest if float(rest.sum()) > 0 else target, 1)), None
        # A deterministic draft is accepted if the target chooses the same token, which leaves greedy tokens and distributions unchanged.
        token = _draw(own, scores)
        return token, next((child for child in children if drafts[child - 1] == token), None)


def _draw(row: Row, scores: torch.Tensor) -> int:
    """Choose a row's next token by its processed scores [V]."""
    return int(torch.multinomial(scores.softmax(-1), 1, generator=row.generator)) if row.sampled else int(scores.argmax(-1))


class Greedy:
    """A judge that accepts the longest prefix of each chain of drafts which the target would have chosen, in all rows at once."""

    def __init__(self, rows: Rows, for_trees: RowByRow) -> None:
        self.rows, self.for_trees = rows, for_trees

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        if proposal is None:
            return accept(self.rows, [[token] for token in logits[:, 0].argmax(-1).tolist()])
        if proposal.parents is not None:
            return self.for_trees.judge(proposal, logits)
        choice, accepted = verify_prefix(logits, proposal.tokens, torch.tensor(proposal.counts, device=logits.device))
        return accept(self.rows, [chosen[: n + 1] for chosen, n in zip(choice.tolist(), accepted.tolist(), strict=True)])


class Constrained:
    """Accepts the longest prefix of each chain of drafts that is the likeliest token that the grammar allows.

    The argmax of the raw logits is that of the masked ones wherever it is allowed. Only elsewhere are all logits of a position masked and
    searched again; where one token is allowed none are looked at.
    """

    def __init__(self, rows: Rows, constraint: Constraint) -> None:
        self.rows, self.constraint = rows, constraint

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        self.constraint.check_width(logits.shape[-1])
        likeliest = logits.argmax(-1).tolist()
        return accept(self.rows, [self._walk(row, proposal, likeliest[row], logits[row]) for row in range(len(likeliest))])

    def _walk(self, row: int, proposal: Proposal | None, likeliest: list[int], logits: torch.Tensor) -> list[int]:
        """The new tokens of one row, given the likeliest tokens [T] and logits [T, V]."""
        drafts = [] if proposal is None else proposal.tokens[row, : proposal.counts[row]].tolist()
        new: list[int] = []
        while True:
            node = len(new)
            token = self.constraint.only[row][node]
            if token is None:
                token = likeliest[node]
                if not self.constraint.allows(row, node, token):
                    token = int(self.constraint.masked(row, node, logits[node : node + 1].float()).argmax(-1))
            new.append(token)
            if node == len(drafts) or drafts[node] != token:
                return new


class Sampled:
    """A judge by rejection sampling of drawn drafts, in all rows at once; it accepts deterministic drafts that the target draws too."""

    def __init__(self, rows: Rows, one_by_one: RowByRow) -> None:
        self.rows, self.one_by_one = rows, one_by_one

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        if proposal is not None and proposal.probabilities is not None:
            return self._reject(proposal, proposal.probabilities, logits)
        # A single row is drawn token by token, so that a seed gives the same tokens with and without drafts.
        if len(logits) == 1 or (proposal is not None and proposal.parents is not None):
            return self.one_by_one.judge(proposal, logits)
        choice = torch.multinomial(self._target(logits).flatten(0, 1), 1).view(logits.shape[:2]).tolist()
        drafts = [[]] * len(choice) if proposal is None else proposal.tokens.tolist()
        counts = [0] * len(choice) if proposal is None else proposal.counts
        new = []
        for chosen, draft, count in zip(choice, drafts, counts, strict=True):
            new.append(chosen[: 1 + next((i for i in range(count) if draft[i] != chosen[i]), count)])
        return accept(self.rows, new)

    def _reject(self, proposal: Proposal, probabilities: torch.Tensor, logits: torch.Tensor) -> Verdict:
        rows, positions = logits.shape[:2]
        counts = torch.tensor(proposal.counts, device=logits.device)
        draws = functools.partial(torch.rand, dtype=torch.float32, device=logits.device)  # whatever the default dtype is
        accept_draws, following_draw = draws(rows, positions - 1), draws(rows)
        accepted, following = verify_prefix_sampled(
            self._target(logits), probabilities, proposal.tokens, counts, accept_draws, following_draw
        )
        drafted = zip(proposal.tokens.tolist(), accepted.tolist(), following.tolist(), strict=True)
        return accept(self.rows, [[*drafts[:n], last] for drafts, n, last in drafted])

    def _target(self, logits: torch.Tensor) -> torch.Tensor:
        """Distribution [R, T, V] float32 from which the target draws at each position."""
        scores = self.rows.shared_processors(self.rows.state.tokens[:1, :1], logits.flatten(0, 1).to(copy=True, dtype=torch.float32))
        return scores.softmax(-1).view(logits.shape)


def accept(rows: Rows, new: list[list[int]]) -> Verdict:
    """Append new tokens to each row, accepted drafts of a chain and the target's token after them, and return the verdict."""
    paths = [list(range(len(tokens))) for tokens in new]
    return Verdict([rows.append(row, tokens) for row, tokens in enumerate(new)], paths, [len(path) - 1 for path in paths])
