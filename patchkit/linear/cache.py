"""The key-value cache of hybrid attention: a ring of the last keys, and a state that sums up all older ones.

Shapes: B batch, H heads, G kv heads (H = G * h), T tokens, K key dim, V value dim, F features. W is the window of the softmax, S the
number of sinks, R >= W the length of the ring; it is longer where short texts see more than a window (``min_length``).

When query t arrives, key t - W becomes old: it is read from the ring, its rotation is taken back, and its features enter the state, for
any number of tokens at once. So the state after t tokens holds the tokens up to t - 1 - W that are neither padding nor sinks, however
they were fed, and it never holds positions: nothing in it has to be rotated as the stream goes on.

Rollback. While the past is recorded, the features and values that enter the state are logged, and the state is copied every
``ROLLBACK`` tokens; `LinearLayer.roll_back` takes the last copy before the wanted place and adds what the log holds from there on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from patchkit import _compat
from patchkit.anatomy.rotary import Rotary
from patchkit.linear.hybrid import HybridAttention
from patchkit.static_step import Sinks, StepLayer
from patchkit.streaming.layer import ROLLBACK, StreamLayer, StreamLayerWithState, make_layer
from patchkit.streaming.rule import ForwardContext, LayerRule
from patchkit.streaming.stream import Stream

# A copy of the state is at most ROLLBACK tokens old when the next is made, and one of the two is at or before any place to go back to.
_LOGGED = 2 * ROLLBACK


class LinearStep(NamedTuple):
    """What a one-token step of query t does with the state, as tensors at fixed addresses; cosines and sines are [B or 1, 1, 1, n].

    Attributes:
        slot: [1] of key t - W in the ring; any slot if there is none.
        key_cos, key_sin: take back that key's rotation; None if it has none.
        query_cos, query_sin: take back the query's.
        old: [B or 1, 1, 1, 1] float32, 1 if key t - W enters the state, 0 if it is padding, a sink, or not there.
        old_keys: [B or 1, 1] float32, number of keys in the state once it has.
        short: [B or 1, 1] bool, the query sees all keys by softmax and the state is not asked; None if no query does.
    """

    slot: torch.Tensor
    key_cos: torch.Tensor | None
    key_sin: torch.Tensor | None
    query_cos: torch.Tensor | None
    query_sin: torch.Tensor | None
    old: torch.Tensor
    old_keys: torch.Tensor
    short: torch.Tensor | None

    def plain_query(self, query: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
        """The query [B, H, 1, K] without its rotation."""
        return _rotated_by(query, rotary, self.query_cos, self.query_sin)

    def take_in(
        self,
        part: HybridAttention,
        rotary: Rotary | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        state: torch.Tensor,
        normalizer: torch.Tensor,
    ) -> None:
        """Add key t - W of the ring (keys [B, G, S + R, K], values [B, G, S + R, V]) to the state, in place."""
        features, value = self.entering(part, rotary, keys, values)
        state.addcmul_(features.mT, value)
        normalizer.add_(features[:, :, 0])

    def entering(
        self, part: HybridAttention, rotary: Rotary | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, G, 1, F], 0 where nothing enters, and value [B, G, 1, V], both float32, of key t - W."""
        slot = self.slot.to(keys.device)
        key = _rotated_by(keys.index_select(2, slot), rotary, self.key_cos, self.key_sin)
        return part.key_map(key) * self.old.to(keys.device), values.index_select(2, slot).float()


def _rotated_by(x: torch.Tensor, rotary: Rotary | None, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    if rotary is None or cos is None or sin is None:
        return x
    return rotary.rotate(x, cos.to(x.device), sin.to(x.device), rotary.start)


@dataclass(eq=False)
class LinearRule(LayerRule):
    """Layers of hybrid attention. ``window`` is the length R of the ring.

    Attributes:
        softmax_window: W.
        min_length: queries at row positions below it see everything before them.
        parts: the hybrid attention of each layer, by its index.
    """

    softmax_window: int = 1
    min_length: int = 0
    parts: dict[int, HybridAttention] = field(default_factory=dict)

    def same_rule(self, other: LayerRule) -> bool:
        return isinstance(other, LinearRule) and super().same_rule(other) and self.parts is other.parts

    @property
    def steps_from(self) -> int:
        return self.sinks + self.softmax_window

    @property
    def sees_all(self) -> bool:
        return self.window == self.softmax_window

    def within(self, query: torch.Tensor, key: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        near = key > query - self.softmax_window
        return near | (row < self.min_length) if self.min_length else near

    def is_old(self, context: ForwardContext, tokens: torch.Tensor) -> torch.Tensor:
        """[B or 1, n] which of these tokens the state takes in, once they have left the softmax window."""
        return context.row_positions(tokens) >= self.sinks

    def old_keys(self, context: ForwardContext, queries: torch.Tensor) -> torch.Tensor:
        """[B or 1, T] how many keys are old for each of these queries."""
        return (context.row_positions(queries) - (self.softmax_window + self.sinks - 1)).clamp(min=0)

    def step_tensors(self, context: ForwardContext) -> list[torch.Tensor | None]:
        token = torch.tensor([context.start], device=context.device)
        delayed = token - self.softmax_window
        angles: list[torch.Tensor | None] = [None] * 4
        if self.rotary is not None:
            base = context.base[:, None]
            angles = [
                rotation for which in (delayed, token) for rotation in self.rotary.angles((base - context.row_positions(which))[:, None])
            ]
        short = context.row_positions(token) < self.min_length if self.min_length else None
        old = self.is_old(context, delayed).float()[:, :, None, None]
        old_keys = self.old_keys(context, token).float()
        return [*super().step_tensors(context), self.slot(delayed).clamp(min=0), *angles, old, old_keys, short]

    def count(self, hits: Counter[str], context: ForwardContext) -> None:
        hits["forwards"] += 1
        hits["tokens"] += context.tokens
        hits["tokens taken into the state"] += max(0, context.end - self.steps_from) - max(0, context.start - self.steps_from)
        before, switch = max(context.start, context.highest), self.min_length  # the first token whose query may ask the state
        if not switch or before > switch + context.most_pads or context.end <= switch:
            return
        switches = torch.full((context.rows,), switch) if context.pads is None else context.pads.cpu() + switch
        hits["switched to linear"] += int(((switches >= before) & (switches < context.end)).sum())


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

    def _forget(self) -> None:
        super()._forget()
        self.state = self.normalizer = None
        # What entered the state with query t, in slot ``t % _LOGGED``, and copies (t, state, normalizer), while the past is recorded.
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
        if context is not None and not context.many and context.start >= self.rule.steps_from:
            self._record_step(context)
            self.linear_step().take_in(self.part, self.rule.rotary, self.keys, self.values, self.state, self.normalizer)
        return super().update(key_states, value_states, *args, **kwargs)

    def linear_step(self) -> LinearStep:
        """What this step does with the state."""
        return LinearStep(*self.stream.held_tensors(self.rule)[3:])

    def before_fixed_step(self, context: ForwardContext) -> None:
        super().before_fixed_step(context)
        if context.start >= self.rule.steps_from:
            self._record_step(context)

    def fixed(self) -> StepLayer:
        slot = self.stream.held_tensors(self.rule)[0]
        return LinearStepLayer(self.keys, self.values, slot, self._fixed_sinks(), self)

    # -- several tokens ----------------------------------------------------------------------------------------------------

    def advance(
        self, context: ForwardContext, state: torch.Tensor, normalizer: torch.Tensor, entering: Callable[[], tuple[torch.Tensor, ...]]
    ) -> None:
        """A forward of several tokens has taken keys in.

        Args:
            state, normalizer: after it.
            entering: gives features [B, G, n, F], 0 where nothing enters, and values [B, G, n, V], of the keys that entered with its last
                n queries; with the earlier ones none did.
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
        if count == 0 or self.stream.seen <= self.rule.steps_from:
            return True
        reachable = kept <= self.rule.steps_from or (bool(self.copies) and self.copies[0][0] <= kept)
        return super().can_roll_back(count) and reachable

    def roll_back(self, count: int) -> None:
        super().roll_back(count)
        kept = self.stream.seen - count
        if self.state is None or count == 0 or self.stream.seen <= self.rule.steps_from:
            return
        self.copies = [copy for copy in self.copies if copy[0] <= kept]
        if kept <= self.rule.steps_from:  # nothing was old yet
            self.state.zero_()
            self.normalizer.zero_()
            return
        at, state, normalizer = self.copies[-1]
        queries = torch.arange(max(at, self.rule.steps_from), kept, device=self.state.device) % _LOGGED
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
    """State and normalizer with features [B, G, n, F] and values [B, G, n, V] added."""
    return state + features.mT @ values, normalizer + features.sum(2)


class LinearLayerWithState(StreamLayerWithState, LinearLayer):  # type: ignore[override]
    """A `LinearLayer` of a model whose layers hold convolution or recurrent states beside keys and values."""

    def __init__(self, rule: LinearRule, stream: Stream, part: HybridAttention, number_of_states: int) -> None:
        self.part = part
        StreamLayerWithState.__init__(self, rule, stream, number_of_states)


class LinearStepLayer(StepLayer):
    """A `LinearLayer` as compiled code sees it.

    Attributes:
        state, normalizer, part, linear: as in `LinearLayer`; ``linear`` is its `linear_step`.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, sinks: Sinks | None, layer: LinearLayer) -> None:
        super().__init__(keys, values, slots, sinks)
        self.state, self.normalizer, self.part, self.linear = layer.state, layer.normalizer, layer.part, layer.linear_step()
        self.rotary = layer.rule.rotary
        for tensor in [self.state, self.normalizer, *self.linear]:
            if tensor is not None:
                _compat.mark_static_address(tensor)

    def linear_step(self) -> LinearStep:
        """What this step does with the state."""
        return self.linear

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.linear.take_in(self.part, self.rotary, self.keys, self.values, self.state, self.normalizer)
        return super().update(key_states, value_states)


@make_layer.register
def _(rule: LinearRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    if isinstance(stock, _compat.LinearAttentionLayer):
        return LinearLayerWithState(rule, stream, rule.parts[index], stock.number_of_states)
    return LinearLayer(rule, stream, rule.parts[index])
