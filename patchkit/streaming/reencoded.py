"""The definition of streaming with `Reencode`, for `patchkit prove`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def reencoded_logits(
    model: Any, ids: torch.Tensor, facts: Any, *, plain: Callable[..., torch.Tensor], sinks: int, window: int, every: int
) -> torch.Tensor:
    """The definition of streaming with `Reencode`, from that of streaming without: every R tokens a text begins anew."""
    size = sinks + window
    pieces = [plain(model, ids[:, : size + every], facts)]
    for start in range(size + every, ids.shape[1], every):
        text = torch.cat([ids[:, :sinks], ids[:, start - window : start + every]], 1)
        pieces.append(plain(model, text, facts)[:, size:])
    return torch.cat(pieces, 1)
