"""Forwards of a model for definitions: logits at chosen positions, and hooks that are removed afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from patchkit import _compat
from patchkit.errors import PatchError

if TYPE_CHECKING:
    pass


class NoDefinition(PatchError):
    """The definition cannot be computed on this model; the message gives the reason."""


def logits_at(model: Any, ids: torch.Tensor, at: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """Logits of ids [B, T] in one forward: [B, P, V] at positions ``at`` [P], [B, T, V] at all for None; without a cache by default."""
    options = {"use_cache": False, **options}
    if at is None or len(at) == ids.shape[1]:
        return model(input_ids=ids, **options).logits
    at = at.to(ids.device)
    if not keeps_some(model):
        return model(input_ids=ids, **options).logits[:, at]
    return model(input_ids=ids, logits_to_keep=at, **options).logits


def keeps_some(model: Any) -> bool:
    """Whether the model can compute logits at some positions only."""
    return "logits_to_keep" in _compat.argument_names(model)


@contextlib.contextmanager
def hooks_removed(hooks: list[Any]) -> Iterator[None]:
    """Run the context without gradients, and remove these hooks afterwards."""
    try:
        with torch.no_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
