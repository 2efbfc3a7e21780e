"""One sequence that is being generated: `Row`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.speculation.stops import Stops


@dataclass(eq=False)
class Row:
    """One sequence: the rules for its next token and for its end, what it has got so far, and its statistics.

    Attributes:
        prompt: tokens of the prompt, left padding included.
        stops: its stopping criteria.
        given: the logits processors that `generate` was given, for all rows of the call.
        processors: those for this row alone.
        while_drafting: those of them that may be called with drafts, because they keep no state.
        sampled: tokens are drawn; otherwise the most likely one is taken.
        generator: source of its random numbers; None for torch's own, which all rows share.
        sink: called with the new tokens of every round as soon as they are final; None for nobody.
        keeps_scores, keeps_logits: processed scores, or raw logits, of every new token are wanted.
        needs_forwards: every token has to be chosen from the model's logits: somebody wants these or the cache afterwards, or a processor
            may forbid what a grammar forces.
        new: tokens generated so far.
        finish: why it has ended: "stop" (an end token or a criterion), "length", "cancelled" or "error"; None while it has not.
        tokens: [length] int64, prompt and new tokens; final once it has ended.
        error: what has made it end with "error"; None otherwise.
        scores, logits: [V] float32 for every new token.
        reused: tokens of its prompt that were not fed, because `prefix_cache` had kept them, or fed them for an equal row.
        rounds, proposed, accepted, forced: rounds it took part in, its drafts, those accepted, and the tokens that a grammar forced.
    """

    prompt: int
    stops: Stops
    given: Any
    processors: Any
    while_drafting: Any
    tokens: torch.Tensor
    sampled: bool = False
    generator: torch.Generator | None = None
    sink: Callable[[list[int]], None] | None = None
    keeps_scores: bool = False
    keeps_logits: bool = False
    needs_forwards: bool = False
    new: list[int] = field(default_factory=list)
    finish: str | None = None
    error: BaseException | None = None
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    reused: int = 0
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0
    forced: int = 0

    def extend(self, tokens: list[int]) -> None:
        """Make new tokens final; drop scores and logits beyond them."""
        self.new += tokens
        del self.scores[len(self.new) :], self.logits[len(self.new) :]
        if self.sink is not None and tokens:
            self.sink(tokens)
