"""What a layer sees in its slots: their keys, values and masks, in steps and in forwards of several tokens.

Shapes: B batch, H query heads, G kv heads, T tokens, n keys, K key dim, V value dim; P pools, N slots of a pool, S sinks, W window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from patchkit.memory.layer import MemoryLayer, advance
from patchkit.memory.rule import MemoryRule
from patchkit.memory.slots import Slots, Taken
from patchkit.static_step import StepCache
from patchkit.streaming.attention import Extended
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.runtime import Runtime


@dataclass(eq=False)
class SeenSlots:
    """What attention layer ``index`` sees in its slots: `patchkit.streaming.attention.Beyond`."""

    runtime: Runtime
    index: int
    rule: MemoryRule

    def in_fixed_step(self, step: StepCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Extended:
        return extended(step.layer(self.index).kept, step.seen[None], self.rule.window, query, key, value, mask)

    def in_step(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        additive: bool,
    ) -> Extended:
        assert self.runtime.cache is not None
        layer: Any = self.runtime.cache.layers[self.index]
        if mask is None:
            mask = query.new_zeros(1, 1, 1, 1) if additive else torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
        mask = mask.expand(-1, -1, -1, key.shape[2])
        token = torch.tensor([context.start], device=query.device)
        return extended(layer.slots, token, self.rule.window, query, key, value, mask)

    def begin(self, context: ForwardContext, key: torch.Tensor, value: torch.Tensor, keys: int) -> SlotsInBlocks:
        layer: Any = None if self.runtime.cache is None else self.runtime.cache.layers[self.index]
        slots = self.rule.empty(self.index, key, value) if layer is None else layer.slots
        return SlotsInBlocks(self.rule, context, layer, slots, key, value, keys - context.end)


@dataclass(eq=False)
class SlotsInBlocks:
    """The slots during one forward of several tokens: `patchkit.streaming.attention.Further`.

    Attributes:
        layer: of the cache; None without one.
        slots: at the current block of queries.
        key, value: [B, G, n, K] and [B, G, n, V], in order of time; token i is in column i + ``offset``.
    """

    rule: MemoryRule
    context: ForwardContext
    layer: MemoryLayer | None
    slots: Slots
    key: torch.Tensor
    value: torch.Tensor
    offset: int
    taken: list[Taken] = field(default_factory=list)

    def pieces(self, queries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cut the queries at borders, and hold the competition of each before its queries are attended."""
        context, rule = self.context, self.rule
        start = context.start
        while start < context.end:
            if start and rule.next_border(context, start) == start:
                self.slots, taken = advance(rule, context, self.slots, start, self._fetch)
                self.taken.append(taken)
            stop = min(rule.next_border(context, start + 1), context.end)
            yield queries[start - context.start : stop - context.start]
            start = stop

    def _fetch(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        columns = (tokens + self.offset).clamp(min=0).to(self.key.device)
        return self.key.index_select(2, columns), self.value.index_select(2, columns)

    def extend(self, block: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> Extended:
        if int(block[-1]) < self.rule.capacity:  # nothing has left the window
            return key, value, mask
        return extended(self.slots, block, self.rule.window, query, key, value, mask)

    def end(self) -> None:
        if self.layer is not None and self.taken:
            with torch.no_grad():
                self.layer.keep(self.slots, *self.taken)


def extended(
    slots: Slots, queries: torch.Tensor, window: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
) -> Extended:
    """Append slots to keys [B, G, n, K], values [B, G, n, V] and mask [B or 1, 1, T, n] of queries [B, H, T, K] with token numbers [T].

    Every kv head gets the slots of its pool; the mask [B, H, T, n + N] hides those of other heads, and tokens inside the window.
    """
    groups, pools = key.shape[1], slots.tokens.shape[1]
    shared = groups // pools
    keys = F.pad(slots.keys, (0, key.shape[-1] - slots.keys.shape[-1])).repeat_interleave(shared, 1)
    values = slots.values.repeat_interleave(shared, 1)
    own = slots.owners[:, :, None] == torch.arange(shared, device=key.device)[:, None]
    left = (slots.tokens >= 0)[:, :, None] & (slots.tokens[:, :, None] <= queries[:, None] - window)
    visible = (own[:, :, :, None] & left[:, :, None]).flatten(1, 2).repeat_interleave(query.shape[1] // groups, 1)
    if mask.dtype != torch.bool:
        visible = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device).masked_fill(~visible, torch.finfo(mask.dtype).min)
    mask = torch.cat([mask.expand(*visible.shape[:3], -1), visible], -1)
    return torch.cat([key, keys], 2), torch.cat([value, values], 2), mask
