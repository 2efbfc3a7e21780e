"""Chains of drafts from an EAGLE head, one forward of the head for each draft."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.speculation.drafter import Draws, Proposal, State
from patchkit.speculation.features import FeatureSession
from patchkit.speculation.heads.eagle import EagleHead, KeyValues


class EagleChain(FeatureSession):
    """Drafts the head's likeliest token after each other; drawn ones in sampled runs."""

    def __init__(self, head: EagleHead, model: Any, state: State):
        super().__init__(model.get_output_embeddings(), state)
        self.head, self.embed, self.layers = head, model.get_input_embeddings(), head.layers
        self.memory = KeyValues(head, state.rows)
        self.entered = [0] * state.rows  # slots whose keys and values come from the model's own hidden states

    def features_of(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.features(hidden)

    @torch.no_grad()
    def propose(self, state: State, k: int) -> Proposal | None:
        if self.features is None:
            return None
        new = [max(1, known - entered) for known, entered in zip(self.known, self.entered, strict=True)]
        hidden = self._catch_up(state, new)
        self.memory.reserve(max(self.known) + k)
        draws = Draws(state)
        draws.draw(self.lm_head(hidden[:, 0]))
        for step in range(k - 1):
            hidden = self.head(self.embed(draws.last[:, None]), hidden, self.memory, self._slots(self.known, step, 1))
            draws.draw(self.lm_head(hidden[:, 0]))
        return Proposal(draws.tokens, [k] * state.rows, draws.probabilities)

    def join(self, other: Any) -> None:
        super().join(other)
        self.entered = self.entered + other.entered
        self.memory.join(other.memory)

    def select_rows(self, rows: list[int]) -> None:
        super().select_rows(rows)
        self.entered = [self.entered[row] for row in rows]
        self.memory.select_rows(rows)

    def _catch_up(self, state: State, new: list[int]) -> torch.Tensor:
        """Run the head on the last ``new`` hidden states of each row, which it has not seen; return its output for the last, [R, 1, D]."""
        assert self.features is not None
        slots = self._slots([known - count for known, count in zip(self.known, new, strict=True)], 0, max(new))
        self.memory.reserve(max(self.known) + max(new))
        if isinstance(slots, slice):
            next_tokens = state.tokens[:, self.first[0] + slots.start + 1 : self.first[0] + slots.stop + 1]
            features = self.features[:, slots]
        else:
            # Rows with fewer new states compute on filler, in slots that they write again before they see them.
            rows = torch.arange(state.rows, device=slots.device)[:, None]
            columns = slots + torch.tensor(self.first, device=slots.device)[:, None] + 1
            next_tokens = state.tokens[rows, columns.clamp(max=state.tokens.shape[1] - 1)]
            features = self.features[rows, slots.clamp(max=self.features.shape[1] - 1)]
        hidden = self.head(self.embed(next_tokens), features, self.memory, slots)
        self.entered = list(self.known)
        if isinstance(slots, slice):
            return hidden[:, -1:]
        return hidden[rows, torch.tensor(new, device=hidden.device)[:, None] - 1]

    def _slots(self, starts: list[int], offset: int, count: int) -> slice | torch.Tensor:
        if len(starts) == 1:
            return slice(starts[0] + offset, starts[0] + offset + count)
        device = self.memory.keys.device
        return torch.tensor(starts, device=device)[:, None] + offset + torch.arange(count, device=device)
