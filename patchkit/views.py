"""Views of a model: a twin over the same weights, contexts without training mode or gradients, the bytes of its cache."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def twin(model: M) -> M:
    """A second module tree over the same parameters and buffers: nothing is copied, and one can be patched while the other is not.

    Twin before patching: a copy of a patched model is patched.
    """
    given: Any = model
    memo: dict[int, Any] = {id(tensor): tensor for tensors in (given.parameters(), given.buffers()) for tensor in tensors}
    return copy.deepcopy(model, memo)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module of ``model`` in evaluation mode within the context, and restore each module's mode afterwards."""
    was_training = [module for module in model.modules() if module.training]
    for module in was_training:
        module.training = False
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of ``model`` require a gradient within the context, and restore each parameter's flag afterwards."""
    wanting = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanting:
            parameter.requires_grad_(True)


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work; nothing to wait for on a CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes of memory behind all tensors of a cache; storage that two tensors share counts once."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [cache]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, torch.nn.Module):
            continue  # a cache may point at its model; weights are not cache
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()
    return sum(storages.values())
