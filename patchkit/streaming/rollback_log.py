"""A ring buffer of evicted tokens, for a rollback to bring them back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patchkit.prefix.written_state import part_of_state

# Tokens that a cache which records its past can roll back. Assisted generation drafts 20 or so at a time.
ROLLBACK = 256


@part_of_state
class RollbackLog(NamedTuple):
    """Keys [B, G, R, K] and values [B, G, R, V] of the last R evicted tokens; token i is in slot ``i % R``."""

    keys: torch.Tensor
    values: torch.Tensor

    @classmethod
    def empty(cls, k: torch.Tensor, v: torch.Tensor, length: int) -> RollbackLog:
        """A log of R = ``length`` slots, for keys like ``k`` [B, G, *, K] and values like ``v`` [B, G, *, V]."""
        return cls(k.new_zeros(*k.shape[:2], length, k.shape[-1]), v.new_zeros(*v.shape[:2], length, v.shape[-1]))

    @property
    def length(self) -> int:
        """R, the number of slots."""
        return self.keys.shape[2]

    def write(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys [B, G, n, K] and values [B, G, n, V] of the token numbers [n], at most R."""
        for log, x in zip(self, (k, v), strict=True):
            log.index_copy_(2, tokens % self.length, x)

    def read(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, G, n, K] and values [B, G, n, V] of the token numbers [n]."""
        slots = tokens % self.length
        return self.keys.index_select(2, slots), self.values.index_select(2, slots)
