"""One layer's sinks, window and slots.

Shapes: B batch, G kv heads, n tokens, K key dim, V value dim; M slots, S sinks, W window. `patchkit.memory.slots` has the rule.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat
from patchkit.kernels.kv_int8 import unpack
from patchkit.memory.rule import MemoryRule
from patchkit.memory.slots import LOWEST, Entry, Slots, Taken, compete, keydiff, undo
from patchkit.static_step import Sinks, StepLayer
from patchkit.streaming.int8_layer import Int8StepLayer, layout
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.make_layer import StreamLayerWithState, make_layer
from patchkit.streaming.rollback_log import ROLLBACK
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.stream import Stream

# Returns keys [B, G, n, K] and values [B, G, n, V] of token numbers [n], rotated to their bounded positions; packed with int8.
Fetch = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MemoryLayer(StreamLayer):
    """One layer's sinks, window and slots, allocated once."""

    rule: MemoryRule
    slots: Any  # a `Slots` after the first tokens

    def __init__(self, rule: MemoryRule, stream: Stream, index: int) -> None:
        self.index = index
        super().__init__(rule, stream)

    def _clear(self) -> None:
        super()._clear()
        self.slots = None
        self.taken: list[Taken] = []  # while the past is recorded, of the last borders

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.stream.context
        if self.slots is None:
            self.slots = self.rule.empty(self.index, key_states, value_states)
        elif context is not None and not context.in_blocks:
            self._before_step(context)
        return super().update(key_states, value_states, *args, **kwargs)

    def _of_one_dtype(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super()._of_one_dtype(keys, values)
        if self.rule.int8:
            return keys, values
        if self.slots.keys.dtype != self.keys.dtype or self.slots.values.dtype != self.values.dtype:
            self.slots = self.slots._replace(keys=self.slots.keys.to(self.keys.dtype), values=self.slots.values.to(self.values.dtype))
        return keys, values

    def before_fixed_step(self, context: ForwardContext) -> None:
        self._before_step(context)
        super().before_fixed_step(context)

    def as_step_layer(self) -> StepLayer:
        if self.rule.int8:
            tensors = self.stream.fixed_tensors(self.rule)
            return MemoryInt8StepLayer(self.keys, self.values, tensors, layout(self.rule), self.kv_dtype, self.slots)
        slot = self.stream.fixed_tensors(self.rule)[0]
        return MemoryStepLayer(self.keys, self.values, slot, self._fixed_sinks(), self.slots)

    # -- slots -------------------------------------------------------------------------------------------------------------

    def _before_step(self, context: ForwardContext) -> None:
        """Hold the competition that is due before a one-token step, before the step overwrites a token of the window."""
        if context.start and self.rule.next_border(context, context.start) == context.start:
            with torch.no_grad():
                self.keep(*advance(self.rule, context, self.slots, context.start, self._in_ring))

    def _in_ring(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        places = self.rule.slot(tokens).to(self.keys.device)
        return self.keys.index_select(2, places), self.values.index_select(2, places)

    def keep(self, slots: Slots, *taken: Taken) -> None:
        """Store the slots after one or more competitions, and log what these have overwritten while the past is recorded."""
        self.slots.copy_from(slots.map(torch.Tensor.detach))
        if self.logs:
            self.taken = [*self.taken, *(each.map(torch.Tensor.detach) for each in taken)]
            newest = self.taken[-1].start if self.taken else 0
            self.taken = [each for each in self.taken if each.start > newest - ROLLBACK - 2 * self.rule.block]

    # -- rollback, rows, bytes -----------------------------------------------------------------------------------------------

    def can_roll_back(self, count: int) -> bool:
        kept, rule = self.stream.seen - count, self.rule
        if count == 0 or self.slots is None:
            return True
        undone = [each.start for each in self.taken if each.start >= kept]
        wanted = list[int]()
        border = rule.next_border(self.stream, max(kept, 1))
        while border < self.stream.seen and len(wanted) <= len(undone):
            wanted.append(border)
            border = rule.next_border(self.stream, border + 1)
        return wanted == undone and super().can_roll_back(count)

    def roll_back(self, count: int) -> None:
        super().roll_back(count)
        kept = self.stream.seen - count
        while self.taken and self.taken[-1].start >= kept:
            undo(self.slots, self.taken.pop())

    def rotate_window(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        super().rotate_window(cos, sin)
        rotary = self.rule.rotary
        if rotary is not None and self.slots is not None and not self.rule.int8:
            cos, sin = cos.to(self.keys.device), sin.to(self.keys.device)
            self.slots.keys.copy_(rotary.rotate(self.slots.keys, cos, sin, rotary.cached_start))
            for number, each in enumerate(self.taken):
                keys, unmoved = (None if x is None else rotary.rotate(x, cos, sin, rotary.cached_start) for x in (each.keys, each.unmoved))
                assert keys is not None
                self.taken[number] = each._replace(keys=keys, unmoved=unmoved)

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().select_rows(index)
        if self.slots is not None:
            self.slots = self.slots.map(index)
        self.taken = [each.map(index) for each in self.taken]

    def n_bytes(self) -> int:
        tensors = [*(self.slots or ()), *(tensor for each in self.taken for tensor in each[1:] if tensor is not None)]
        return super().n_bytes() + sum(t.numel() * t.element_size() for t in tensors)


def advance(rule: MemoryRule, context: ForwardContext, slots: Slots, token: int, fetch: Fetch) -> tuple[Slots, Taken]:
    """Hold the competition before ``token``, a border of some row: return the slots after it, and what was overwritten."""
    device, block, oldest = slots.keys.device, rule.block, token - rule.window
    total = slots.total + _real(context, _plain(rule, context, fetch, token - block, block), token - block).sum(2, dtype=torch.float64)
    seen = context.row_positions(torch.tensor([token], device=context.device)).clamp(min=1).to(device)
    entering = torch.arange(oldest, oldest + block, device=device)
    sinks = (context.row_positions(entering.to(context.device)) < rule.sinks).to(device)  # and what is before the text
    scores = keydiff(_plain(rule, context, fetch, oldest, block), total / seen[:, None]).masked_fill(sinks[:, None], LOWEST)
    slots, taken = compete(slots, Entry(*fetch(entering.clamp(min=0)), entering, scores, total, rule.due(context, token)), token)
    moving = rule.moving(context, slots, token)
    if moving is not None:
        assert rule.rotary is not None
        cos, sin = (x.to(device) for x in rule.rotary.angles(torch.tensor([rule.turn])))
        moved = rule.rotary.rotate(slots.keys, cos, sin, rule.rotary.cached_start)
        taken = taken._replace(unmoved=slots.keys)
        slots = slots._replace(keys=torch.where(moving[..., None], moved, slots.keys))
    return slots, taken


def _plain(rule: MemoryRule, context: ForwardContext, fetch: Fetch, first: int, count: int) -> torch.Tensor:
    """Keys [B, G, count, K] without rotation of the tokens from ``first`` on; anything for those before the text."""
    tokens = torch.arange(first, first + count, device=context.device).clamp(min=0)
    keys = fetch(tokens)[0]
    if rule.int8:
        return unpack(keys)
    if rule.rotary is None:
        return keys
    cos, sin = rule.rotary.angles(context.base[:, None] - context.row_positions(tokens))
    return rule.rotary.rotate(keys, cos[:, None].to(keys.device), sin[:, None].to(keys.device), rule.rotary.cached_start)


def _real(context: ForwardContext, keys: torch.Tensor, first: int) -> torch.Tensor:
    """Keys [B, G, n, K] of the tokens from ``first`` on, with zeros for padding and for what is before the text."""
    rows = context.row_positions(torch.arange(first, first + keys.shape[2], device=context.device)).to(keys.device)
    return keys.masked_fill((rows < 0)[:, None, :, None], 0)


class MemoryStepLayer(StepLayer):
    """The view of a `MemoryLayer` that compiled code works on; ``kept`` are its slots."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, sinks: Sinks | None, kept: Slots) -> None:
        super().__init__(keys, values, slots, sinks)
        self.kept = kept
        for tensor in kept[:4]:
            _compat.mark_static_address(tensor)


class MemoryInt8StepLayer(Int8StepLayer):
    """The view of a `MemoryLayer` in int8 that compiled code works on; ``kept`` are its slots, ``places`` those of `MemoryRule`."""

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, tensors: list[Any], at: tuple[int, bool], dtype: torch.dtype, kept: Slots
    ) -> None:
        super().__init__(keys, values, tensors, at, dtype)
        self.kept, self.places = kept, tensors[4]
        for tensor in kept[:4]:
            _compat.mark_static_address(tensor)


class MemoryLayerWithState(StreamLayerWithState, MemoryLayer):  # type: ignore[override]
    """A `MemoryLayer` of a model whose layers hold convolution or recurrent states in addition to keys and values."""

    def __init__(self, rule: MemoryRule, stream: Stream, index: int, number_of_states: int) -> None:
        self.index = index
        StreamLayerWithState.__init__(self, rule, stream, number_of_states)


@make_layer.register
def _(rule: MemoryRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    if isinstance(stock, _compat.LinearAttentionLayer):
        return MemoryLayerWithState(rule, stream, index, stock.number_of_states)
    return MemoryLayer(rule, stream, index)
