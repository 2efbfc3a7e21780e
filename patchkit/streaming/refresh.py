"""RefreshLite: a change of a streaming cache's contents every R tokens, against the loss of evicted tokens.

Shapes: B batch, G kv heads, H query heads, T new tokens, n rows or tokens, K key dim, V value dim; S sinks, W window, C slots of the cache:
S + W, or S + N + W with the N exchanged slots of `DynamicSinks`.

A row is refreshed before the token at row position ``C + k R``, k = 1, 2, ...: at fixed positions of the sequence, whatever the calls.
Forwards of several tokens are cut there (`patchkit.streaming.refreshing`), so that logits do not depend on how a sequence is fed. Rows
of a left-padded batch are refreshed at their own times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.spelled import Spelled
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.rule import LayerRule, Plan

# Runs the patched decoder over token ids with a cache, uncounted.
Run = Callable[[torch.Tensor, StreamingCache], object]


class Refresh(Spelled):
    """Options of a refresh, for `StreamingLLM(refresh=...)`; a subclass is a frozen dataclass.

    Attributes:
        every: R, tokens between two refreshes.
    """

    # Tokens that were fed can be rolled back, and steps can run compiled.
    can_roll_back: ClassVar[bool] = True

    every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}={value!r}: give a whole number of tokens, at least 1")

    def rule(self, sinks: int, window: int, rotary: Rotary | None) -> LayerRule:
        """Return the rule of a layer with S = ``sinks``, W = ``window`` and this rotary embedding."""
        return LayerRule(sinks, window, rotary)

    def new_cache(self, plan: Plan) -> RefreshedCache:
        """Return an empty cache."""
        raise NotImplementedError

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        """The reason why these attention layers, all of the model's, cannot be refreshed; None if they can."""
        if not plan.owns_all:
            return "some attention layers keep all keys (layers=, or chunked attention), and a refresh is one of the whole model"
        return None


class RefreshedCache(StreamingCache):
    """A `StreamingCache` that is refreshed: `refresh_at` gives the time, `refresh` does it.

    Attributes:
        refreshed: tokens seen at the last refresh.
    """

    def __init__(self, plan: Plan, options: Refresh) -> None:
        self.options = options
        self.cut: Any = None  # of a forward that was cut at refreshes, until it returns
        super().__init__(plan)
        self._clear()

    @property
    def shared_parts(self) -> list[Any]:
        return [*super().shared_parts, self.options]

    def _clear(self) -> None:
        self.refreshed = 0
        self._pads: tuple[torch.Tensor | None, list[int]] = (None, [0])

    def reset(self) -> None:
        super().reset()
        self._clear()

    @property
    def pads(self) -> list[int]:
        """Left padding of every row, or [0]; read off the tensor once, because steps must not read tensor values."""
        pads = self.stream.pads
        if self._pads[0] is not pads:
            self._pads = pads, [0] if pads is None else pads.tolist()
        return self._pads[1]

    def refresh_at(self) -> int:
        """The number of seen tokens, the current or a later one, at which a row is due for a refresh."""
        first, every = max(self.stream.seen, self.refreshed + 1), self.options.every
        starts = (pad + self.plan.main.capacity for pad in self.pads)
        return min(start + every * max(1, -((start - first) // every)) for start in starts)

    def refresh(self, run: Run) -> bool:
        """Refresh the rows that are due now. Returns whether there were any."""
        seen, every = self.stream.seen, self.options.every
        ages = [seen - pad - self.plan.main.capacity for pad in self.pads]
        due = [row for row, age in enumerate(ages) if age > 0 and age % every == 0]
        if not due:
            return False
        # Without padding all rows are due at once.
        batch = self.own_layers[0].keys.shape[0]
        rows = torch.arange(batch) if self.stream.pads is None else torch.tensor(due)
        with torch.no_grad():
            self._refresh_rows(rows, run)
        self.refreshed = seen
        return True

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        raise NotImplementedError

    def remember(self, ids: torch.Tensor | None) -> None:
        """Record the token ids [B, T] that were fed last, where the refresh needs them; None if embeddings were fed."""

    def _row_pads(self, rows: torch.Tensor) -> torch.Tensor:
        """Left padding [n] of these rows."""
        pads = self.stream.pads
        return torch.zeros_like(rows) if pads is None else pads.cpu()[rows]


def of_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Select the rows [n] of x [B or 1, ...]; a single row holds for all rows."""
    return x[rows] if len(x) > 1 else x
