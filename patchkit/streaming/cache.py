"""The key-value cache of StreamingLLM: attention sinks and a ring of the last W tokens, with positions that stay bounded.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Tokens are numbered 0, 1, 2, ... as they are fed; with
left padding the *row position* of token i in row b is ``r = i - pads[b]``.

Where a key stands. Rotary models add ``r_query - r_key`` to the score's phase, nothing else of the position. The cache
keeps three kinds of key, each rotated so that this difference is right:

* a window key is stored at its **bounded position** ``r - base``. The query is at ``r - base`` too, so true distances hold.
  When the bounded position would leave ``[0, limit)``, ``base`` moves and the whole ring is rotated once (`Stream.rebase`):
  one turn of W keys in at least S + W steps, and no angle ever grows with the length of the stream.
* a sink key is kept unrotated, at its row position j < S. In one-token steps it is handed out rotated by
  ``excess - base`` with ``excess = max(0, r_query - (S + W - 1))``, which leaves the distance
  ``min(r_query, S + W - 1) - j``: the distance inside the cache.
* in forwards of several tokens every query needs another rotation of the sinks, so the attention function rotates the queries
  instead (`patchkit.streaming.attention`).

Slots. Token i < S + W is in slot i, later ones in ``S + (i - S) % W``. Row b's sinks are its first S real tokens
``g = pads[b] .. pads[b] + S - 1``; one that is not already among the first S slots moves to slot ``g % S`` when the ring
drops it, where that row held padding.

In the steady state a step writes one slot, rotates S keys and hands out the same two tensors: no allocation grows, nothing
depends on a Python integer that changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.static_step import StepCache
from patchkit.streaming.layer import ROLLBACK, StreamLayer, StreamLayerWithState, make_layer
from patchkit.streaming.rule import Plan
from patchkit.streaming.stream import Stream


def writable(value: Any) -> Any:
    """A value with a copy in the place of every tensor in it that inference mode has made."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (list, tuple):
        return type(value)(map(writable, value))
    if type(value) is dict:
        return {name: writable(each) for name, each in value.items()}
    return value


class StreamingCache(_compat.Cache):
    """A cache of `StreamLayer` objects, and transformers' own layers where the model has others.

    Made by a patched model when it is called without a cache; pass the cache that it returns to go on.
    `get_seq_length()` is the number of tokens seen, not kept.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.stream = Stream(plan)
        self.autocast: torch.dtype | None = None  # of the last eager forward of a model whose steps are compiled
        super().__init__(layers=[self._layer(i, layer) for i, layer in enumerate(plan.stock_layers())])

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingCache:
        """A copy for the same model (a prompt is read once, and copies go on): the plan, by which a model knows its caches, stays."""
        for shared in (self.plan, *self.plan.rules.values()):
            memo.setdefault(id(shared), shared)
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _layer(self, index: int, stock: Any) -> Any:
        rule = self.plan.rules.get(index)
        return stock if rule is None else make_layer(rule, index, self.stream, stock)

    @property
    def own_layers(self) -> list[StreamLayer]:
        """The layers that patchkit keeps."""
        return [layer for layer in self.layers if isinstance(layer, StreamLayer)]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.stream.seen

    @property
    def max_cache_len(self) -> int:
        """No limit, as -1: PEFT asks every cache that is no DynamicCache."""
        return -1

    def make_writable(self) -> None:
        """Copy what inference mode has made, if that has ended: such tensors can only be written to within it."""
        if torch.is_inference_mode_enabled() or not self.stream.in_inference:
            return
        for holder in (*self.own_layers, self.stream, self):
            vars(holder).update(
                {name: writable(value) for name, value in vars(holder).items() if name not in ("layers", "context", "step")}
            )
        self.stream.step, self.stream.in_inference = None, False

    def fixed_step(self) -> StepCache | None:
        """The forward under way, if it is of one token, as compiled code sees it; None where it has to run eagerly."""
        return self.stream.fixed_step(self.own_layers)

    def n_bytes(self) -> int:
        """Bytes kept by the layers that patchkit keeps."""
        return sum(layer.n_bytes() for layer in self.own_layers)

    def reset(self) -> None:
        super().reset()
        self.stream.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens, bringing back those that they had pushed out of the window.

        Raises:
            ValueError: a positive number.
            StreamError: more tokens than are recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        count = -tokens_to_remove
        if count > self.stream.seen:
            raise StreamError(f"cannot take back {count} tokens of {self.stream.seen}")
        if not all(layer.can_roll_back(count) for layer in self.own_layers):
            raise StreamError(
                f"cannot take back {count} tokens: what they pushed out of the window was not recorded. Call "
                f"cache.activate_past_recording() before the tokens are fed, and take back at most {ROLLBACK}."
            )
        self.make_writable()
        # Other layers first: one of them may refuse, and nothing must be half done.
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, StreamLayer) or isinstance(layer, StreamLayerWithState):
                layer.crop(tokens_to_remove)
        for own in self.own_layers:
            own.roll_back(count)
        self.stream.take_back(count, self.own_layers)

    def activate_past_recording(self) -> None:
        """From now on keep what the window drops, up to ``ROLLBACK`` tokens, for `crop` to bring back."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(lambda x: x.index_select(0, beam_idx.to(x.device)), lambda layer: type(layer).reorder_cache(layer, beam_idx))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._select(lambda x: x[indices.to(x.device)], lambda layer: layer.batch_select_indices(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(lambda x: x.repeat_interleave(repeats, 0), lambda layer: layer.batch_repeat_interleave(repeats))

    def _select(self, index: Callable[[torch.Tensor], torch.Tensor], other: Callable[[Any], None]) -> None:
        for layer in self.layers:
            if isinstance(layer, StreamLayer):
                layer.select_rows(index)
            if not isinstance(layer, StreamLayer) or isinstance(layer, StreamLayerWithState):
                other(layer)
        self.stream.select_rows(index)
