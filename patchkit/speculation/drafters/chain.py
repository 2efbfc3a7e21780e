"""The first drafter that has something to propose: prompt lookup where the text repeats itself, a model elsewhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.anatomy.target import Target
from patchkit.speculation.drafter import Drafter, Proposal, Session, State


@dataclass(frozen=True, eq=False)
class Chain(Drafter):
    """Ask one drafter after the other.

    Args:
        drafters: in the order in which they are asked; the first that proposes anything for any row drafts the round.

    Raises:
        ValueError: none is given.
        TypeError: one is no drafter.
    """

    drafters: tuple[Drafter, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "drafters", tuple(self.drafters))
        if not self.drafters:
            raise ValueError("Chain(()) has no drafter: give at least one, such as Chain((PromptLookup(), DraftModel(draft)))")
        for drafter in self.drafters:
            if not isinstance(drafter, Drafter):
                raise TypeError(f"{drafter!r} is not a drafter: give objects such as PromptLookup() or DraftModel(draft)")

    def check(self, target: Target) -> None:
        for drafter in self.drafters:
            drafter.check(target)

    def prepared(self, target: Target) -> Drafter:
        return dataclasses.replace(self, drafters=tuple(drafter.prepared(target) for drafter in self.drafters))

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        return dataclasses.replace(self, drafters=tuple(drafter.follow(model, thorough) for drafter in self.drafters))

    def outdated(self, model: Any, adapters: bool) -> str | None:
        found = [reason for drafter in self.drafters if (reason := drafter.outdated(model, adapters)) is not None]
        return "; ".join(found) or None

    def note(self) -> str | None:
        return "; ".join(note for drafter in self.drafters if (note := drafter.note()) is not None) or None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sorted({layer for drafter in self.drafters for layer in drafter.layers}))

    def begin(self, model: Any, state: State) -> Session:
        return ChainSession([drafter.begin(model, state) for drafter in self.drafters])

    def __str__(self) -> str:
        return f"chain({', '.join(map(str, self.drafters))})"


class ChainSession(Session):
    """The sessions of a chain."""

    def __init__(self, sessions: list[Session]) -> None:
        self.sessions = sessions
        self.wants_hidden = any(session.wants_hidden for session in sessions)
        self.wants_logits = any(session.wants_logits for session in sessions)
        self.aligned = any(session.aligned for session in sessions)
        self.layers = tuple(sorted({layer for session in sessions for layer in session.layers}))

    def propose(self, state: State, k: int) -> Proposal | None:
        for session in self.sessions:
            proposal = session.propose(state, k)
            if proposal is not None and any(proposal.counts):
                return proposal
        return None

    def observe(self, hidden: torch.Tensor, counts: list[int]) -> None:
        for session in self.sessions:
            if session.wants_hidden:
                session.observe(self._wanted(hidden, session.layers), counts)

    def _wanted(self, hidden: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
        """Of hidden states as `observe` gets them, those for a session that asks for these layers."""
        if layers == self.layers:
            return hidden
        chunks = hidden.chunk(1 + len(self.layers), -1)
        return torch.cat([chunks[0], *(chunks[1 + self.layers.index(layer)] for layer in layers)], -1)

    def finished(self, state: State, rows: list[int]) -> None:
        for session in self.sessions:
            session.finished(state, rows)

    def join(self, other: Any) -> None:
        for session, joining in zip(self.sessions, other.sessions, strict=True):
            session.join(joining)

    def close(self, state: State) -> None:
        for session in self.sessions:
            session.close(state)

    def observe_logits(self, tokens: torch.Tensor, logits: torch.Tensor, counts: list[int]) -> None:
        for session in self.sessions:
            if session.wants_logits:
                session.observe_logits(tokens, logits, counts)

    def select_rows(self, rows: list[int]) -> None:
        for session in self.sessions:
            session.select_rows(rows)
