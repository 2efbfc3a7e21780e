"""`FeatureSession`: the target's last hidden states of each row, for drafters that continue them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from patchkit.speculation.drafter import Session, State


class FeatureSession(Session):
    """Keeps features of each row's text: slot s of row r is of the token in column ``first[r] + s``."""

    wants_hidden = True

    def features_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the features [R, T, D] of hidden states as `observe` gets them; by default the last hidden states."""
        return hidden

    def __init__(self, lm_head: Any, state: State):
        self.lm_head = lm_head
        self.pads, self.prompt = list(state.pads), state.lengths[0]
        self.features: torch.Tensor | None = None  # [R, room, D]
        self.first: list[int] = []
        self.known: list[int] = []

    @torch.no_grad()
    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:
        hidden = self.features_of(hidden)
        skipped = [0] * len(counts)
        if self.features is None:
            # A prompt of which a cache held the beginning is known from where it was fed.
            start = self.prompt - hidden.shape[1]
            self.first = [max(pad, start) for pad in self.pads]
            skipped = [first - start for first in self.first]
            self.known = [0] * len(counts)
            self.features = hidden.new_zeros(len(counts), 0, hidden.shape[2])
        room = max(known + count for known, count in zip(self.known, counts, strict=True))
        if room > self.features.shape[1]:
            self.features = F.pad(self.features, (0, 0, 0, max(room, 2 * self.features.shape[1], 256) - self.features.shape[1]))
        for row, (skip, count) in enumerate(zip(skipped, counts, strict=True)):
            known = self.known[row]
            self.features[row, known : known + count - skip] = hidden[row, skip:count]
            self.known[row] = known + count - skip

    def join(self, other: Any) -> None:
        self.pads, self.prompt = self.pads + other.pads, max(self.prompt, other.prompt)
        if self.features is None or other.features is None:
            return  # neither has seen its prompt
        room = max(self.features.shape[1], other.features.shape[1])
        self.features = torch.cat([F.pad(each, (0, 0, 0, room - each.shape[1])) for each in (self.features, other.features)])
        self.first, self.known = self.first + other.first, self.known + other.known

    def select_rows(self, rows: list[int]) -> None:
        self.pads = [self.pads[row] for row in rows]
        if self.features is not None:
            self.features = self.features[rows]
            self.first, self.known = ([values[row] for row in rows] for values in (self.first, self.known))
