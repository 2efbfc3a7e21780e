"""Forwards that are cut where a refresh is due."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.handle import Handle
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.inputs import notice_padding, refuse_packing
from patchkit.streaming.refresh import RefreshedCache
from patchkit.streaming.runtime import Runtime, runtime_of
from patchkit.training_mode import is_in_force


@dataclass(eq=False)
class Cut:
    """A forward that is run in pieces, with refreshes between them.

    Attributes:
        outputs: of the pieces before the last.
        ids: [B, T] of the last piece; None if it was given as embeddings.
        keeps_cache: the caller asked for the cache.
    """

    outputs: list[Any]
    ids: torch.Tensor | None
    keeps_cache: bool


def before_refreshed_forward(
    hits: Counter[str], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refresh the cache where that is due: run a forward that goes beyond such a position up to it, refresh, and go on with the rest."""
    runtime = runtime_of(decoder)
    assert runtime is not None
    kwargs = _compat.by_name(decoder, args, kwargs)
    cache, mask = kwargs.get(_compat.CACHE), kwargs.get("attention_mask")
    is_own = isinstance(cache, RefreshedCache) and cache.plan is runtime.plan
    if not (cache is None or is_own) or not is_in_force(decoder, cache):
        return None
    ids = kwargs.get("input_ids")
    batch, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    keeps_cache = cache is not None or bool(use_cache)
    if cache is None:
        cache = runtime.plan.new_cache()
        assert isinstance(cache, RefreshedCache)
    cache.make_writable()
    start = cache.stream.seen
    end = start + tokens
    notice_padding(cache.stream, mask, batch, tokens)
    refuse_packing(kwargs.get("position_ids"), mask, start, tokens)
    cut = Cut([], ids, keeps_cache)
    if cache.refresh_at() >= end:
        cache.cut = cut if keeps_cache else None
        return ((), {**kwargs, _compat.CACHE: cache}) if keeps_cache else None
    if tokens > 1 and torch.is_grad_enabled():
        raise StreamError("a refresh cuts this forward, and gradients do not pass through it: call the model under torch.no_grad()")
    run = functools.partial(_run_uncounted, runtime, decoder)
    try:
        while (due := cache.refresh_at()) < end:
            if due > cache.stream.seen:
                cut.outputs.append(decoder(**_piece(kwargs, cache, start, end, due)))
            hits["refreshes"] += cache.refresh(run)
    except BaseException:
        cache.stream.broken = True
        raise
    last = _piece(kwargs, cache, start, end, end)
    cut.ids, cache.cut = last.get("input_ids"), cut
    return (), last


def after_refreshed_forward(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Join the outputs of the pieces. Also called after a failed forward, with ``output`` None."""
    cache = kwargs.get(_compat.CACHE)
    if not isinstance(cache, RefreshedCache):
        return None
    cut, cache.cut = cache.cut, None
    if cut is None or output is None:
        return None
    cache.remember(cut.ids)
    return _joined_outputs([*cut.outputs, output], cut.keeps_cache) if cut.outputs else None


def _piece(kwargs: dict[str, Any], cache: RefreshedCache, start: int, end: int, stop: int) -> dict[str, Any]:
    """Cut the arguments of a forward over tokens ``start`` to ``end`` to the tokens from the first unseen one to ``stop``."""
    part = slice(cache.stream.seen - start, stop - start)
    batched = {name: x[:, part] for name, x in kwargs.items() if torch.is_tensor(x) and x.ndim > 1 and x.shape[1] == end - start}
    piece = {**kwargs, **batched, _compat.CACHE: cache, "use_cache": True, "position_ids": None}
    if kwargs.get("attention_mask") is not None:
        piece["attention_mask"] = kwargs["attention_mask"][:, :stop]
    return {name: value for name, value in piece.items() if value is not None}


def _run_uncounted(runtime: Runtime, decoder: nn.Module, ids: torch.Tensor, cache: StreamingCache) -> None:
    counters, runtime.counters = runtime.counters, []
    try:
        decoder(input_ids=ids, use_cache=True, **{_compat.CACHE: cache})
    finally:
        runtime.counters = counters


def _joined_outputs(outputs: list[Any], keeps_cache: bool) -> Any:
    """Join outputs of consecutive pieces into one: concatenate tensors [B, T, ...], and keep the cache of the last."""
    last = outputs[-1]
    if isinstance(last, _compat.Cache):
        return last if keeps_cache else None
    if last is None:
        return None
    if torch.is_tensor(last) and last.ndim == 3:
        return torch.cat(outputs, 1)
    if isinstance(last, dict):
        return type(last)(**{name: _joined_outputs([output[name] for output in outputs], keeps_cache) for name in last})
    if isinstance(last, tuple):
        return tuple(_joined_outputs(list(each), keeps_cache) for each in zip(*outputs, strict=True))
    raise StreamError(f"a refresh cuts this forward, and a {type(last).__name__} of its pieces cannot be joined: feed fewer tokens")


def install_refresh(decoder: nn.Module, handle: Handle) -> None:
    """Refresh the decoder's cache where that is due, around the hooks of the stream."""
    handle.pre_hook(decoder, functools.partial(before_refreshed_forward, handle.record.hits), with_kwargs=True, prepend=True)
    handle.hook(decoder, after_refreshed_forward, with_kwargs=True, always_call=True)
