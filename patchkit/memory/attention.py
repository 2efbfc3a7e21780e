"""What a layer sees in its slots: their keys, values and masks, in steps and in forwards of several tokens.

Shapes: B batch, H query heads, G kv heads, T tokens, n keys, K key dim, V value dim; M slots, S sinks, W window.
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
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.runtime import Runtime


@dataclass(eq=False)
class SeenSlots:
    """What attention layer ``index`` sees in its slots: `patchkit.streaming.attention.Beyond`."""

    runtime: Runtime
    index: int
    rule: MemoryRule

    def fixed_step_mask(self, step: StepCache, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        tokens = step.layer(self.index).tokens
        visible = (tokens >= 0) & (tokens <= step.seen - self.rule.window)
        return _joined(mask, visible[:, :, None], query, additive=True)

    def step_mask(self, context: ForwardContext, mask: torch.Tensor | None, query: torch.Tensor, additive: bool) -> torch.Tensor:
        layer: Any = None if self.runtime.cache is None else self.runtime.cache.layers[self.index]
        visible = layer.slots.visible(context.start - self.rule.window + 1)
        if mask is None:
            mask = query.new_zeros(1, 1, 1, self.rule.capacity) if additive else visible.new_ones(1, 1, 1, self.rule.capacity)
        return _joined(mask, visible[:, :, None], query, additive)

    def begin(self, context: ForwardContext, key: torch.Tensor, value: torch.Tensor, keys: int) -> SlotsInBlocks:
        layer: Any = None if self.runtime.cache is None else self.runtime.cache.layers[self.index]
        if layer is not None:
            slots = layer.slots
        else:
            size = (*key.shape[:2], self.rule.slots)
            slots = Slots.empty(key.new_zeros(*size, key.shape[-1]), value.new_zeros(*size, value.shape[-1]), self.rule.reach)
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

    def extend(
        self, block: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if int(block[-1]) < self.rule.capacity:  # nothing has left the window
            return key, value, mask
        tokens = self.slots.tokens[:, :, None]
        visible = (tokens >= 0) & (tokens <= block[:, None] - self.rule.window)
        slot_keys = F.pad(self.slots.keys, (0, key.shape[-1] - self.slots.keys.shape[-1]))
        additive = mask.dtype != torch.bool
        return torch.cat([key, slot_keys], 2), torch.cat([value, self.slots.values], 2), _joined(mask, visible, query, additive)

    def end(self) -> None:
        if self.layer is not None and self.taken:
            with torch.no_grad():
                self.layer.keep(self.slots, *self.taken)


def _joined(mask: torch.Tensor, visible: torch.Tensor, query: torch.Tensor, additive: bool) -> torch.Tensor:
    """Append to a mask [B or 1, 1, T, n] what is ``visible`` [B, G, T, M]: [B, H, T, n + M]."""
    heads = query.shape[1]
    visible = visible.repeat_interleave(heads // visible.shape[1], 1)
    if additive:
        hidden = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device)
        visible = hidden.masked_fill(~visible, torch.finfo(mask.dtype).min)
    return torch.cat([mask.expand(*visible.shape[:3], -1), visible], -1)
