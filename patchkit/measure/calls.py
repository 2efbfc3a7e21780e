"""Calls of `generate` as timed steps, and caches of a given length to start timing from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import DynamicCache, PreTrainedModel

from patchkit import _compat
from patchkit.errors import UnsupportedModel
from patchkit.measure.latency import DecodeStream, filled_cache, prefilled_cache

# Tokens of one call.
NEW_TOKENS = 64
_PREFILL_CHUNK = 1024

T = TypeVar("T")


@dataclass
class GenerateCalls(DecodeStream):
    """Greedy calls of `generate`, one prompt after the other, as the steps of a stream; `cache` is that of the last call."""

    prompts: list[torch.Tensor]
    calls: int = 0

    def step(self) -> float:
        prompt = self.prompts[self.calls % len(self.prompts)][None].to(self.model.device)
        self.calls += 1
        model: Any = self.model
        started = time.perf_counter()
        out = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
        )
        new = out.sequences.cpu().shape[1] - prompt.shape[1]  # waits for the device
        elapsed = time.perf_counter() - started
        self.cache = _compat.cache_of(out)
        return 1000 * elapsed / new


def cache_of(model: PreTrainedModel, context: int) -> Any:
    """A cache of `context` tokens: filled at random if it is a plain `DynamicCache`, else by streaming tokens through the model."""
    cache = prefilled_cache(model, 1)
    if cache is None:
        raise UnsupportedModel(f"{type(model).__name__} returns no cache, so its decoding steps cannot be timed")
    if type(cache) is DynamicCache:
        return filled_cache(model, context)
    return prefilled_cache(model, context - 1, _PREFILL_CHUNK, cache)


def run_within_positions(measure: Callable[..., T], *args: Any) -> T:
    """Return `measure(*args)`; an IndexError, which means that positions ran out, is raised as `UnsupportedModel`."""
    try:
        return measure(*args)
    except IndexError as error:
        raise UnsupportedModel(
            f"the model cannot take so many tokens ({error}): its position table ends, so give a smaller context=; "
            "or the tokenizer is not its own"
        ) from error
