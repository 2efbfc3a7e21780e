"""Keys and values of a streaming layer in int8: how they are written and read.

Shapes: B batch, G kv heads, T new tokens, n tokens, K key dim, V value dim, C slots. `patchkit.kernels.kv_int8` has the format.

1. Keys are kept without their rotation. So what is kept of a token depends on the tokens up to it alone, and not on how they were fed: a
   rotation to a bounded position would round differently for every base. No key is rounded twice, however often the base moves.
2. A token is rounded before any query sees it, its own included. So one token at a time, chunks and a whole forward give the same logits.
   A number that lies between two codes up to rounding of the model's dtype may still become either of them.
3. A step reads the ring of one layer at a time, and rotates every key to its distance (`kv_int8_read`).
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.kernels.kv_int8 import SCALE, angles_at, pack, rotate_pairs, unpack
from patchkit.kernels.kv_int8_read import kv_int8_read
from patchkit.kernels.kv_int8_write import kv_int8_write
from patchkit.static_step import StepLayer
from patchkit.streaming.rule import ForwardContext, LayerRule

Two = tuple[torch.Tensor, torch.Tensor]


def room_like(x: torch.Tensor, *size: int) -> torch.Tensor:
    """Zeros [*size, D + 2] int8, for vectors like ``x`` [..., D]."""
    return x.new_zeros(*size, x.shape[-1] + SCALE, dtype=torch.int8)


def pack_new(rule: LayerRule, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> Two:
    """Pack the new keys [B, G, T, K] and values [B, G, T, V] of a forward in blocks, as the model made them.

    Raises:
        StreamError: gradients are wanted, which do not pass through rounding.
    """
    if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
        raise StreamError('kv="int8" rounds keys and values, which has no gradient: call the model under torch.no_grad()')
    if rule.rotary is not None:
        cos, sin = (x.to(k.device) for x in context.unrotation(rule.rotary))
        k = rule.rotary.rotate(k.float(), cos, sin, rule.rotary.cached_start)
    return pack(k), pack(v)


def read_in_blocks(rule: LayerRule, context: ForwardContext, keys: torch.Tensor, values: torch.Tensor, k: Any, v: Any) -> Two:
    """Keys and values of packed ones in order of time, of a forward in blocks, rotated as its queries need them.

    Args:
        k, v: their dtypes.
    """
    found = unpack(keys)
    if rule.rotary is not None:
        cos, sin = (x.to(found.device) for x in context.rotation_of_keys(rule, rule.rotary))
        found = rule.rotary.rotate(found, cos, sin, rule.rotary.cached_start)
    return found.to(k), unpack(values).to(v)


def rounded(rule: LayerRule, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> Two:
    """Keys [B, G, T, K] and values [B, G, T, V] of a forward without a cache, as a cache in int8 would return them."""
    context.packed = pack_new(rule, context, k, v)
    return read_in_blocks(rule, context, *context.packed, k.dtype, v.dtype)


def layout(rule: LayerRule) -> tuple[int, bool]:
    """First rotated dimension of a key, and whether pairs lie side by side."""
    return (0, False) if rule.rotary is None else (rule.rotary.cached_start, rule.rotary.style == "interleaved")


def write(keys: torch.Tensor, values: torch.Tensor, new: Two, slots: torch.Tensor, offsets: torch.Tensor, tables: Two, at: Any) -> None:
    """Write one new token per row, ``new`` [B, G, 1, K] and [B, G, 1, V], into its slot; ``offsets`` are those of all slots."""
    k, v = new
    own = offsets.index_select(2, slots)
    if not torch.compiler.is_compiling():
        kv_int8_write(keys, values, k, v, slots, own, *tables, *at)
        return
    # The compiler fuses what it can see into.
    cos, sin = angles_at(own, *tables)
    start, interleaved = at
    keys.index_copy_(2, slots, pack(rotate_pairs(k.float(), cos, -sin, start, interleaved)))
    values.index_copy_(2, slots, pack(v))


def read(keys: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor, tables: Two, at: Any, dtype: torch.dtype) -> Two:
    """Keys and values of packed ones [B, G, n, K + 2] and [B, G, n, V + 2], keys rotated to their offsets [B or 1, G or 1, n]."""
    form = kv_int8_read.reference if torch.compiler.is_compiling() else kv_int8_read
    found: Two = form(keys, values, offsets, *tables, *at, dtype)
    return found


class Int8StepLayer(StepLayer):
    """The view of a layer in int8 that compiled code works on.

    Attributes:
        offsets: [B or 1, 1, C] int64, of all slots, in ``tables``.
        at: see `layout`.
        dtype: of the keys and values that it returns.
    """

    def __init__(
        self, keys: torch.Tensor, values: torch.Tensor, tensors: list[torch.Tensor], at: tuple[int, bool], dtype: torch.dtype
    ) -> None:
        slot, self.offsets, *tables = tensors[:4]
        super().__init__(keys, values, slot)
        self.tables, self.at, self.dtype = (tables[0], tables[1]), at, dtype
        for tensor in tensors[1:]:
            _compat.mark_static_address(tensor)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Two:
        """Store a new token per row in its slot; return all keys and values, in floating point."""
        assert self.keys is not None and self.values is not None
        write(self.keys, self.values, (key_states, value_states), self.slots, self.offsets, self.tables, self.at)
        return read(self.keys, self.values, self.offsets, self.tables, self.at, self.dtype)
