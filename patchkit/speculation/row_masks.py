"""Attention masks of a batch whose rows have advanced by different numbers of tokens, and of trees of drafts.

Shapes: R rows, T new tokens, S slots of the cache.
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit.attention import has_own_mask, original_name

# Attention implementations that take a mask of any form.
_MASKABLE = ("eager", "sdpa")


def slot_positions(
    slots: torch.Tensor, first: torch.Tensor, offsets: torch.Tensor, ancestors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions of the tokens in the slots of the cache, and the slots that the nodes of a tree see.

    Args:
        slots: [S] int64.
        first: [R, 1] int64, slot of each row's first new token.
        offsets: [T] int64, distances of the new tokens from the first; of trees [R or 1, T].
        ancestors: [R or 1, T, T] bool, of trees: node j is on node i's path, itself included; None for chains.

    Returns:
        Positions [R or 1, S] int64; and [R, T, S] bool, the slots that each node may see, or None for a chain.
    """
    if ancestors is None:
        return slots[None], None
    rows, count = len(first), offsets.shape[-1]
    node = slots[None] - first  # [R, S] the node of the tree that is in the slot
    inside = (node >= 0) & (node < count)
    node = node.clamp(0, count - 1)
    positions = torch.where(inside, first + offsets.expand(rows, -1).gather(1, node), slots[None])
    on_path = ancestors.expand(rows, -1, -1).gather(2, node[:, None].expand(-1, count, -1))  # [R, T, S]
    return positions, on_path | ~inside[:, None]


def row_mask(
    queries: torch.Tensor,
    keys: torch.Tensor,
    seen: torch.Tensor | None,
    pads: torch.Tensor | None,
    implementation: str,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """Mask [R, 1, T, S] by the layer's own rule, with other positions in each row.

    Args:
        queries, keys: positions [R, T] and [R or 1, S] int64.
        seen: [R, T, S] bool, slots that a query may see at all; None for all.
        pads: [R] left padding; None for none.
        implementation: attention implementation. "sdpa" gets a bool mask, "eager" one to add to the scores.
        kwargs: of transformers' mask functions; "mask_function" is the layer's rule.
    """
    rows = torch.arange(len(queries), device=queries.device)[:, None, None, None]
    key = keys[:, None, None, :]
    origin = torch.zeros_like(rows) if pads is None else pads[:, None, None, None]  # chunks are counted from a row's first token
    mask = kwargs["mask_function"](rows, torch.zeros_like(rows), queries[:, None, :, None] - origin, key - origin)
    if seen is not None:
        mask = mask & seen[:, None]
    if pads is not None:
        mask = mask & (key >= pads[:, None, None, None])
    if implementation == "sdpa":
        return mask
    dtype = kwargs["dtype"]
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def takes_any_mask(configs: list[Any]) -> bool:
    """Whether the attention implementations that these configs name take a mask of any form."""
    return all(original_name(config) in _MASKABLE and not has_own_mask(config) for config in configs)
