"""The definition of streaming with `Reencode`, for `patchkit prove`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def reencoded_logits(
    model: Any, ids: torch.Tensor, facts: Any, *, plain: Callable[..., torch.Tensor], sinks: int, window: int, every: int
) -> torch.Tensor:
    """Logits [B, T, V] of streaming with `Reencode`, by its definition: every R tokens a new sequence of sinks and window begins.

    Args:
        ids: [B, T].
        facts: passed to ``plain``.
        plain: logits of streaming without refreshes, for (model, ids, facts).
        sinks, window, every: S, W and R, in tokens.
    """
    size = sinks + window
    pieces = [plain(model, ids[:, : size + every], facts)]
    for start in range(size + every, ids.shape[1], every):
        sequence = torch.cat([ids[:, :sinks], ids[:, start - window : start + every]], 1)
        pieces.append(plain(model, sequence, facts)[:, size:])
    return torch.cat(pieces, 1)
