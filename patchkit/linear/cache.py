"""The key-value cache of hybrid attention: a ring buffer of the last keys, and a state that sums up all older ones.

Shapes: B batch, H heads, G kv heads (H = G * h), T tokens, K key dim, V value dim, F features. W is the window of the softmax, S the
number of sinks, R >= W the length of the ring; it is longer where short sequences see more than a window (``min_length``).

1. When query t arrives, key t - W becomes old: it is read from the ring, its rotation is undone, and its features enter the state, for
   any number of tokens at once.
2. So after t tokens the state holds the tokens up to t - 1 - W that are neither padding nor sinks, however they were fed. It holds no
   positions, and nothing in it has to be rotated later.
3. While the past is recorded, the features and values that enter the state are logged, and the state is copied every ``ROLLBACK``
   tokens. `LinearLayer.roll_back` restores the last copy before the wanted token and adds what was logged after it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat
from patchkit.linear.hybrid import HybridAttention
from patchkit.linear.rule import LinearRule
from patchkit.linear.step import LinearStep, LinearStepLayer
from patchkit.static_step import StepLayer
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.make_layer import StreamLayerWithState, make_layer
from patchkit.streaming.rollback_log import ROLLBACK
from patchkit.streaming.rule import ForwardContext
from patchkit.streaming.stream import Stream

# A copy of the state is at most ROLLBACK tokens old when the next is made, and one of the two is at or before any rollback's goal.
_LOGGED = 2 * ROLLBACK


class LinearLayer(StreamLayer):
    """One layer's ring, and the state of what has left its softmax window.

    Attributes:
        state, normalizer: [B, G, F, V] and [B, G, F] float32, sums of features times values, and of features; None before any token.
    """

    rule: LinearRule
    state: Any
    normalizer: Any

    def __init__(self, rule: LinearRule, stream: Stream, part: HybridAttention) -> None:
        self.part = part
        super().__init__(rule, stream)

    def _clear(self) -> None:
        super()._clear()
        self.state = self.normalizer = None
        # While the past is recorded: what entered the state with query t, in slot ``t % _LOGGED``, and copies (t, state, normalizer).
        self.entered: tuple[torch.Tensor, torch.Tensor] | None = None
        self.copies: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.stream.context
        if self.state is None:
            if self.part.factor.device != key_states.device:
                self.part.to(key_states.device)  # the model has moved since it was patched
            size = (*key_states.shape[:2], self.part.key_map.n_features)
            self.state = key_states.new_zeros(*size, value_states.shape[-1], dtype=torch.float32)
            self.normalizer = key_states.new_zeros(*size, dtype=torch.float32)
        # A step overwrites the key that becomes old; a forward of several tokens hands it over to `advance`.
        if context is not None and not context.in_blocks and context.start >= self.rule.full_from:
            self._record_step(context)
            self.linear_step().update_state(self.part, self.rule.rotary, self.keys, self.values, self.state, self.normalizer)
        return super().update(key_states, value_states, *args, **kwargs)

    def linear_step(self) -> LinearStep:
        """The work of this step on the state."""
        return LinearStep(*self.stream.fixed_tensors(self.rule)[3:])

    def before_fixed_step(self, context: ForwardContext) -> None:
        super().before_fixed_step(context)
        if context.start >= self.rule.full_from:
            self._record_step(context)

    def as_step_layer(self) -> StepLayer:
        slot = self.stream.fixed_tensors(self.rule)[0]
        state = self.state, self.normalizer, self.part, self.rule.rotary, self.linear_step()
        return LinearStepLayer(self.keys, self.values, slot, self._fixed_sinks(), *state)

    # -- several tokens ----------------------------------------------------------------------------------------------------

    def advance(
        self, context: ForwardContext, state: torch.Tensor, normalizer: torch.Tensor, entering: Callable[[], tuple[torch.Tensor, ...]]
    ) -> None:
        """Store the state after a forward of several tokens, and log what entered it while the past is recorded.

        Args:
            state, normalizer: [B, G, F, V] and [B, G, F] float32 after the forward.
            entering: returns features [B, G, n, F], 0 where nothing enters, and values [B, G, n, V], of the keys that entered with the
                last n queries; with earlier queries none did.
        """
        with torch.no_grad():
            if self.stream.recording:
                self._copy_state(context)
                features, values = (x.detach().float() for x in entering())
                self._log(torch.arange(context.end - features.shape[2], context.end, device=features.device), features, values)
                if context.tokens > ROLLBACK:  # the log may not reach back to its beginning
                    early = max(0, features.shape[2] - ROLLBACK)
                    made = _added(self.state, self.normalizer, features[:, :, :early], values[:, :, :early])
                    self.copies = [(context.end - ROLLBACK, *made)]
            self.state.copy_(state.detach())
            self.normalizer.copy_(normalizer.detach())

    # -- rollback ----------------------------------------------------------------------------------------------------------

    def _record_step(self, context: ForwardContext) -> None:
        """Log what enters the state in this one-token step, and copy the state where that is due."""
        if self.stream.recording:
            self._copy_state(context)
            entering = self.linear_step().entering(self.part, self.rule.rotary, self.keys, self.values)
            self._log(torch.tensor([context.start], device=self.keys.device), *entering)

    def _copy_state(self, context: ForwardContext) -> None:
        if not self.copies or context.end - self.copies[-1][0] > ROLLBACK:
            self.copies = [*self.copies[-1:], (context.start, self.state.clone(), self.normalizer.clone())]

    def _log(self, queries: torch.Tensor, features: torch.Tensor, values: torch.Tensor) -> None:
        if self.entered is None:
            self.entered = tuple(x.new_zeros(*x.shape[:2], _LOGGED, x.shape[-1]) for x in (features, values))  # type: ignore[assignment]
        assert self.entered is not None
        for log, x in zip(self.entered, (features, values), strict=True):
            log.index_copy_(2, queries[-_LOGGED:] % _LOGGED, x[:, :, -_LOGGED:])

    def can_roll_back(self, count: int) -> bool:
        kept = self.stream.seen - count
        if count == 0 or self.stream.seen <= self.rule.full_from:
            return True
        reachable = kept <= self.rule.full_from or (bool(self.copies) and self.copies[0][0] <= kept)
        return super().can_roll_back(count) and reachable

    def roll_back(self, count: int) -> None:
        super().roll_back(count)
        kept = self.stream.seen - count
        if self.state is None or count == 0 or self.stream.seen <= self.rule.full_from:
            return
        self.copies = [copy for copy in self.copies if copy[0] <= kept]
        if kept <= self.rule.full_from:  # nothing was old yet
            self.state.zero_()
            self.normalizer.zero_()
            return
        at, state, normalizer = self.copies[-1]
        queries = torch.arange(max(at, self.rule.full_from), kept, device=self.state.device) % _LOGGED
        if len(queries):
            assert self.entered is not None
            state, normalizer = _added(state, normalizer, *(log.index_select(2, queries) for log in self.entered))
        self.state.copy_(state)
        self.normalizer.copy_(normalizer)

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().select_rows(index)
        if self.state is None:
            return
        self.state, self.normalizer = index(self.state), index(self.normalizer)
        self.copies = [(at, index(state), index(normalizer)) for at, state, normalizer in self.copies]
        if self.entered is not None:
            self.entered = index(self.entered[0]), index(self.entered[1])

    def n_bytes(self) -> int:
        tensors = [self.state, self.normalizer, *(self.entered or ()), *(tensor for copy in self.copies for tensor in copy[1:])]
        return super().n_bytes() + sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _added(
    state: torch.Tensor, normalizer: torch.Tensor, features: torch.Tensor, values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return state and normalizer with features [B, G, n, F] and values [B, G, n, V] added."""
    return state + features.mT @ values, normalizer + features.sum(2)


class LinearLayerWithState(StreamLayerWithState, LinearLayer):  # type: ignore[override]
    """A `LinearLayer` of a model whose layers hold convolution or recurrent states in addition to keys and values."""

    def __init__(self, rule: LinearRule, stream: Stream, part: HybridAttention, number_of_states: int) -> None:
        self.part = part
        StreamLayerWithState.__init__(self, rule, stream, number_of_states)


@make_layer.register
def _(rule: LinearRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    if isinstance(stock, _compat.LinearAttentionLayer):
        return LinearLayerWithState(rule, stream, rule.parts[index], stock.number_of_states)
    return LinearLayer(rule, stream, rule.parts[index])
