"""Attention to the slots of a layer together with its window, in steps and in forwards of several tokens.

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
from patchkit.streaming.attention import Run
from patchkit.streaming.int8_layer import layout, read
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.runtime import Runtime


@dataclass(eq=False)
class SeenSlots:
    """Keys and values that attention layer ``index`` sees in its slots; a `patchkit.streaming.attention.Beyond`.

    Attributes:
        scaling: of the scores, where attention is a plain softmax, so that the slots of a pool need not be copied for each of its heads;
            None where the model's own function has to run.
    """

    runtime: Runtime
    index: int
    rule: MemoryRule
    scaling: float | None

    def in_fixed_step(
        self, run: Run, step: StepCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        layer = step.layer(self.index)
        slots = layer.kept if not self.rule.int8 else self.readable(layer.kept, layer.places, layer.tables, key.dtype)
        return self.attend(run, slots, step.seen[None], query, key, value, mask)

    def in_step(
        self, run: Run, context: ForwardContext, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        assert self.runtime.cache is not None
        layer: Any = self.runtime.cache.layers[self.index]
        slots = layer.slots
        if self.rule.int8:
            coarse, fine, places = (x.to(key.device) for x in layer.stream.fixed_tensors(self.rule)[2:5])
            slots = self.readable(slots, places, (coarse, fine), key.dtype)
        return self.attend(run, slots, torch.tensor([context.start], device=query.device), query, key, value, mask)

    def begin(self, context: ForwardContext, key: torch.Tensor, value: torch.Tensor, keys: int) -> SlotsInBlocks:
        layer: Any = None if self.runtime.cache is None else self.runtime.cache.layers[self.index]
        slots = self.rule.empty(self.index, key, value) if layer is None else layer.slots
        if self.rule.int8:
            assert context.packed is not None
            key, value = context.packed
        return SlotsInBlocks(self, context, layer, slots, key, value, keys - context.end)

    def readable(self, slots: Slots, places: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor], dtype: torch.dtype) -> Slots:
        """Slots in int8 with keys and values as attention takes them; ``places`` are those of `MemoryRule`."""
        keys, values = read(slots.keys, slots.values, self.rule.slot_offsets(slots.tokens, places), tables, layout(self.rule), dtype)
        return slots._replace(keys=keys, values=values)

    def attend(
        self,
        run: Run,
        slots: Slots,
        tokens: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from queries [B, H, T, K] with token numbers [T] to keys [B, G, n, K] under a mask [B or 1, 1, T, n], and to the slots."""
        visible = visible_slots(slots, tokens, self.rule.window, query.shape[1], key.shape[1])
        if self.scaling is not None:
            return attend_pools(slots, query, key, value, mask, visible, self.scaling)
        shared = key.shape[1] // slots.tokens.shape[1]
        keys = F.pad(slots.keys, (0, key.shape[-1] - slots.keys.shape[-1])).repeat_interleave(shared, 1)
        values = slots.values.repeat_interleave(shared, 1)
        if mask.dtype != torch.bool:
            visible = torch.zeros(visible.shape, dtype=mask.dtype, device=mask.device).masked_fill(~visible, torch.finfo(mask.dtype).min)
        mask = torch.cat([mask.expand(*visible.shape[:3], -1), visible], -1)
        return run(query, torch.cat([key, keys], 2), torch.cat([value, values], 2), mask)


@dataclass(eq=False)
class SlotsInBlocks:
    """The slots during one forward of several tokens: `patchkit.streaming.attention.Further`.

    Attributes:
        layer: of the cache; None without one.
        slots: at the current block of queries.
        key, value: [B, G, n, K] and [B, G, n, V], in order of time, packed with int8; token i is in column i + ``offset``.
    """

    seen: SeenSlots
    context: ForwardContext
    layer: MemoryLayer | None
    slots: Slots
    key: torch.Tensor
    value: torch.Tensor
    offset: int
    taken: list[Taken] = field(default_factory=list)

    def pieces(self, queries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cut the queries at borders, and hold the competition of each before its queries are attended."""
        context, rule = self.context, self.seen.rule
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

    def attend(
        self, run: Run, block: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        if int(block[-1]) < self.seen.rule.capacity:  # nothing has left the window
            return run(query, key, value, mask)
        slots, rule = self.slots, self.seen.rule
        if rule.int8:
            tables = rule.angle_tables(self.context, int(block[0]))
            places = rule.places(self.context, int(block[0]), tables)
            coarse, fine, places = (x.to(key.device) for x in (tables.coarse, tables.fine, places))
            slots = self.seen.readable(slots, places, (coarse, fine), key.dtype)
        return self.seen.attend(run, slots, block, query, key, value, mask)

    def end(self) -> None:
        if self.layer is not None and self.taken:
            with torch.no_grad():
                self.layer.keep(self.slots, *self.taken)


def visible_slots(slots: Slots, tokens: torch.Tensor, window: int, heads: int, groups: int) -> torch.Tensor:
    """Whether queries of H heads with token numbers [T] see the slots of their pool: bool [B, H, T, N].

    They see those of their own kv head whose token has left their window.
    """
    shared = groups // slots.tokens.shape[1]
    own = slots.owners[:, :, None] == torch.arange(shared, device=tokens.device)[:, None]
    left = (slots.tokens >= 0)[:, :, None] & (slots.tokens[:, :, None] <= tokens[:, None] - window)
    return (own[:, :, :, None] & left[:, :, None]).flatten(1, 2).repeat_interleave(heads // groups, 1)


def attend_pools(
    slots: Slots, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, visible: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Softmax attention from queries [B, H, T, K] to keys [B, G, n, K] under ``mask``, and to slots where ``visible`` [B, H, T, N].

    No key or value is copied: the heads of a pool read its slots in one product.

    Returns:
        [B, T, H, V].
    """
    batch, heads, count = query.shape[:3]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, torch.finfo(query.dtype).min)
    near = _by_head(query, key) @ key.mT
    kept = slots.keys.to(query.dtype)
    far = _by_head(query[..., : kept.shape[-1]], kept) @ kept.mT
    near = near.view(batch, heads, count, -1) * scaling + mask
    far = (far.view(batch, heads, count, -1) * scaling).masked_fill(~visible, torch.finfo(query.dtype).min)
    weights = torch.cat([near, far], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    near, far = weights.split([near.shape[-1], far.shape[-1]], -1)
    out = (_by_head(near, value) @ value).view(batch, heads, count, -1)
    out = out + (_by_head(far, slots.values) @ slots.values.to(query.dtype)).view(batch, heads, count, -1)
    return out.transpose(1, 2).contiguous()


def _by_head(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """[B, H, T, D] as [B, G, H / G T, D], for the G heads or pools of ``kept``."""
    return x.unflatten(1, (kept.shape[1], -1)).flatten(2, 3)
