"""Tensors that are made of a model's weights, such as int8 copies: made again when the weights have changed."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.freshness import WeightWatch
from patchkit.handle import Handle

# Forwards of more tokens are prompts, also where a cache holds the beginning; verifications of drafts have fewer.
_FEW_TOKENS = 32

# What is made again is seen by all threads that run the model. One for all models, because a copy cannot take a lock along.
_guard = threading.RLock()


class Derived:
    """Tensors that one patch derives from some weights.

    Args:
        sources: the weights.
        renew: makes everything that is derived from them again, and returns whether anything differs from before.
    """

    def __init__(self, sources: Sequence[torch.Tensor], renew: Callable[[], bool]) -> None:
        self.watch = WeightWatch(sources)
        self.renew = renew

    def refresh(self, thorough: bool = False) -> bool:
        """Renew what is derived, if the weights have changed, or in any case if ``thorough``. Returns whether they had."""
        with _guard:
            changed = bool(self.watch.changes())
            if not changed and not thorough:
                return False
            differs = self.renew()
            self.watch.settle()
            return changed or differs


def keep_fresh(handle: Handle, model: nn.Module, decoder: nn.Module, derived: Derived) -> None:
    """Renew derived tensors when `patchkit.refresh` is called, before prompts, and before the model is saved.

    Prompts are forwards without a cache, with an empty one, and of more than 32 tokens; there all signs of a change are looked for.
    In forwards of 2 to 32 tokens sampled values are not compared; a single token costs a look at a counter of optimizer steps.
    """
    keep_fresh_on_request(handle, derived)
    handle.pre_hook(decoder, functools.partial(refresh_if_due, derived), with_kwargs=True)
    handle.on_undo(functools.partial(_remove, model.register_state_dict_pre_hook(functools.partial(_before_saving, derived))))


def keep_fresh_on_request(handle: Handle, derived: Derived) -> None:
    """Renew derived tensors when `patchkit.refresh` is called; who uses them calls `refresh_if_due`."""
    handle.on_undo(derived.watch.close)
    handle.on_refresh(derived.refresh)


def refresh_if_due(derived: Derived, decoder: nn.Module, args: Any, kwargs: Any) -> None:
    """Renew derived tensors if the forward of ``decoder`` that is about to run shows a change of their weights. A forward pre-hook."""
    if torch.compiler.is_compiling():  # of the user's own: what is traced here would be run with every call
        return
    watch = derived.watch
    if watch.stepped or _is_prompt(decoder, args, kwargs, watch):
        derived.refresh()


def _is_prompt(decoder: nn.Module, args: Any, kwargs: Any, watch: WeightWatch) -> bool:
    named = _compat.by_name(decoder, args, kwargs) if args else kwargs
    fed = named.get("input_ids") if named.get("inputs_embeds") is None else named["inputs_embeds"]
    tokens = fed.shape[1] if isinstance(fed, torch.Tensor) and fed.ndim > 1 else 1
    cache = _compat.cache_given(named)
    if cache is None or tokens > _FEW_TOKENS or cache.get_seq_length() == 0:
        return True
    return tokens > 1 and watch.glance()


def _before_saving(derived: Derived, *args: Any) -> None:
    derived.refresh()


def _remove(hook: Any) -> None:
    hook.remove()
