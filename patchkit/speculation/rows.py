"""The rows of a batch: their tokens as drafters see them, their ends, and the grammars that constrain them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from patchkit.speculation.constraint import Constraint, constraint_of, grammar_decides
from patchkit.speculation.drafter import State
from patchkit.speculation.refusals import Call
from patchkit.speculation.row import Row
from patchkit.speculation.stops import BY_SCORES, Stops, is_by_row, processors_of


class Rows:
    """The R rows that are still generating.

    Attributes:
        rows: [R], in the order of the tensors.
        state: tokens and lengths of the R rows.
        constraint: the grammars of the rows; None if there are none.
    """

    def __init__(self, call: Call, generator: torch.Generator | None = None) -> None:
        """Make the rows of one call of `generate`."""
        input_ids, config = call.input_ids, call.config
        batch, prompt = input_ids.shape
        mask = call.model_kwargs.get("attention_mask")
        pads = [0] * batch if mask is None else (mask == 0).sum(1).tolist()
        self.state = State(torch.nn.functional.pad(input_ids, (0, 64)), [prompt] * batch, pads)
        self.constraint = constraint_of(call.processors, prompt, batch)
        stops = Stops(call.criteria, input_ids.device)
        wanted = bool(config.return_dict_in_generate)
        self.rows = []
        for number in range(batch):
            own = processors_of(number, batch, prompt, call.processors)
            # A processor that may keep a state must not see what is only drafted.
            while_drafting = type(own)(each for each in own if is_by_row(each))
            if self.constraint is not None:
                own = self.constraint.for_judging(number, own, call.processors)
            self.rows.append(
                Row(
                    prompt,
                    stops,
                    call.processors,
                    own,
                    while_drafting,
                    input_ids[number],
                    sampled=bool(config.do_sample),
                    generator=generator,
                    keeps_scores=bool(wanted and config.output_scores),
                    keeps_logits=bool(wanted and config.output_logits),
                    needs_forwards=wanted or not call.own_cache or not grammar_decides(call.processors),
                )
            )
        self._set_rules()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shared_processors(self) -> Any:
        """The processors that all rows were given; None if they were given different ones."""
        given = self.rows[0].given
        return given if all(row.given is given for row in self.rows) else None

    @property
    def processors_see_scores_only(self) -> bool:
        """Whether all rows share processors of which none reads earlier tokens, so that all positions can be processed at once."""
        shared = self.shared_processors
        return shared is not None and all(type(each).__name__ in BY_SCORES for each in shared)

    @property
    def draws_freely(self) -> bool:
        """Whether all rows draw their tokens, none of them from a generator of its own."""
        return all(row.sampled and row.generator is None for row in self.rows)

    def room(self) -> tuple[int, int]:
        """The least and the largest number of tokens that a row may still get."""
        rooms = [row.stops.room(length) for row, length in zip(self.rows, self.state.lengths, strict=True)]
        return min(rooms), max(rooms)

    def last(self) -> torch.Tensor:
        """Last token [R, 1] int64 of each row, which has not been fed to the model yet."""
        tokens = self.state.tokens
        ends = torch.tensor(self.state.lengths, device=tokens.device)
        return tokens[torch.arange(len(ends), device=tokens.device), ends - 1][:, None]

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
            self.rows[row].finish = self.rows[row].stops.after(state.tokens, row, length + count, token)
            if self.rows[row].finish is not None:
                return new[:count]
        return new

    def advance(self, row: int, new: list[int]) -> None:
        """Move the end of a row behind new tokens that were written."""
        self.state.lengths[row] += len(new)
        self.rows[row].extend(new)

    def ended(self) -> list[int]:
        """Indices of the rows that have ended; their `Row.tokens` are set."""
        ended = [index for index, row in enumerate(self.rows) if row.finish is not None]
        for index in ended:
            self.rows[index].tokens = self.state.tokens[index, : self.state.lengths[index]].clone()
        return ended

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        state = self.state
        self.rows = [self.rows[row] for row in rows]
        state.tokens = state.tokens[rows]
        state.lengths = [state.lengths[row] for row in rows]
        state.pads = [state.pads[row] for row in rows]
        self._set_rules()

    def join(self, other: Rows) -> None:
        """Append the rows of another batch. The `constraint` stays with whoever joins the grammars."""
        state, more = self.state, other.state
        room = max(state.tokens.shape[1], more.tokens.shape[1])
        padded = [torch.nn.functional.pad(tokens, (0, room - tokens.shape[1])) for tokens in (state.tokens, more.tokens)]
        state.tokens = torch.cat(padded)
        state.lengths, state.pads = state.lengths + more.lengths, state.pads + more.pads
        self.rows = self.rows + other.rows
        self._set_rules()

    def constrain(self, constraint: Constraint | None) -> None:
        """Let these grammars constrain the rows; None: no row has one any more."""
        self.constraint = constraint
        self._set_rules()

    def distribution(self, drafted: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Distribution [R, V] float32 of the token after each row and its drafts [R, n], from logits [R, V]: the `State.sampler`."""
        state, logits = self.state, logits.to(copy=True, dtype=torch.float32)
        if self.processors_see_scores_only:
            return self.rows[0].given(state.tokens[:, :1], logits).softmax(-1)
        scores = []
        for index, (row, length) in enumerate(zip(self.rows, state.lengths, strict=True)):
            seen = torch.cat([state.tokens[index, :length], drafted[index]])
            scores.append(row.while_drafting(seen[None], logits[index : index + 1])[0])
        return torch.stack(scores).softmax(-1)

    def _set_rules(self) -> None:
        """Tell drafters how tokens are chosen: drawn if all rows draw freely, otherwise the likeliest, which every row can judge.

        Where a row has a generator of its own, a draw for drafting would change the text that its seed gives.
        """
        self.state.sampler = self.distribution if self.rows and self.draws_freely else None
        self.state.likeliest = None if self.constraint is None else self.constraint.likeliest


def order_after(ended: Sequence[int], rows: int) -> list[int]:
    """Return the rows that remain when some have ended, each in its place where it can: the last ones fill the holes.

    Buffers with room for all rows then move one row for each that has ended.
    """
    gone = set(ended)
    count = rows - len(gone)
    fillers = [row for row in range(count, rows) if row not in gone]
    return [fillers.pop() if row in gone else row for row in range(count)]
