"""The rule of layers with slots beyond their window.

Shapes: B batch. Names as in `patchkit.memory.slots`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from patchkit.memory.slots import Slots
from patchkit.streaming.int8_layer import room_like
from patchkit.streaming.rule import AngleTables, ForwardContext, LayerRule
from patchkit.streaming.stream import Stream


@dataclass(eq=False)
class MemoryRule(LayerRule):
    """The rule of layers with S sinks, a window of W tokens, and M slots.

    Attributes:
        slots: M of each layer, per kv head on average over the heads that share them, by the layer's index.
        block: E, tokens from one border to the next; at most W.
        shared: H, kv heads that share their slots.
        far, turn: L and R; R is a multiple of the block.
    """

    slots: Mapping[int, int] = field(default_factory=dict)
    block: int = 1
    shared: int = 1
    far: int = 0
    turn: int = 1

    def same_rule(self, other: LayerRule) -> bool:
        return (
            isinstance(other, MemoryRule)
            and super().same_rule(other)
            and (self.slots, self.block, self.shared, self.far) == (other.slots, other.block, other.shared, other.far)
        )

    @property
    def reach(self) -> int:
        return max(self.capacity, self.far + self.turn)  # sinks are no nearer than what the slots hold

    @property
    def sees_all(self) -> bool:
        return False  # a token that has been chosen waits in its slot until it leaves the window

    def empty(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> Slots:
        """Empty slots of layer ``index``, with keys like ``keys`` [B, G, *, K] and values like ``values`` [B, G, *, V]; packed in int8."""
        empty = Slots.empty(keys, values, self.slots[index], self.shared)
        if not self.int8:
            return empty
        size = empty.tokens.shape
        return empty._replace(keys=room_like(keys, *size), values=room_like(values, *size))

    def next_border(self, context: ForwardContext | Stream, start: int) -> int:
        """The first token number from ``start`` on before which some row is at a border."""
        return min(start + (pad - start) % self.block for pad in context.pad_list)

    def due(self, context: ForwardContext, token: int) -> torch.Tensor | None:
        """The rows [B] that are at a border before this token; None for all."""
        if context.pads is None:
            return None
        rows = token - context.pads
        return (rows > 0) & (rows % self.block == 0)

    def moving(self, context: ForwardContext, slots: Slots, token: int) -> torch.Tensor | None:
        """The slots [B, P, N] whose tokens move R positions closer before this token; None where no row is due, or with int8."""
        if self.rotary is None or self.int8 or not any(token > pad and (token - pad) % self.turn == 0 for pad in context.pad_list):
            return None
        far = (slots.tokens >= 0) & (token - slots.tokens > self.far)
        if context.pads is None:
            return far
        rows = token - context.pads
        return far & ((rows > 0) & (rows % self.turn == 0)).to(far.device)[:, None, None]

    def step_tensors(self, context: ForwardContext) -> list[torch.Tensor | None]:
        tensors = super().step_tensors(context)
        return [*tensors, self.places(context, context.start)] if self.int8 else tensors

    def places(self, context: ForwardContext, token: int, tables: AngleTables | None = None) -> torch.Tensor:
        """Numbers of each row by which slots in int8 are rotated when ``token`` is fed: [4, B or 1] int64.

        Its padding, its completed turns of R positions, the first position of its table, and where in the tables that begins.
        """
        tables = self.angle_tables(context, token) if tables is None else tables
        pads = torch.zeros(1, dtype=torch.int64, device=context.device) if context.pads is None else context.pads
        begins = tables.of_rows(torch.zeros_like(tables.first))
        return torch.stack(torch.broadcast_tensors(pads, (token - pads) // self.turn, tables.first, begins))

    def slot_offsets(self, tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Offsets [B, P, N] of the tokens [B, P, N] of slots, moved closer as often as they have to be; any for empty slots."""
        pads, turns, first, begins = places[:, :, None, None]
        rows = tokens - pads
        if self.rotary is None:
            return torch.zeros_like(rows)
        moved = rows + self.turn * (turns - (rows + self.far) // self.turn).clamp(min=0)
        return (moved - first).clamp(0, self.reach - 1) + begins

    def count(self, hits: Counter[str], context: ForwardContext) -> None:
        super().count(hits, context)
        first, last = (max(0, tokens - self.window - self.sinks) for tokens in (context.start, context.end))
        hits["tokens offered to the slots"] += last - first
