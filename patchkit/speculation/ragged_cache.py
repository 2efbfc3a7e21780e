"""The cache of a batch whose rows advance by different numbers of tokens: speculation accepts more in one row than in another.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Token i of a row is in slot i, padding included, whatever
the other rows do: no holes, and nothing is copied to realign rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.kernels.kv_append import kv_append
from patchkit.static_step import FixedCache, FixedLayer, of_one_dtype

# Forwards that verify drafts have one of these numbers of tokens where each would be compiled for itself.
VERIFIED_LENGTHS = (1, 2, 3, 5, 9, 17)


class RaggedLayer(FixedLayer):
    """One layer's keys and values; where a forward writes is the same in all layers, so the cache says it."""

    def __init__(self, room: int, cache: RaggedCache) -> None:
        super().__init__(room)
        self.cache = cache

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys [B, G, T, K] and values [B, G, T, V] of every row after its own; return all slots up to the longest row."""
        if self.cache.offsets is None:
            return super().update(key_states, value_states)
        end = self.seen + key_states.shape[2]
        self.reserve(end)
        key_states, value_states = of_one_dtype(self, key_states, value_states)
        kv_append(self.keys, self.values, key_states, value_states, self.cache.offsets)
        self.seen = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class RaggedCache(FixedCache):
    """A `FixedCache` that can take back another number of tokens in every row.

    Attributes:
        lengths: tokens of each row at the last `keep`, padding included; empty while all rows are as long.
        offsets: [B] int64, the slot of each row's next token; None while that is the same in all rows.
        verifying: forwards of several tokens verify drafts; they are few in kind, and may be compiled.
    """

    def __init__(self, layers: int, tokens: int = 1) -> None:
        super().__init__(layers, tokens)
        self.layers = [RaggedLayer(layer.room, self) for layer in self.layers]
        self.lengths: list[int] = []
        self.offsets: torch.Tensor | None = None
        self.verifying = False

    @property
    def step_lengths(self) -> tuple[int, ...]:
        if self.offsets is not None:
            return ()
        return VERIFIED_LENGTHS if self.verifying else (1,)

    def place(self, tokens: int) -> None:
        """The next forward writes ``tokens`` slots further on than the last."""
        if self.offsets is not None:
            self.offsets = self.offsets + tokens

    def keep(self, fed: int, counts: list[int]) -> None:
        """Of the ``fed`` tokens since the last `keep`, the first ``counts[r]`` of row r stand."""
        before = self.lengths or [self.layers[0].seen - fed] * len(counts)
        self._set_lengths([length + count for length, count in zip(before, counts, strict=True)])

    def move(self, row: int, source: torch.Tensor, slot: int) -> None:
        """In one row, put the tokens of slots ``source`` [n] into slots ``slot`` to ``slot + n - 1``."""
        for layer in self.layers:
            for buffer in (layer.keys, layer.values):
                buffer[row, :, slot : slot + len(source)] = buffer[row].index_select(1, source)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens of every row."""
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
