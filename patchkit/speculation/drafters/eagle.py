"""Drafts from continued hidden states: `Eagle`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from patchkit.anatomy.target import Target
from patchkit.speculation.drafter import Drafter, Draws, Proposal, Session, State
from patchkit.speculation.heads import EagleHead, KeyValues, TrainedFor, heads_for


@dataclass(frozen=True)
class Eagle(Drafter, name="eagle"):
    """EAGLE (Li et al. 2024, https://arxiv.org/abs/2401.15077): continues the model's last hidden states, under its own LM head.

    In sampled runs tokens are drawn from the head's distribution. A model that scales or caps its logits after the LM head is served
    too: drafts leave that out, which costs acceptance in sampled runs only.

    Args:
        heads: a file that `patchkit train-heads` wrote, "bundled" for the one that ships for stdlib-7m, or an `EagleHead`; None:
            extrapolation, ``h + alpha (h - h_prev)``, which needs no training and seldom guesses right. In spec strings `eagle` is
            `eagle(heads=bundled)`, and `eagle()` extrapolates.
        alpha: how far to extrapolate; 0 repeats the last hidden state.

    Raises:
        ValueError: alpha is not finite.
    """

    bare: ClassVar[dict[str, str]] = {"heads": "bundled"}
    example = "eagle()"

    heads: str | Path | EagleHead | None = None
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.heads, Path):
            object.__setattr__(self, "heads", str(self.heads))
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha} is no number to extrapolate with: give a finite one, such as 1.0")

    def check(self, target: Target) -> None:
        """Refuse a model that the head was not trained for, or without an LM head and embeddings to share."""
        TrainedFor.of(target.model)
        if self.heads is not None:
            heads_for(target.model, self.heads, EagleHead).check_fits(target.model)

    def prepared(self, target: Target) -> Drafter:
        """Return the drafter with its head loaded, on the model's device and in its precision."""
        return self if self.heads is None else dataclasses.replace(self, heads=heads_for(target.model, self.heads, EagleHead))

    def outdated(self, model: Any, adapters: bool) -> str | None:
        return self.heads.outdated(model, adapters) if isinstance(self.heads, EagleHead) else None

    def begin(self, model: Any, state: State) -> Session:
        """Return a session for one call of generate of ``model``."""
        if self.heads is None:
            return _LiteSession(model.get_output_embeddings(), self.alpha, state)
        return _EagleSession(heads_for(model, self.heads, EagleHead), model, state)


class _FeatureSession(Session):
    """Keeps the hidden states of each row's text: slot s of row r is of the token in column ``first[r] + s``."""

    wants_hidden = True

    def __init__(self, lm_head: Any, state: State):
        self.lm_head = lm_head
        self.pads, self.prompt = list(state.pads), state.lengths[0]
        self.features: torch.Tensor | None = None  # [R, room, D]
        self.first: list[int] = []
        self.known: list[int] = []

    @torch.no_grad()
    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:
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
        self.pads = self.pads + other.pads
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


class _LiteSession(_FeatureSession):
    def __init__(self, lm_head: Any, alpha: float, state: State):
        super().__init__(lm_head, state)
        self.alpha = alpha

    @torch.no_grad()
    def propose(self, state: State, k: int) -> Proposal | None:
        if self.features is None:
            return None
        rows = torch.arange(state.rows, device=self.features.device)
        last = torch.tensor(self.known, device=self.features.device) - 1
        before, hidden = self.features[rows, (last - 1).clamp(min=0)], self.features[rows, last]
        draws = Draws(state)
        for _ in range(k):
            before, hidden = hidden, hidden + self.alpha * (hidden - before)
            draws.draw(self.lm_head(hidden))
        return Proposal(draws.tokens, [k] * state.rows, draws.probabilities)


class _EagleSession(_FeatureSession):
    def __init__(self, head: EagleHead, model: Any, state: State):
        super().__init__(model.get_output_embeddings(), state)
        self.head, self.embed = head, model.get_input_embeddings()
        self.memory = KeyValues(head, state.rows)
        self.entered = [0] * state.rows  # slots whose keys and values come from the model's own hidden states

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
