"""Which drafts are accepted, and what follows them: greedily, drawn, or row by row.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", https://arxiv.org/abs/2211.17192, algorithm 1.

Shapes: R rows, T = 1 + n positions of a verification, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from patchkit.kernels.verify_prefix import verify_prefix, verify_prefix_sampled
from patchkit.speculation.acceptance import Acceptance
from patchkit.speculation.drafter import Proposal, State
from patchkit.speculation.shared import Speculation
from patchkit.speculation.stops import BY_SCORES, Stops
from patchkit.speculation.tree import children_of


class Judge:
    """The part of a call of `generate` that judges drafts, on the state that the call keeps.

    Attributes:
        state: texts and lengths of the rows.
        stops: when a text ends.
        processors, row_processors, draft_processors: of logits: as they were given; for each row; and those of each row that may see
            what is only drafted.
        sampled: tokens are drawn, not the likeliest ones taken.
        active: the batch's number of each row that is still generating.
        done: of each row, whether its text has ended in this round.
        keeps_scores, keeps_logits, scores, logits: what `generate` was asked to return of each position.
    """

    speculation: Speculation
    state: State
    stops: Stops
    processors: Any
    row_processors: list[Any]
    draft_processors: list[Any]
    sampled: bool
    active: list[int]
    done: list[bool]
    keeps_scores: bool
    keeps_logits: bool
    scores: list[list[torch.Tensor]]
    logits: list[list[torch.Tensor]]

    def judge(self, proposal: Proposal | None, logits: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Append to every row what stands, up to where a text stops.

        Returns:
            Of each row, the new tokens, and the nodes from which they were predicted: 0, then the accepted drafts.
        """
        rows, exact = self.state.rows, self.speculation.acceptance.lossless
        plain = not self.sampled and exact and not len(self.processors)
        if plain and (proposal is None or proposal.parents is None) and not self.keeps_scores and not self.keeps_logits:
            if proposal is None:
                return [self._append(row, [token]) for row, token in enumerate(logits[:, 0].argmax(-1).tolist())], [[0]] * rows
            counts = torch.tensor(proposal.counts, device=logits.device)
            choice, accepted = verify_prefix(logits, proposal.tokens, counts)
            chosen, lengths = choice.tolist(), accepted.tolist()
            return [self._append(row, chosen[row][: n + 1]) for row, n in enumerate(lengths)], [list(range(n + 1)) for n in lengths]
        if self.sampled and exact and not (self.keeps_scores or self.keeps_logits) and self._looks_at_scores_only():
            if proposal is not None and proposal.probabilities is not None:
                return self._judge_drawn(proposal, logits)
            # One text alone is drawn token by token, so that a seed gives what it gives without drafts.
            if rows > 1 and (proposal is None or proposal.parents is None):
                return self._judge_chosen(proposal, logits)
        judged = [self._judge_row(row, proposal, logits[row]) for row in range(rows)]
        return [new for new, _ in judged], [path for _, path in judged]

    def _looks_at_scores_only(self) -> bool:
        """Whether no processor asks which tokens came before, so that all positions can be processed at once."""
        return all(type(each).__name__ in BY_SCORES for each in self.processors)

    def _target(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, T, V] what the target draws from at each position, by processors that look at scores only."""
        scores = self.processors(self.state.tokens[:1, :1], logits.flatten(0, 1).to(copy=True, dtype=torch.float32))
        return scores.softmax(-1).view(logits.shape)

    def _judge_chosen(self, proposal: Proposal | None, logits: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Draw at every position; drafts that were chosen, not drawn, stand as far as they are what is drawn."""
        choice = torch.multinomial(self._target(logits).flatten(0, 1), 1).view(logits.shape[:2]).tolist()
        drafts = [[]] * len(choice) if proposal is None else proposal.tokens.tolist()
        counts = [0] * len(choice) if proposal is None else proposal.counts
        lengths = []
        for chosen, draft, count in zip(choice, drafts, counts, strict=True):
            lengths.append(next((i for i in range(count) if draft[i] != chosen[i]), count))
        texts = [self._append(row, choice[row][: n + 1]) for row, n in enumerate(lengths)]
        return texts, [list(range(n + 1)) for n in lengths]

    def _judge_drawn(self, proposal: Proposal, logits: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """The rejection rule for all rows at once."""
        assert proposal.probabilities is not None
        rows, positions = logits.shape[:2]
        counts = torch.tensor(proposal.counts, device=logits.device)
        draws = functools.partial(torch.rand, dtype=torch.float32, device=logits.device)  # whatever the default dtype is
        accept, following = draws(rows, positions - 1), draws(rows)
        accepted, following = verify_prefix_sampled(
            self._target(logits), proposal.probabilities, proposal.tokens, counts, accept, following
        )
        lengths = accepted.tolist()
        drafts, last = proposal.tokens.tolist(), following.tolist()
        texts = [self._append(row, [*drafts[row][:n], last[row]]) for row, n in enumerate(lengths)]
        return texts, [list(range(n + 1)) for n in lengths]

    def _judge_row(self, row: int, proposal: Proposal | None, logits: torch.Tensor) -> tuple[list[int], list[int]]:
        """Walk down the drafts of one row, token by token, as plain decoding would."""
        state, acceptance, number = self.state, self.speculation.acceptance, self.active[row]
        drafts = [] if proposal is None else proposal.tokens[row].tolist()
        children = children_of(proposal, row)
        length, node = state.lengths[row], 0
        new: list[int] = []
        path = [0]
        while True:
            raw = logits[node : node + 1].to(copy=True, dtype=torch.float32)
            scores = self.row_processors[number](state.tokens[row : row + 1, : length + len(new)], raw)
            if self.keeps_scores:
                self.scores[number].append(scores[0])
            if self.keeps_logits:
                self.logits[number].append(logits[node].float())
            token, child = self._choose(scores[0], children.get(node, []), drafts, proposal, row, acceptance)
            state.tokens[row, length + len(new)] = token
            new.append(token)
            kept = self.scores[number] if self.keeps_scores else None
            self.done[row] = self.stops.after(state.tokens, row, length + len(new), token, kept)
            if child is None or self.done[row]:
                return new, path
            node = child
            path.append(node)

    def _choose(
        self, scores: torch.Tensor, children: list[int], drafts: list[int], proposal: Proposal | None, row: int, acceptance: Acceptance
    ) -> tuple[int, int | None]:
        """The token after a node, given its scores [V], and the drafted node that holds it, if one does."""
        if not acceptance.lossless:
            for child in children:
                if acceptance.accepts(scores, drafts[child - 1]):
                    return drafts[child - 1], child
            return self._draw(scores), None
        if self.sampled and proposal is not None and proposal.probabilities is not None and children:
            child = children[0]
            token, draft = drafts[child - 1], proposal.probabilities[row, child - 1]
            target = scores.softmax(-1)
            if float(torch.rand((), dtype=torch.float32)) * float(draft[token]) < float(target[token]):
                return token, child
            rest = (target - draft).clamp_(min=0)
            # Where rounding leaves nothing, target and draft are the same distribution.
            return int(torch.multinomial(rest if float(rest.sum()) > 0 else target, 1)), None
        # A deterministic draft stands if it is what the target would have said: greedy or drawn, that changes nothing.
        token = self._draw(scores)
        return token, next((child for child in children if drafts[child - 1] == token), None)

    def _draw(self, scores: torch.Tensor) -> int:
        return int(torch.multinomial(scores.softmax(-1), 1)) if self.sampled else int(scores.argmax(-1))

    def distribution(self, drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`State.sampler`."""
        state, logits = self.state, logits.to(copy=True, dtype=torch.float32)
        if self._looks_at_scores_only():
            return self.processors(state.tokens[:, :1], logits).softmax(-1)
        rows = []
        for row, length in enumerate(state.lengths):
            text = torch.cat([state.tokens[row, :length], drafted[row]])
            rows.append(self.draft_processors[self.active[row]](text[None], logits[row : row + 1])[0])
        return torch.stack(rows).softmax(-1)

    def _append(self, row: int, new: list[int]) -> list[int]:
        """Write new tokens behind a row's text until one of them stops it; returns those."""
        state, length = self.state, self.state.lengths[row]
        state.tokens[row, length : length + len(new)] = torch.tensor(new, device=state.tokens.device)
        for count, token in enumerate(new, 1):
            if self.stops.after(state.tokens, row, length + count, token):
                self.done[row] = True
                return new[:count]
        return new
