"""The rule of layers with hybrid attention.

Shapes: B batch, T new tokens, n tokens.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from patchkit.linear.hybrid import HybridAttention
from patchkit.streaming.rule import ForwardContext, LayerRule


@dataclass(eq=False)
class LinearRule(LayerRule):
    """The rule of layers with hybrid attention. ``window`` is the length R of the ring.

    Attributes:
        softmax_window: W.
        min_length: queries at row positions below it see everything before them.
        parts: the hybrid attention of each layer, by its index.
    """

    softmax_window: int = 1
    min_length: int = 0
    parts: dict[int, HybridAttention] = field(default_factory=dict)

    def same_rule(self, other: LayerRule) -> bool:
        return isinstance(other, LinearRule) and super().same_rule(other) and self.parts is other.parts

    @property
    def full_from(self) -> int:
        return self.sinks + self.softmax_window

    @property
    def sees_all(self) -> bool:
        return self.window == self.softmax_window

    def within(self, query: torch.Tensor, key: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        near = key > query - self.softmax_window
        return near | (row < self.min_length) if self.min_length else near

    def is_old(self, context: ForwardContext, tokens: torch.Tensor) -> torch.Tensor:
        """Whether these token numbers [n] enter the state once they have left the softmax window: bool [B or 1, n]."""
        return context.row_positions(tokens) >= self.sinks

    def old_keys(self, context: ForwardContext, queries: torch.Tensor) -> torch.Tensor:
        """Number of old keys, those outside sinks and window, for each of these queries [T]: int64 [B or 1, T]."""
        return (context.row_positions(queries) - (self.softmax_window + self.sinks - 1)).clamp(min=0)

    def step_tensors(self, context: ForwardContext) -> list[torch.Tensor | None]:
        token = torch.tensor([context.start], device=context.device)
        delayed = token - self.softmax_window
        angles: list[torch.Tensor | None] = [None] * 4
        if self.rotary is not None:
            base = context.base[:, None]
            angles = [
                rotation for which in (delayed, token) for rotation in self.rotary.angles((base - context.row_positions(which))[:, None])
            ]
        short = context.row_positions(token) < self.min_length if self.min_length else None
        old = self.is_old(context, delayed).float()[:, :, None, None]
        old_keys = self.old_keys(context, token).float()
        return [*super().step_tensors(context), self.slot(delayed).clamp(min=0), *angles, old, old_keys, short]

    def count(self, hits: Counter[str], context: ForwardContext) -> None:
        hits["forwards"] += 1
        hits["tokens"] += context.tokens
        hits["tokens taken into the state"] += max(0, context.end - self.full_from) - max(0, context.start - self.full_from)
        before, switch = max(context.start, context.highest), self.min_length  # the first token whose query may use the state
        if not switch or before > switch + context.most_pads or context.end <= switch:
            return
        switches = torch.full((context.rows,), switch) if context.pads is None else context.pads.cpu() + switch
        hits["switched to linear"] += int(((switches >= before) & (switches < context.end)).sum())
