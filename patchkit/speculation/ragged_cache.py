"""The cache of a batch whose rows advance by different numbers of tokens, because speculation accepts more drafts in some rows.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Token i of a row is in slot i, padding included, whatever the other
rows do: there are no holes, and nothing is copied to align rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.kernels.kv_append import kv_append
from patchkit.static_step import FixedCache, FixedLayer, of_one_dtype, room_for

# Numbers of tokens to which forwards that verify drafts are rounded up where each number would be compiled.
VERIFIED_LENGTHS = (1, 2, 3, 5, 9, 17)

# The room of a cache, where nothing is compiled, is a multiple of this many tokens.
_GRAIN = 64


class RaggedLayer(FixedLayer):
    """One layer's keys and values. The cache holds the slots that a forward writes, since they are the same in all layers.

    Keys and values may be the first rows of larger buffers: rows that have left leave room for others that join.
    """

    def __init__(self, room: int, cache: RaggedCache) -> None:
        super().__init__(room)
        self.cache = cache
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None  # of all rows that there is room for

    def enlarge(self, room: int) -> None:
        super().enlarge(room)
        self._buffers = None

    def keep_rows(self, rows: list[int]) -> None:
        """Keep these rows, in this order, without new buffers: row ``rows[i]`` moves to row i, which is one of the others or itself."""
        if not self.is_initialized:
            return
        self.reserve(self.seen)  # tensors of inference mode could not be written to
        keys, values = self._all_rows()
        for to, row in enumerate(rows):
            if to != row:
                for buffer in (keys, values):
                    buffer[to, :, : self.seen] = buffer[row, :, : self.seen]
        self._show(keys, values, len(rows))

    def adopt(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        """Append rows, with keys [R, G, L, K] and values [R, G, L, V] in their first L of ``room`` slots."""
        self.reserve(self.seen)  # tensors of inference mode could not be written to
        if room > self.room:
            self.enlarge(room)
        keys, values = of_one_dtype(self, keys, values)
        before, rows = len(self.keys), len(self.keys) + len(keys)
        buffers = self._all_rows()
        if rows > len(buffers[0]):
            grown = tuple(each.new_zeros(rows, *each.shape[1:]) for each in buffers)
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[:before, :, : self.seen] = old[:, :, : self.seen]
            buffers = grown[0], grown[1]
        for buffer, given in zip(buffers, (keys, values), strict=True):
            if buffer[before:].data_ptr() != given.data_ptr():  # they may have been written there, see `lend`
                buffer[before:rows, :, : given.shape[2]] = given
        self._show(*buffers, rows)

    def lend(self, cache: RaggedCache) -> RaggedLayer | None:
        """Return a layer of another cache whose keys and values are the next spare row of the buffers; None if there is none."""
        keys, values = self._all_rows()
        first = len(self.keys)
        if len(keys) == first:
            return None
        layer = RaggedLayer(self.room, cache)
        layer.dtype, layer.device, layer.is_initialized = self.dtype, self.device, True
        layer.keys, layer.values = keys[first : first + 1], values[first : first + 1]
        return layer

    def _all_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers of which keys and values are the first rows."""
        if self._buffers is None or self._buffers[0].data_ptr() != self.keys.data_ptr():
            self._buffers = None
            return self.keys, self.values
        return self._buffers

    def _show(self, keys: torch.Tensor, values: torch.Tensor, rows: int) -> None:
        self._buffers = None if rows == len(keys) else (keys, values)
        self.keys, self.values = keys[:rows], values[:rows]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Append T new keys [B, G, T, K] and values [B, G, T, V] to every row; return all slots up to the end of the longest row."""
        if self.cache.offsets is None:
            return super().update(key_states, value_states)
        end = self.seen + key_states.shape[2]
        self.reserve(end)
        key_states, value_states = of_one_dtype(self, key_states, value_states)
        kv_append(self.keys, self.values, key_states, value_states, self.cache.offsets)
        self.seen = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class RaggedCache(FixedCache):
    """A `FixedCache` that can roll back a different number of tokens in every row.

    Attributes:
        lengths: tokens of each row at the last `keep`, padding included; empty while all rows have equal lengths.
        offsets: [B] int64, the slot of each row's next token; None while that is the same in all rows.
        verifying: forwards of several tokens verify drafts; they have few different lengths, and may be compiled.
    """

    def __init__(self, layers: int, tokens: int = 1, compiled: bool = True) -> None:
        """Make ``layers`` layers with room for ``tokens`` tokens; if steps may be compiled, with one of few rooms that there are."""
        super().__init__(layers, tokens)
        room = room_for(tokens) if compiled else -(-tokens // _GRAIN) * _GRAIN
        self.layers = [RaggedLayer(room, self) for _ in range(layers)]
        self.lengths: list[int] = []
        self.offsets: torch.Tensor | None = None
        self.verifying = False

    @property
    def slot_bytes(self) -> int:
        """Bytes of one token of one row."""
        tensors = [tensor for layer in self.layers if layer.is_initialized for tensor in (layer.keys, layer.values)]
        return sum(tensor.shape[1] * tensor.shape[3] * tensor.element_size() for tensor in tensors)

    @property
    def step_lengths(self) -> tuple[int, ...]:
        if self.offsets is not None:
            return ()
        return VERIFIED_LENGTHS if self.verifying else (1,)

    def advance_offsets(self, tokens: int) -> None:
        """Let the next forward write ``tokens`` slots after the last one."""
        if self.offsets is not None:
            self.offsets = self.offsets + tokens

    def keep(self, fed: int, counts: list[int]) -> None:
        """Accept the first ``counts[r]`` of the ``fed`` tokens of row r since the last `keep`, and roll back the others."""
        before = self.lengths or [self.layers[0].seen - fed] * len(counts)
        self._set_lengths([length + count for length, count in zip(before, counts, strict=True)])

    def adopt(self, other: RaggedCache) -> None:
        """Append the rows of another cache, which must not be used any more."""
        lengths = self._each_length() + other._each_length()
        for layer, joining in zip(self.layers, other.layers, strict=True):
            if layer.is_initialized:
                layer.adopt(joining.keys[:, :, : joining.seen], joining.values[:, :, : joining.seen], joining.room)
        self._steps.clear()
        self._set_lengths(lengths)

    def lend(self, tokens: int) -> RaggedCache | None:
        """Return an empty cache of one row whose buffers are a spare row of these, with room for ``tokens``; None if there is none.

        It may join this one later (`adopt`), or leave it (`move_away`). Until then nothing else is lent, and no other joins.
        """
        if tokens > self.room or not all(layer.is_initialized for layer in self.layers) or self.layers[0].keys.is_inference():
            return None
        cache = RaggedCache(0)
        cache.layers = [layer.lend(cache) for layer in self.layers]
        return None if any(layer is None for layer in cache.layers) else cache

    def move_away(self) -> None:
        """Move to buffers of its own, so that those that were lent can be lent again."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.enlarge(layer.room)
        self._steps.clear()

    def keep_rows(self, rows: list[int]) -> None:
        """Keep these rows, in this order. Row ``rows[i]`` moves to row i, which must be one that is not kept, or itself."""
        lengths = self._each_length()
        for layer in self.layers:
            layer.keep_rows(rows)
        self._steps.clear()
        self._set_lengths([lengths[row] for row in rows])

    def _each_length(self) -> list[int]:
        return self.lengths or [self.layers[0].seen] * len(self.layers[0].keys)

    def move(self, row: int, source: torch.Tensor, slot: int) -> None:
        """Copy the tokens in slots ``source`` [n] of one row into its slots ``slot`` to ``slot + n - 1``."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[row, :, slot : slot + len(source)] = buffer[row].index_select(1, source)

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last ``-tokens_to_remove`` tokens of every row."""
        super().crop(tokens_to_remove)
        if self.lengths:
            self._set_lengths([length + tokens_to_remove for length in self.lengths])

    def reset(self) -> None:
        super().reset()
        self.lengths, self.offsets = [], None

    def _set_lengths(self, lengths: list[int]) -> None:
        equal = len(set(lengths)) == 1
        self.lengths = [] if equal else lengths
        self.offsets = None if equal else torch.tensor(lengths, device=self.layers[0].keys.device)
        for layer in self.layers:
            layer.seen = max(lengths)

    def _select(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super()._select(index)
        if self.lengths:
            self._set_lengths(index(torch.tensor(self.lengths)).tolist())
