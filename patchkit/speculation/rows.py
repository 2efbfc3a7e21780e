"""The rows of a batch in one call of `generate`: their tokens, their ends, and their logits processors."""

from __future__ import annotations

import torch

from patchkit.speculation.constraint import constraint_of
from patchkit.speculation.drafter import State
from patchkit.speculation.refusals import Call
from patchkit.speculation.stops import BY_SCORES, Stops, is_by_row, processors_of


class Rows:
    """The R rows that are still generating, of the B rows of a batch.

    Attributes:
        state: tokens and lengths of the R rows, as drafters see them.
        active: [R], the index in the batch of each.
        done: [R], whether it has ended in this round.
        finished: [B], [length] int64, the tokens of each row of the batch; final for rows that have ended.
        stops: the stopping criteria.
        sampled: tokens are drawn; otherwise the most likely one is taken.
        processors: the logits processors that `generate` was given.
        by_row: [B], processors for each row of the batch.
        keeps_scores, keeps_logits: `generate` was asked to return them.
        scores, logits: [B], a list of [V] float32 for each new token of a row.
        constraint: the grammars of the rows; None if there are none.
    """

    def __init__(self, call: Call) -> None:
        input_ids, config = call.input_ids, call.config
        batch, self.prompt = input_ids.shape
        mask = call.model_kwargs.get("attention_mask")
        pads = [0] * batch if mask is None else (mask == 0).sum(1).tolist()
        tokens = torch.nn.functional.pad(input_ids, (0, 64))
        self.sampled = bool(config.do_sample)
        self.state = State(tokens, [self.prompt] * batch, pads, self.distribution if self.sampled else None)
        self.stops = Stops(call.criteria, input_ids.device)
        self.active = list(range(batch))
        self.done = [False] * batch
        self.finished = list(input_ids)
        self.processors = call.processors
        self.constraint = constraint_of(call.processors, self.prompt, batch)
        self.by_row = [processors_of(row, batch, self.prompt, call.processors) for row in range(batch)]
        # A processor that may keep a state must not see what is only drafted.
        self._while_drafting = [type(own)(each for each in own if is_by_row(each)) for own in self.by_row]
        if self.constraint is not None:
            self.by_row = [self.constraint.for_judging(row, own, call.processors) for row, own in enumerate(self.by_row)]
            self.state.likeliest = self.constraint.likeliest
        self.keeps_scores = bool(config.return_dict_in_generate and config.output_scores)
        self.keeps_logits = bool(config.return_dict_in_generate and config.output_logits)
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]

    @property
    def processors_see_scores_only(self) -> bool:
        """Whether no processor reads earlier tokens, so that all positions can be processed at once."""
        return all(type(each).__name__ in BY_SCORES for each in self.processors)

    def room(self) -> int:
        """Number of tokens that every row may still get."""
        return min(self.stops.room(length) for length in self.state.lengths)

    def last(self) -> torch.Tensor:
        """Last token [R, 1] int64 of each row, which has not been fed to the model yet."""
        tokens = self.state.tokens
        ends = torch.tensor(self.state.lengths, device=tokens.device)
        return tokens[torch.arange(len(ends), device=tokens.device), ends - 1][:, None]

    def begin_round(self, tokens: int) -> None:
        """Start a round that gives every row up to ``tokens`` new tokens."""
        self.done = [False] * self.state.rows
        self.reserve(tokens)

    def reserve(self, tokens: int) -> None:
        """Make room for up to ``tokens`` tokens behind every row."""
        state = self.state
        needed = max(state.lengths) + tokens
        if needed > state.tokens.shape[1]:
            state.tokens = torch.nn.functional.pad(state.tokens, (0, needed))

    def append(self, row: int, new: list[int]) -> list[int]:
        """Write new tokens after the end of a row until one of them ends it; return those written. `advance` then moves the end."""
        state, length = self.state, self.state.lengths[row]
        state.tokens[row, length : length + len(new)] = torch.tensor(new, device=state.tokens.device)
        for count, token in enumerate(new, 1):
            if self.stops.after(state.tokens, row, length + count, token):
                self.done[row] = True
                return new[:count]
        return new

    def advance(self, row: int, tokens: int) -> None:
        """Move the end of a row by ``tokens``; drop scores and logits beyond it."""
        self.state.lengths[row] += tokens
        new, number = self.state.lengths[row] - self.prompt, self.active[row]
        del self.scores[number][new:], self.logits[number][new:]

    def drop_finished(self) -> list[int]:
        """Remove the rows that have ended; return the indices, among the R, of the others."""
        state = self.state
        for row, done in enumerate(self.done):
            if done:
                self.finished[self.active[row]] = state.tokens[row, : state.lengths[row]].clone()
        rows = [row for row, done in enumerate(self.done) if not done]
        if rows and len(rows) < state.rows:
            state.tokens = state.tokens[rows]
            state.lengths = [state.lengths[row] for row in rows]
            state.pads = [state.pads[row] for row in rows]
        self.active = [self.active[row] for row in rows]
        return rows

    def distribution(self, drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Distribution [R, V] float32 of the token after each row and its drafts [R, n], from logits [R, V]: the `State.sampler`."""
        state, logits = self.state, logits.to(copy=True, dtype=torch.float32)
        if self.processors_see_scores_only:
            return self.processors(state.tokens[:, :1], logits).softmax(-1)
        rows = []
        for row, length in enumerate(state.lengths):
            seen = torch.cat([state.tokens[row, :length], drafted[row]])
            rows.append(self._while_drafting[self.active[row]](seen[None], logits[row : row + 1])[0])
        return torch.stack(rows).softmax(-1)
