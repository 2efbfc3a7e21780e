"""Slots per layer: layers whose keys spread get more, because they are the ones that look things up.

Shapes: L layers, G kv heads, T tokens, K key dim.

Half of all slots is the same for every layer. The other half is distributed as in one competition over all layers: of the scores of all
tokens in all heads the highest `SHARE` is taken, and each layer gets in proportion to how many of them are its own. This is measured once,
when a model is patched, because buffers have to be of fixed size.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.errors import UnsupportedModel
from patchkit.memory.slots import keydiff
from patchkit.views import evaluating

# Share of all tokens that are kept in the competition by which budgets are measured.
SHARE = 0.05

# Random token ids that are read for it. They need no tokenizer, and give nearly the budgets of text.
_TOKENS, _SEED = 1024, 0

_measured: weakref.WeakKeyDictionary[Target, dict[int, float]] = weakref.WeakKeyDictionary()


def measured_shares(target: Target, layers: list[AttentionLayer]) -> dict[int, float]:
    """Return the share of each of these layers in the slots that are distributed, by its index; their sum is 1.

    Raises:
        UnsupportedModel: the model fails on `_TOKENS` tokens, or returns no cache.
    """
    if target not in _measured:
        _measured[target] = _counted(target)
    counts = {layer.index: _measured[target][layer.index] for layer in layers}
    total = sum(counts.values())
    return {index: count / total for index, count in counts.items()}


def split(shares: Mapping[int, float], slots: int, heads: Mapping[int, int]) -> dict[int, int]:
    """Slots per kv head of each layer, by its index: at least 1 each, and at most ``slots`` on average over the ``heads`` of all layers."""
    equal = (slots + 1) // 2
    room = (slots - equal) * sum(heads[index] for index in shares)
    return {index: equal + int(room * share / heads[index]) for index, share in shares.items()}


@torch.no_grad()
def _counted(target: Target) -> dict[int, float]:
    """How many of the highest scores each layer with full attention has, by its index."""
    tokens = min(_TOKENS, target.position_limit or _TOKENS)
    ids = torch.randint(0, max(1, target.config.vocab_size), (1, tokens), generator=torch.Generator().manual_seed(_SEED))
    try:
        with evaluating(target.model):
            cache: Any = _compat.cache_of(target.model(input_ids=ids.to(target.model.device), use_cache=True))
    except Exception as error:
        raise UnsupportedModel(
            f"{type(target.model).__name__} failed on {tokens} random token ids ({type(error).__name__}: {error}), by which slots are "
            'distributed over its layers: give budgets="equal" or a number of slots for each layer'
        ) from error
    scores = {}
    for layer in target.attention_layers:
        if layer.kind == "full":
            keys = cache.layers[layer.index].keys
            if layer.rotary is not None:
                cos, sin = layer.rotary.angles(-torch.arange(keys.shape[2], device=keys.device))
                keys = layer.rotary.rotate(keys, cos, sin, layer.rotary.cached_start)
            scores[layer.index] = keydiff(keys, keys.mean(2, dtype=torch.float64)).flatten().cpu()
    every = torch.cat(list(scores.values()))
    least = every.topk(max(1, int(every.numel() * SHARE))).values[-1]
    return {index: float((each >= least).sum()) for index, each in scores.items()}
