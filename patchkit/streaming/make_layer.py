"""The choice of a cache layer's class, and the layer of models with recurrent states."""

from __future__ import annotations

import functools
from typing import Any

from patchkit import _compat
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.rule import LayerRule
from patchkit.streaming.stream import Stream


class StreamLayerWithState(_compat.LinearAttentionLayer, StreamLayer):  # type: ignore[override]
    """A `StreamLayer` of a model whose layers hold convolution or recurrent states in addition to keys and values."""

    is_compileable = False

    def __init__(self, rule: LayerRule, stream: Stream, number_of_states: int) -> None:
        StreamLayer.__init__(self, rule, stream)
        _compat.LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # transformers gives keys and values by position, and states by name.
        if args:
            StreamLayer.lazy_initialization(self, *args)
        else:
            _compat.LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        StreamLayer.reset(self)
        _compat.LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the states; `roll_back` removes them from keys and values."""
        _compat.LinearAttentionLayer.crop(self, tokens_to_remove)


@functools.singledispatch
def make_layer(rule: LayerRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    """Return the cache layer that replaces transformers' ``stock`` for attention layer ``index``, chosen by the class of its rule."""
    if isinstance(stock, _compat.LinearAttentionLayer):
        return StreamLayerWithState(rule, stream, stock.number_of_states)
    return StreamLayer(rule, stream)
