"""The cache of a batch whose rows advance by different numbers of tokens, because speculation accepts more drafts in some rows.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Token i of a row is in slot i, padding included, whatever the other
rows do: there are no holes, and nothing is copied to align rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.kernels.kv_append import kv_append
from patchkit.static_step import FixedCache, FixedLayer, of_one_dtype

# Numbers of tokens to which forwards that verify drafts are rounded up where each number would be compiled.
VERIFIED_LENGTHS = (1, 2, 3, 5, 9, 17)


class RaggedLayer(FixedLayer):
    """One layer's keys and values. The cache holds the slots that a forward writes, since they are the same in all layers."""

    def __init__(self, room: int, cache: RaggedCache) -> None:
        super().__init__(room)
        self.cache = cache

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

    def advance_offsets(self, tokens: int) -> None:
        """Let the next forward write ``tokens`` slots after the last one."""
        if self.offsets is not None:
            self.offsets = self.offsets + tokens

    def keep(self, fed: int, counts: list[int]) -> None:
        """Accept the first ``counts[r]`` of the ``fed`` tokens of row r since the last `keep`, and roll back the others."""
        before = self.lengths or [self.layers[0].seen - fed] * len(counts)
        self._set_lengths([length + count for length, count in zip(before, counts, strict=True)])

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
