"""Rollback of a cache: whether it can be cropped, and snapshots of recurrent states, which cannot."""

from __future__ import annotations

from typing import Any

import torch

from patchkit import _compat

# Cache layers of which a snapshot copies the states; keys and values are never written in place, so a reference is enough.
_REPLAYED = (_compat.DynamicLayer, _compat.LinearAttentionLayer)


def snapshot_of(layer: Any) -> dict[str, Any]:
    """Return the attributes of a cache layer, with copies of the states that forwards overwrite."""
    return {name: _copied(value) if name.endswith("_states") else value for name, value in vars(layer).items()} | {
        name: dict(value) for name, value in vars(layer).items() if name.startswith(("is_", "has_")) and isinstance(value, dict)
    }


def _copied(states: Any) -> Any:
    if isinstance(states, dict):
        return {index: _copied(state) for index, state in states.items()}
    return states.clone() if torch.is_tensor(states) else states


def rollback_of(cache: Any) -> str | None:
    """The way in which ``cache`` rolls back: "crop", "replay" (restore a snapshot and feed the accepted tokens again), or None for none."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    if all(map(_is_croppable, layers)):
        return "crop"
    if type(cache) is _compat.DynamicCache and all(isinstance(layer, _REPLAYED) or _is_croppable(layer) for layer in layers):
        return "replay"
    return None


def _is_croppable(layer: Any) -> bool:
    # The recurrent layers of transformers 5.15 lack this attribute.
    return bool(getattr(layer, "is_croppable", False))
