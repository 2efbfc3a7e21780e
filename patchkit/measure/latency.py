"""Milliseconds per token of single-token decoding, of several streams interleaved.

A machine's speed drifts by more than the differences of interest, so nothing is timed alone: every round steps each stream
once, and two streams are compared by the median of their ratios round by round.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from patchkit import _compat
from patchkit.views import synchronize


def filled_cache(model: PreTrainedModel, context: int) -> DynamicCache:
    """A cache of `context` tokens for an unpatched model, filled with random keys and values.

    A real prefill of 32k tokens takes minutes, and the time of a decode step does not depend on what the cache holds. Shapes
    and dtypes come from a forward of one token; a layer with a window of its own keeps only that. Recurrent states stay those
    of one token.

    Raises:
        ValueError: context < 1.
    """
    if context < 1:
        raise ValueError(f"context is {context}: give at least 1 token")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=_tokens(model, 1), use_cache=True, **{_compat.CACHE: cache})
        layers: list[Any] = list(cache.layers) if context > 1 else []
        for layer in layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.ndim == 4:
                layer.update(_randn_like(keys, context - 1), _randn_like(values, context - 1))
    return cache


def prefilled_cache(
    model: PreTrainedModel, tokens: int, chunk: int = 256, cache: Any = None, progress: Callable[[int], object] | None = None
) -> Any:
    """Stream `tokens` more random tokens in chunks through a model, patched or not, and return its cache."""
    # Only the cache is wanted: where a model allows it, the head runs on one position.
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        for start in range(0, tokens, chunk):
            block = _tokens(model, min(chunk, tokens - start))
            cache = _compat.cache_of(model(input_ids=block, use_cache=True, **{_compat.CACHE: cache}, **options))
            if progress:
                progress(block.shape[1])
    return cache


@dataclass
class DecodeStream:
    """A model and its cache, decoded token by token. Each step leaves the cache one token longer."""

    model: PreTrainedModel
    cache: Any

    def step(self) -> float:
        """Decode one token. Returns milliseconds until its logits are computed."""
        token = _tokens(self.model, 1)
        synchronize(self.model.device)
        started = time.perf_counter()
        with torch.no_grad():
            out = self.model(input_ids=token, use_cache=True, **{_compat.CACHE: self.cache})
        synchronize(self.model.device)
        elapsed = time.perf_counter() - started
        self.cache = _compat.cache_of(out)
        return 1000 * elapsed


Timings = dict[str, list[float]]


def decode_latency(streams: Mapping[str, DecodeStream], rounds: int = 15, warmup: int = 3) -> Timings:
    """Step every stream once per round; the order rotates from round to round, so that none always follows the heavy one.

    Returns:
        Milliseconds per token of each stream, one entry per round; entries of one round belong together.
    """
    names = list(streams)
    timings: Timings = {name: [] for name in names}
    for index in range(-warmup, rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            elapsed = streams[name].step()
            if index >= 0:
                timings[name].append(elapsed)
    return timings


def median_ms(timings: Timings, name: str) -> float:
    """Median milliseconds per token of one stream."""
    return statistics.median(timings[name])


def paired_ratio(timings: Timings, numerator: str, denominator: str) -> float:
    """Median over rounds of the time of one stream / the time of another in the same round."""
    return statistics.median(a / b for a, b in zip(timings[numerator], timings[denominator], strict=True))


def _tokens(model: PreTrainedModel, count: int) -> torch.Tensor:
    embedding: Any = model.get_input_embeddings()
    vocabulary = embedding.weight.shape[0]
    return torch.randint(vocabulary, (1, count), device=model.device)


def _randn_like(states: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.randn(*states.shape[:2], tokens, states.shape[3], dtype=states.dtype, device=states.device)
