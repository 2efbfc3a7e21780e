"""Drafts from continued hidden states: `Eagle`."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from patchkit.anatomy.target import Target
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import Drafter, Draws, Proposal, Session, State
from patchkit.speculation.eagle_chain import EagleChain
from patchkit.speculation.eagle_tree import EagleTree
from patchkit.speculation.features import FeatureSession
from patchkit.speculation.heads import EagleHead, TrainedFor, heads_for


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
        tree: "dynamic": of all paths the ones that the head finds likeliest, as many nodes as the controller asks for (EAGLE-2, Li et al.
            2024, https://arxiv.org/abs/2406.16858); "chain": one path. Sampled runs get chains, whose drawn tokens are accepted more
            often than chosen ones, and so do grammars and caches that cannot verify trees.

    Raises:
        ValueError: alpha is not finite, or an unknown ``tree``.
    """

    bare: ClassVar[dict[str, str]] = {"heads": "bundled"}
    example = "eagle()"

    heads: str | Path | EagleHead | None = None
    alpha: float = 1.0
    tree: Literal["dynamic", "chain"] = "dynamic"

    def __post_init__(self) -> None:
        if isinstance(self.heads, Path):
            object.__setattr__(self, "heads", str(self.heads))
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha={self.alpha} is no number to extrapolate with: give a finite one, such as 1.0")
        if self.tree not in ("dynamic", "chain"):
            raise ValueError(f"tree={self.tree!r}: give 'dynamic' or 'chain'")

    @property
    def layers(self) -> tuple[int, ...]:
        return self.heads.layers if isinstance(self.heads, EagleHead) else ()

    def check(self, target: Target) -> None:
        """Refuse a model that the head was not trained for, or without an LM head and embeddings to share."""
        TrainedFor.of(target.model)
        if self.heads is not None:
            heads_for(target.model, self.heads, EagleHead).check_fits(target.model)

    def prepared(self, target: Target) -> Drafter:
        """Return the drafter with its head loaded, on the model's device and in its precision."""
        return self if self.heads is None else PreparedEagle(heads_for(target.model, self.heads, EagleHead), self.alpha, self.tree)

    def outdated(self, model: Any, adapters: bool) -> str | None:
        return self.heads.outdated(model, adapters) if isinstance(self.heads, EagleHead) else None

    def begin(self, model: Any, state: State) -> Session:
        """Return a session for one call of generate of ``model``."""
        if self.heads is None:
            return _LiteSession(model.get_output_embeddings(), self.alpha, state)
        head = heads_for(model, self.heads, EagleHead)
        grows = self.tree == "dynamic" and state.trees and state.greedy and state.likeliest is None
        return EagleTree(head, model, state, self._calibration()) if grows else EagleChain(head, model, state)

    def _calibration(self) -> Calibration:
        return Calibration()


@dataclass(frozen=True, eq=False)
class PreparedEagle(Eagle):
    """A head for one patched model, with what its calls have in common.

    Args:
        calibration: how often drafts were accepted, by the head's probability of them.
    """

    calibration: Calibration = field(default_factory=Calibration, repr=False)

    def follow(self, model: Any, thorough: bool = False) -> Drafter:
        return dataclasses.replace(self, calibration=Calibration())

    def _calibration(self) -> Calibration:
        return self.calibration


class _LiteSession(FeatureSession):
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
