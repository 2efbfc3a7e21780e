"""One layer's sinks and window.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim; S sinks, W window. Positions: see `patchkit.streaming.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.static_step import Sinks, StepLayer, of_one_dtype
from patchkit.streaming.int8_layer import Int8StepLayer, layout, pack_new, read, read_in_blocks, room_like, write
from patchkit.streaming.rollback_log import ROLLBACK, RollbackLog
from patchkit.streaming.rule import ForwardContext, LayerRule
from patchkit.streaming.sinks import UnrotatedSinks
from patchkit.streaming.stream import Stream


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
        self._clear()

    def _clear(self) -> None:
        self.keys = self.values = None
        self.wide: Any = None  # with int8, the dtype in which keys come and go
        self.is_initialized = False
        self.unrotated: UnrotatedSinks | None = None  # kept once tokens are evicted
        self.log: RollbackLog | None = None  # of evicted tokens, while `logs`

    # -- transformers' contract of a cache layer ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = (*key_states.shape[:2], self.rule.capacity)
        if self.rule.int8:
            self.wide = key_states.dtype
            self.keys, self.values = room_like(key_states, *size), room_like(value_states, *size)
        else:
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
        if self.rule.int8:
            return self._update_int8(context, key_states, value_states)
        if context.in_blocks:
            return self._extend(context, key_states, value_states)
        if context.start < self.rule.capacity:
            if context.start < self.rule.sinks:
                self.unrotated = None
            self.keys[:, :, context.start] = key_states[:, :, 0]
            self.values[:, :, context.start] = value_states[:, :, 0]
            return self.keys[:, :, : context.end], self.values[:, :, : context.end]
        return self._step(context, key_states, value_states)

    @property
    def kv_dtype(self) -> torch.dtype:
        """The dtype of the keys that attention receives."""
        dtype: torch.dtype = self.wide if self.rule.int8 else self.keys.dtype
        return dtype

    def _of_one_dtype(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Convert new and kept keys and values to the wider of their dtypes, as concatenation does: autocast may begin or end."""
        if self.rule.int8:
            wider = torch.promote_types(keys.dtype, self.kv_dtype)
            if wider != self.kv_dtype:
                self.wide, self.stream.step = wider, None
            return keys.to(wider), values.to(wider)
        before = self.keys.dtype, self.values.dtype
        keys, values = of_one_dtype(self, keys, values)
        if (self.keys.dtype, self.values.dtype) != before:
            if self.log is not None:
                self.log = RollbackLog(self.log.keys.to(self.keys.dtype), self.log.values.to(self.values.dtype))
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
        self._clear()

    def activate_past_recording(self) -> None:
        """Log evicted tokens from now on, for `roll_back`."""
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

    # -- one token, once sinks and window are full -------------------------------------------------------------------------

    def _step(self, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slot, cos, sin = self.stream.fixed_tensors(self.rule)[:3]
        slot = slot.to(k.device)
        self._before_overwriting(context, slot)
        self.keys.index_copy_(2, slot, k)
        self.values.index_copy_(2, slot, v)
        if self.unrotated is not None and cos is not None and sin is not None:
            raw, quarter = self.unrotated
            rotated = torch.addcmul(raw * cos.to(k.device), quarter, sin.to(k.device))
            self._rotated_part(self.keys, self.values)[:, :, : self.rule.sinks].copy_(rotated)
        return self.keys, self.values

    def _update_int8(self, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rule = self.rule
        if context.in_blocks:
            new = pack_new(rule, context, k, v)
            past = self._in_time_order(context.start) if context.start else (self.keys[:, :, :0], self.values[:, :, :0])
            context.packed = keys, values = torch.cat([past[0], new[0]], 2), torch.cat([past[1], new[1]], 2)
            with torch.no_grad():
                self._store(context, keys, values, *new)
            return read_in_blocks(rule, context, keys, values, k.dtype, v.dtype)
        slot, offsets, *tables = (x.to(k.device) for x in self.stream.fixed_tensors(rule)[:4])
        if context.start >= rule.capacity:
            self._before_overwriting(context, slot)
        both, at, seen = (tables[0], tables[1]), layout(rule), min(context.end, rule.capacity)
        write(self.keys, self.values, (k, v), slot, offsets, both, at)
        return read(self.keys[:, :, :seen], self.values[:, :, :seen], offsets[:, :, :seen], both, at, k.dtype)

    def _before_overwriting(self, context: ForwardContext, slot: torch.Tensor) -> None:
        """Save the token in ``slot`` [1], which the next write evicts, where a rollback or a padded row's sinks need it."""
        if self.rule.sinks and self.unrotated is None:
            self._capture_sinks()
        if self.logs:
            token = torch.tensor([context.start - self.rule.window], device=self.keys.device)
            self._write_log(token, self.keys.index_select(2, slot), self.values.index_select(2, slot))
        if self.stream.pads is not None:
            dropped = context.start - self.rule.window
            if self.rule.sinks and self.rule.sinks <= dropped < self.stream.most_pads + self.rule.sinks:
                self._keep_sinks(context, dropped, self.keys.index_select(2, slot), self.values.index_select(2, slot))

    def before_fixed_step(self, context: ForwardContext) -> None:
        """Do what `_step` does before it writes: compiled code only writes."""
        if context.start >= self.rule.capacity:
            self._before_overwriting(context, self.stream.fixed_tensors(self.rule)[0])
        elif self.rule.sinks and self.unrotated is None:
            self._capture_sinks()

    def as_step_layer(self) -> StepLayer:
        """Return the view of this layer that compiled code works on."""
        if self.rule.int8:
            return Int8StepLayer(self.keys, self.values, self.stream.fixed_tensors(self.rule), layout(self.rule), self.kv_dtype)
        return StepLayer(self.keys, self.values, self.stream.fixed_tensors(self.rule)[0], self._fixed_sinks())

    def _fixed_sinks(self) -> Sinks | None:
        """Tensors by which a compiled step rotates the sinks; None where it leaves them as they are."""
        _, cos, sin = self.stream.fixed_tensors(self.rule)[:3]
        if self.unrotated is None or cos is None or sin is None:
            return None
        rotary = self.rule.rotary
        assert rotary is not None
        return Sinks(rotary.slot == "values", rotary.cached_start, *self.unrotated, cos, sin)

    # -- several tokens, or one with gradients -----------------------------------------------------------------------------

    def _extend(self, context: ForwardContext, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Concatenate what is kept and what is new for this forward's attention, then store the new tokens without their gradients."""
        rule = self.rule
        if rule.rotary is not None and context.repositions:
            k, v = rule.rotary.rotate_cached(k, v, *context.window_rotation(rule.rotary))
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
            self.unrotated = None
            self.keys[:, :, start : start + first_sinks] = k[:, :, :first_sinks]
            self.values[:, :, start : start + first_sinks] = v[:, :, :first_sinks]
        self.keys.index_copy_(2, slots, k[:, :, kept:])
        self.values.index_copy_(2, slots, v[:, :, kept:])
        if dropped and rule.sinks:
            if self.unrotated is None:
                self._capture_sinks()
            if context.pads is not None:
                for token in range(dropped.start, min(dropped.stop, self.stream.most_pads + rule.sinks)):
                    row = token + offset
                    self._keep_sinks(context, token, keys[:, :, row : row + 1], values[:, :, row : row + 1])

    def _in_time_order(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the kept keys and values, oldest first; sinks come before the window, rotated as a forward in blocks needs them."""
        rule = self.rule
        if start < rule.capacity:
            return self.keys[:, :, :start], self.values[:, :, :start]
        oldest = rule.slot(start)
        sinks = self._sinks_for_blocks()
        rings = (self.keys, self.values)
        keys, values = (torch.cat([s, x[:, :, oldest:], x[:, :, rule.sinks : oldest]], 2) for s, x in zip(sinks, rings, strict=True))
        return keys, values

    def _sinks_for_blocks(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the sinks' keys and values, rotated to their row positions or, with true distances, to their bounded positions."""
        keys, values = self.keys[:, :, : self.rule.sinks].clone(), self.values[:, :, : self.rule.sinks].clone()
        if self.rule.rotary is not None and self.rule.sinks and not self.rule.int8:
            if self.unrotated is None:
                self._capture_sinks()
            assert self.unrotated is not None
            raw, quarter = self.unrotated
            if not self.rule.in_cache:
                cos, sin = self.rule.rotary.angles(-self.stream.base[:, None, None].to(raw.device))
                raw = raw * cos + quarter * sin
            self._rotated_part(keys, values).copy_(raw)
        return keys, values

    # -- sinks, log, rotations -------------------------------------------------------------------------------------------------

    def _rotated_part(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A view of the rotated dimensions [..., n] of keys [..., K] or values [..., V]."""
        assert self.rule.rotary is not None
        return self.rule.rotary.cached_part(keys, values)

    def _capture_sinks(self) -> None:
        """Copy the sinks before the first eviction, while they are not rotated yet."""
        if self.rule.rotary is not None and not self.rule.int8:  # in int8 every key is kept without its rotation
            self.stream.step = None
            self.unrotated = UnrotatedSinks.of(self._rotated_part(self.keys, self.values)[:, :, : self.rule.sinks], self.rule.rotary)

    def _keep_sinks(self, context: ForwardContext, token: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Move the evicted ``token`` (key [B, G, 1, K], value [B, G, 1, V]) to its sink slot, in left-padded rows where it is a sink."""
        assert context.pads is not None
        row = token - context.pads
        mine = ((row >= 0) & (row < self.rule.sinks)).to(k.device)[:, None, None]
        slot = token % self.rule.sinks
        if self.unrotated is not None:
            assert self.rule.rotary is not None
            raw = self.unrotated.raw
            raw[:, :, slot] = torch.where(mine, self._rotated_part(k, v)[:, :, 0].float(), raw[:, :, slot])
            self.unrotated.update_quarter(self.rule.rotary)
        self.keys[:, :, slot] = torch.where(mine, k[:, :, 0], self.keys[:, :, slot])
        self.values[:, :, slot] = torch.where(mine, v[:, :, 0], self.values[:, :, slot])

    def _write_log(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.log is None:
            self.log = RollbackLog.empty(k, v, self.log_length)
        self.log.write(tokens, k, v)

    def rotate_window(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotate every key of the ring and of the log by one angle per row, given as cosine and sine [B or 1, 1, 1, n]."""
        if not self.is_initialized or self.rule.int8:
            return
        rotary = self.rule.rotary
        assert rotary is not None
        cos, sin = cos.to(self.keys.device), sin.to(self.keys.device)
        for keys, values in [(self.keys[:, :, self.rule.sinks :], self.values[:, :, self.rule.sinks :]), *([self.log] if self.log else [])]:
            part = self._rotated_part(keys, values)
            part.copy_(rotary.rotate(part, cos, sin, 0))

    def overwrite(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace all slots of the batch rows [n] by keys [n, G, S+W, K], with sinks at their row positions, and values [n, G, S+W, V]."""
        rows = rows.to(self.keys.device)
        self.keys[rows], self.values[rows] = keys, values
        if self.unrotated is not None:
            assert self.rule.rotary is not None
            self.unrotated.raw[rows] = self._rotated_part(keys, values)[:, :, : self.rule.sinks].float()
            self.unrotated.update_quarter(self.rule.rotary)

    def can_roll_back(self, count: int) -> bool:
        """Whether the tokens that the last ``count`` ones pushed out of the window are in the log."""
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
        # Later ones pushed out tokens that are rolled back themselves.
        tokens = torch.arange(first, min(first + rule.window, seen), device=self.keys.device)
        assert self.log is not None
        for ring, logged in zip((self.keys, self.values), self.log.read(tokens - rule.window), strict=True):
            ring.index_copy_(2, rule.slot(tokens), logged)
        if self.unrotated is not None:
            self._rotated_part(self.keys, self.values)[:, :, : rule.sinks].copy_(self.unrotated.raw)

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection of batch rows to everything kept."""
        if not self.is_initialized:
            return
        self.keys, self.values = index(self.keys), index(self.values)
        if self.unrotated is not None:
            self.unrotated = UnrotatedSinks(*map(index, self.unrotated))
        if self.log is not None:
            self.log = RollbackLog(*map(index, self.log))

    def n_bytes(self) -> int:
        """Bytes of every tensor this layer keeps."""
        tensors = [self.keys, self.values, *(self.unrotated or ()), *(self.log or ())]
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
