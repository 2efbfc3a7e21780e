"""The key-value cache of StreamingLLM: attention sinks and a ring of the last W tokens, with positions that stay bounded.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Tokens are numbered 0, 1, 2, ... as they are fed; with
left padding the *row position* of token i in row b is ``r = i - pads[b]``.

1. Slots. Token i < S + W is in slot i, a later one in the ring buffer: ``S + (i - S) % W``. The sinks of row b are its first S real tokens
   ``g = pads[b] .. pads[b] + S - 1``. One that is not in the first S slots moves to slot ``g % S``, over padding, when the ring evicts it.
2. Window keys are stored rotated to their **bounded position** ``r - base``, and so are queries: their difference is the true distance.
   When it would leave ``[0, limit)``, ``base`` moves and the ring is rotated once (`Stream.rebase`), at most every S + W steps.
3. Sink keys are stored unrotated, at their row position j < S. A one-token step rotates them by ``excess - base`` with
   ``excess = max(0, r_query - (S + W - 1))``. That leaves the distance inside the cache, ``min(r_query, S + W - 1) - j``.
4. Forwards of several tokens need another rotation of the sinks for each query, so they rotate queries (`patchkit.streaming.attention`).

Once the window is full, a step writes one slot, rotates S keys and returns the same two tensors. No angle or allocation grows with the
stream, and nothing depends on a Python integer that changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.prefix.snapshot import state_as_whole
from patchkit.static_step import StepCache
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.make_layer import StreamLayerWithState, make_layer
from patchkit.streaming.rollback_log import ROLLBACK
from patchkit.streaming.rule import Plan
from patchkit.streaming.stream import Stream


def writable(value: Any) -> Any:
    """Return ``value`` with a copy of every tensor in it that inference mode has made."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(writable, value))
    if type(value) in (list, tuple):
        return type(value)(map(writable, value))
    if type(value) is dict:
        return {name: writable(each) for name, each in value.items()}
    return value


@state_as_whole
class StreamingCache(_compat.Cache):
    """A cache of `StreamLayer` objects, and transformers' own layers where the model has others.

    A patched model makes one when it is called without a cache; pass the returned cache to the next call.
    `get_seq_length()` is the number of tokens seen, not kept.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.stream = Stream(plan)
        self.autocast: torch.dtype | None = None  # of the last eager forward of a model whose steps are compiled
        super().__init__(layers=[self._layer(i, layer) for i, layer in enumerate(plan.stock_layers())])

    @property
    def shared_parts(self) -> list[Any]:
        """Objects that all caches of this model share: the plan, by which it knows its caches, the rules, and modules of layers."""
        modules = [value for layer in self.layers for value in vars(layer).values() if isinstance(value, nn.Module)]
        return [self.plan, *self.plan.rules.values(), *modules]

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamingCache:
        """A copy for the same model, so that continuations can share a prompt."""
        for shared in self.shared_parts:
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
        """Copy tensors made in inference mode, if that has ended: only inference mode can write to them."""
        if torch.is_inference_mode_enabled() or not self.stream.in_inference:
            return
        for holder in (*self.own_layers, self.stream, self):
            vars(holder).update(
                {name: writable(value) for name, value in vars(holder).items() if name not in ("layers", "context", "step")}
            )
        self.stream.step, self.stream.in_inference = None, False

    def fixed_step(self) -> StepCache | None:
        """The cache that compiled code works on in the current forward of one token; None where that has to run eagerly."""
        return self.stream.fixed_step(self.own_layers)

    def n_bytes(self) -> int:
        """Bytes kept by the layers that patchkit keeps."""
        return sum(layer.n_bytes() for layer in self.own_layers)

    def reset(self) -> None:
        super().reset()
        self.stream.reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Roll back the last ``-tokens_to_remove`` tokens, and restore those that they had pushed out of the window.

        Raises:
            ValueError: ``tokens_to_remove`` is positive.
            StreamError: more tokens than are recorded.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        count = -tokens_to_remove
        if count > self.stream.seen:
            raise StreamError(f"cannot roll back {count} tokens of {self.stream.seen}")
        if not all(layer.can_roll_back(count) for layer in self.own_layers):
            raise StreamError(
                f"cannot roll back {count} tokens: what they pushed out of the window was not recorded. Call "
                f"cache.activate_past_recording() before the tokens are fed, and roll back at most {ROLLBACK}."
            )
        self.make_writable()
        # Other layers first: one of them may refuse, and nothing must be half done.
        layers: list[Any] = self.layers
        for layer in layers:
            if not isinstance(layer, StreamLayer) or isinstance(layer, StreamLayerWithState):
                layer.crop(tokens_to_remove)
        for own in self.own_layers:
            own.roll_back(count)
        self.stream.roll_back(count, self.own_layers)

    def activate_past_recording(self) -> None:
        """Record evicted tokens from now on, up to ``ROLLBACK`` of them, so that `crop` can restore them."""
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    @property
    def can_append_rows(self) -> bool:
        """Whether `append_rows` can be called: no layer is transformers' own, or holds states of its kind."""
        return all(isinstance(layer, StreamLayer) and not isinstance(layer, StreamLayerWithState) for layer in self.layers)

    def append_rows(self, others: Sequence[StreamingCache]) -> None:
        """Append the rows of other caches of this model, which have seen as many tokens, without padding."""
        parts = [other._by_row() for other in others]
        self._select(lambda x: torch.cat([x, *(next(part) for part in parts)]), lambda layer: None)

    def _by_row(self) -> Iterator[torch.Tensor]:
        """Every tensor with a batch dimension, in the order of `_select`."""
        found: list[torch.Tensor] = []

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        self._select(note, lambda layer: None)
        return iter(found)

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
