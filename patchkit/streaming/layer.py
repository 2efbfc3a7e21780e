"""One layer's sinks and window.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim; S sinks, W window. `patchkit.streaming.cache` says where keys stand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.static_step import Sinks, StepLayer, of_one_dtype
from patchkit.streaming.rule import ForwardContext, LayerRule
from patchkit.streaming.stream import Stream

# Tokens that a cache which records its past can take back. Assisted generation drafts 20 or so at a time.
ROLLBACK = 256


class StreamLayer(_compat.CacheLayerMixin):
    """One layer's sinks and window: keys [B, G, S+W, K] and values [B, G, S+W, V], allocated once."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False
    log_length = ROLLBACK
    keys: Any  # a tensor once initialized, as in every cache layer of transformers
    values: Any
    dtype: Any
    device: Any

    def __init__(self, rule: LayerRule, stream: Stream) -> None:
        super().__init__()
        self.rule = rule
        self.stream = stream
        self.is_sliding = rule.sliding
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        # The sinks' rotated dimensions, unrotated, in float32, and the same rotated by a right angle; kept once tokens are evicted.
        self.raw: torch.Tensor | None = None
        self.raw_quarter: torch.Tensor | None = None
        # Evicted tokens, in slot ``token % log_length``, while `logs`.
        self.log: tuple[torch.Tensor, torch.Tensor] | None = None

    # -- transformers' contract of a cache layer ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = (*key_states.shape[:2], self.rule.capacity)
        self.keys = key_states.new_zeros(*size, key_states.shape[-1])
        self.values = value_states.new_zeros(*size, value_states.shape[-1])
        self.is_initialized = True
        self.stream.step = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys [B, G, T, K] and values [B, G, T, V]; return those that the new tokens attend to."""
        context = self.stream.context
        if context is None:
            raise StreamError(
                "this streaming cache was given to a model that is not patched (any more). Use it with the model that made it, patched."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._of_one_dtype(key_states, value_states)
        if context.many:
            return self._extend(context, key_states, value_states)
        if context.start < self.rule.capacity:
            if context.start < self.rule.sinks:
                self.raw = None
            self.keys[:, :, context.start] = key_states[:, :, 0]
            self.values[:, :, context.start] = value_states[:, :, 0]
            return self.keys[:, :, : context.end], self.values[:, :, : context.end]
        return self._step(context, key_states, value_states)

    def _of_one_dtype(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is kept and what is new in the wider of their dtypes, as in a cache that concatenates them: autocast may begin or end."""
        before = self.keys.dtype, self.values.dtype
        keys, values = of_one_dtype(self, keys, values)
        if (self.keys.dtype, self.values.dtype) != before:
            if self.log is not None:
                self.log = self.log[0].to(self.keys.dtype), self.log[1].to(self.values.dtype)
            self.stream.step = None
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen, as transformers expects: more than are kept."""
        return self.stream.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a forward of ``query_length`` tokens attends to; all tokens when other layers' masks are made from it."""
        seen, capacity = self.stream.seen, self.rule.capacity
        if not self.stream.plan.owns_all:
            return seen + query_length, 0
        if query_length == 1:
            return min(seen + 1, capacity), 0
        return min(seen, capacity) + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._forget()

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def record_past(self) -> bool:
        """Whether `crop` can bring evicted tokens back."""
        return self.stream.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        if value and not self.stream.recording:
            self.stream.recorded_since = self.stream.highest = self.stream.seen
        self.stream.recording = value

    @property
    def logs(self) -> bool:
        """Whether evicted tokens are kept in the log."""
        return self.stream.recording

    # -- one token, steady state -------------------------------------------------------------------------------------------

    def _step(self, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slot, cos, sin = self.stream.held_tensors(self.rule)[:3]
        slot = slot.to(k.device)
        self._before_overwriting(context, slot)
        self.keys.index_copy_(2, slot, k)
        self.values.index_copy_(2, slot, v)
        if self.raw is not None and cos is not None and sin is not None:
            assert self.raw_quarter is not None
            rotated = torch.addcmul(self.raw * cos.to(k.device), self.raw_quarter, sin.to(k.device))
            self._rotated(self.keys, self.values)[:, :, : self.rule.sinks].copy_(rotated)
        return self.keys, self.values

    def _before_overwriting(self, context: ForwardContext, slot: torch.Tensor) -> None:
        """Keep what the token's slot [1] holds, and still is needed."""
        if self.rule.sinks and self.raw is None:
            self._capture_sinks()
        if self.logs:
            token = torch.tensor([context.start - self.rule.window], device=self.keys.device)
            self._write_log(token, self.keys.index_select(2, slot), self.values.index_select(2, slot))
        if self.stream.pads is not None:
            dropped = context.start - self.rule.window
            if self.rule.sinks and self.rule.sinks <= dropped < self.stream.most_pads + self.rule.sinks:
                self._keep_sinks(context, dropped, self.keys.index_select(2, slot), self.values.index_select(2, slot))

    def before_fixed_step(self, context: ForwardContext) -> None:
        """What `_step` does before it writes."""
        if context.start >= self.rule.capacity:
            self._before_overwriting(context, self.stream.held_tensors(self.rule)[0])
        elif self.rule.sinks and self.raw is None:
            self._capture_sinks()

    def fixed(self) -> StepLayer:
        """This layer as compiled code sees it."""
        return StepLayer(self.keys, self.values, self.stream.held_tensors(self.rule)[0], self._fixed_sinks())

    def _fixed_sinks(self) -> Sinks | None:
        """What a compiled step rotates the sinks with; None where they stay as they are."""
        _, cos, sin = self.stream.held_tensors(self.rule)[:3]
        if self.raw is None or self.raw_quarter is None or cos is None or sin is None:
            return None
        rotary = self.rule.rotary
        assert rotary is not None
        return Sinks(rotary.slot == "values", rotary.cached_start, self.raw, self.raw_quarter, cos, sin)

    # -- several tokens ----------------------------------------------------------------------------------------------------

    def _extend(self, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rule = self.rule
        if rule.rotary is not None and context.repositions:
            k, v = self._rotated_by(k, v, *context.window_rotation(rule.rotary))
        if context.start == 0:
            keys, values = k, v
        else:
            past_keys, past_values = self._in_time_order(context.start)
            keys, values = torch.cat([past_keys, k], 2), torch.cat([past_values, v], 2)
        with torch.no_grad():
            self._store(context, keys.detach(), values.detach(), k.detach(), v.detach())
        return keys, values

    def _store(self, context: ForwardContext, keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        rule, start, end = self.rule, context.start, context.end
        # Tokens that this forward pushes out of the window, and the row of token i in `keys`: i + offset.
        dropped = range(max(rule.sinks, start - rule.window), max(rule.sinks, end - rule.window))
        offset = rule.capacity - start if start >= rule.capacity else 0
        if self.logs and dropped:
            tokens = torch.arange(max(dropped.start, dropped.stop - self.log_length), dropped.stop, device=k.device)
            self._write_log(tokens, keys.index_select(2, tokens + offset), values.index_select(2, tokens + offset))
        kept = max(0, context.tokens - rule.window)
        slots = rule.slot(torch.arange(start + kept, end, device=k.device))
        first_sinks = min(rule.sinks, end) - start
        if first_sinks > 0:
            self.raw = None
            self.keys[:, :, start : start + first_sinks] = k[:, :, :first_sinks]
            self.values[:, :, start : start + first_sinks] = v[:, :, :first_sinks]
        self.keys.index_copy_(2, slots, k[:, :, kept:])
        self.values.index_copy_(2, slots, v[:, :, kept:])
        if dropped and rule.sinks:
            if self.raw is None:
                self._capture_sinks()
            if context.pads is not None:
                for token in range(dropped.start, min(dropped.stop, self.stream.most_pads + rule.sinks)):
                    row = token + offset
                    self._keep_sinks(context, token, keys[:, :, row : row + 1], values[:, :, row : row + 1])

    def _in_time_order(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of what is kept, oldest first, sinks before the window and rotated for a forward of several tokens."""
        rule = self.rule
        if start < rule.capacity:
            return self.keys[:, :, :start], self.values[:, :, :start]
        oldest = rule.slot(start)
        sinks = self._sinks_for_many()
        rings = (self.keys, self.values)
        keys, values = (torch.cat([s, x[:, :, oldest:], x[:, :, rule.sinks : oldest]], 2) for s, x in zip(sinks, rings, strict=True))
        return keys, values

    def _sinks_for_many(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sinks' keys and values: at their row positions, or with true distances at their bounded positions."""
        keys, values = self.keys[:, :, : self.rule.sinks].clone(), self.values[:, :, : self.rule.sinks].clone()
        if self.rule.rotary is not None and self.rule.sinks:
            if self.raw is None:
                self._capture_sinks()
            assert self.raw is not None and self.raw_quarter is not None
            raw = self.raw
            if not self.rule.in_cache:
                cos, sin = self.rule.rotary.angles(-self.stream.base[:, None, None].to(raw.device))
                raw = raw * cos + self.raw_quarter * sin
            self._rotated(keys, values).copy_(raw)
        return keys, values

    # -- sinks, log, rotations -------------------------------------------------------------------------------------------------

    def _rotated(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A view of the rotated dimensions."""
        rotary = self.rule.rotary
        assert rotary is not None
        x = keys if rotary.slot == "keys" else values
        return x[..., rotary.cached_start : rotary.cached_start + rotary.width]

    def _rotated_by(self, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self.rule.rotary
        assert rotary is not None
        cos, sin = cos.to(k.device), sin.to(k.device)
        if rotary.slot == "keys":
            return rotary.rotate(k, cos, sin, rotary.cached_start), v
        return k, rotary.rotate(v, cos, sin, rotary.cached_start)

    def _capture_sinks(self) -> None:
        """Keep the sinks as they are, unrotated, before the first eviction."""
        if self.rule.rotary is not None:
            self.stream.step = None
            self.raw = self._rotated(self.keys, self.values)[:, :, : self.rule.sinks].float().clone()
            self.raw_quarter = self.rule.rotary.quarter_rotated(self.raw)

    def _keep_sinks(self, context: ForwardContext, token: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Where the dropped ``token`` (its key and value [B, G, 1, *]) is a sink of a left-padded row, move it to its slot."""
        assert context.pads is not None
        row = token - context.pads
        mine = ((row >= 0) & (row < self.rule.sinks)).to(k.device)[:, None, None]
        slot = token % self.rule.sinks
        if self.raw is not None:
            assert self.rule.rotary is not None
            self.raw[:, :, slot] = torch.where(mine, self._rotated(k, v)[:, :, 0].float(), self.raw[:, :, slot])
            assert self.raw_quarter is not None
            self.raw_quarter.copy_(self.rule.rotary.quarter_rotated(self.raw))
        self.keys[:, :, slot] = torch.where(mine, k[:, :, 0], self.keys[:, :, slot])
        self.values[:, :, slot] = torch.where(mine, v[:, :, 0], self.values[:, :, slot])

    def _write_log(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.log is None:
            self.log = k.new_zeros(*k.shape[:2], self.log_length, k.shape[-1]), v.new_zeros(*v.shape[:2], self.log_length, v.shape[-1])
        for log, x in zip(self.log, (k, v), strict=True):
            log.index_copy_(2, tokens % self.log_length, x)

    def rotate_window(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn every key of the ring, and of the log, by one angle [B or 1, 1, 1, n] per row."""
        if not self.is_initialized:
            return
        rotary = self.rule.rotary
        assert rotary is not None
        cos, sin = cos.to(self.keys.device), sin.to(self.keys.device)
        for keys, values in [(self.keys[:, :, self.rule.sinks :], self.values[:, :, self.rule.sinks :]), *([self.log] if self.log else [])]:
            part = self._rotated(keys, values)
            part.copy_(rotary.rotate(part, cos, sin, 0))

    def overwrite(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace what is kept of the batch rows [n], in the same slots: keys [n, G, S+W, K] (sinks at their row positions), values."""
        rows = rows.to(self.keys.device)
        self.keys[rows], self.values[rows] = keys, values
        if self.raw is not None and self.raw_quarter is not None:
            self.raw[rows] = self._rotated(keys, values)[:, :, : self.rule.sinks].float()
            assert self.rule.rotary is not None
            self.raw_quarter.copy_(self.rule.rotary.quarter_rotated(self.raw))

    def can_roll_back(self, count: int) -> bool:
        """Whether the tokens that the last ``count`` ones pushed out of the window are on record."""
        stream, rule = self.stream, self.rule
        kept = stream.seen - count
        if count == 0 or stream.seen <= rule.capacity:
            return True
        oldest_wanted = max(kept, rule.capacity) - rule.window
        return stream.recording and stream.highest - kept <= ROLLBACK and oldest_wanted >= stream.recorded_since - rule.window

    def roll_back(self, count: int) -> None:
        """Bring back the tokens that the last ``count`` ones pushed out of the window."""
        rule, seen = self.rule, self.stream.seen
        if not self.is_initialized or count == 0 or seen <= rule.capacity:
            return
        first = max(seen - count, rule.capacity)
        # Later ones pushed out tokens that are taken back themselves.
        tokens = torch.arange(first, min(first + rule.window, seen), device=self.keys.device)
        assert self.log is not None
        for ring, log in zip((self.keys, self.values), self.log, strict=True):
            ring.index_copy_(2, rule.slot(tokens), log.index_select(2, (tokens - rule.window) % ROLLBACK))
        if self.raw is not None:
            self._rotated(self.keys, self.values)[:, :, : rule.sinks].copy_(self.raw)

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection of batch rows to everything kept."""
        if not self.is_initialized:
            return
        self.keys, self.values = index(self.keys), index(self.values)
        if self.raw is not None and self.raw_quarter is not None:
            self.raw, self.raw_quarter = index(self.raw), index(self.raw_quarter)
        if self.log is not None:
            self.log = index(self.log[0]), index(self.log[1])

    def n_bytes(self) -> int:
        """Bytes of every tensor this layer keeps."""
        tensors = [self.keys, self.values, self.raw, self.raw_quarter, *(self.log or ())]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class StreamLayerWithState(_compat.LinearAttentionLayer, StreamLayer):  # type: ignore[override]
    """A `StreamLayer` of a model whose layers hold convolution or recurrent states beside keys and values."""

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
        """Take back tokens from the states; `roll_back` does it for keys and values."""
        _compat.LinearAttentionLayer.crop(self, tokens_to_remove)


@functools.singledispatch
def make_layer(rule: LayerRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    """The cache layer that takes the place of transformers' ``stock`` for attention layer ``index``, by the class of its rule."""
    if isinstance(stock, _compat.LinearAttentionLayer):
        return StreamLayerWithState(rule, stream, stock.number_of_states)
    return StreamLayer(rule, stream)
