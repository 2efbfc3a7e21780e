"""The key-value cache of StreamingLLM: attention sinks and a ring of the last W tokens, with positions that stay bounded.

Shapes: B batch, G kv heads, T new tokens, K key dim, V value dim. Tokens are numbered 0, 1, 2, ... as they are fed; with
left padding the *row position* of token i in row b is ``r = i - pads[b]``.

Where a key stands. Rotary models add ``r_query - r_key`` to the score's phase, nothing else of the position. The cache
keeps three kinds of key, each turned so that this difference is right:

* a window key is stored at its **frame position** ``r - base``. The query is at ``r - base`` too, so true distances hold.
  When the frame position would leave ``[0, limit)``, ``base`` moves and the whole ring is turned once (`Stream.rebase`):
  one turn of W keys in at least S + W steps, and no angle ever grows with the length of the stream.
* a sink key is kept unturned, at its row position j < S. In one-token steps it is handed out turned by
  ``excess - base`` with ``excess = max(0, r_query - (S + W - 1))``, which leaves the distance
  ``min(r_query, S + W - 1) - j``: the distance inside the cache.
* in forwards of several tokens every query needs another turn of the sinks, so the attention function turns the queries
  instead (`patchkit.patches.streaming`).

Slots. Token i < S + W is in slot i, later ones in ``S + (i - S) % W``. Row b's sinks are its first S real tokens
``g = pads[b] .. pads[b] + S - 1``; one that is not already among the first S slots moves to slot ``g % S`` when the ring
drops it, where that row held padding.

In the steady state a step writes one slot, turns S keys and hands out the same two tensors: no allocation grows, nothing
depends on a Python integer that changes.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit import _compat
from patchkit.compiled.step import Sinks, StepCache, StepLayer, of_one_dtype
from patchkit.errors import StreamError
from patchkit.target import Rotary, same_rotary

# Tokens that a cache which records its past can take back. Assisted generation drafts 20 or so at a time.
ROLLBACK = 256


@dataclass(eq=False)
class Lane:
    """What the layers with one rule share: S sinks, a window of W tokens, one rotary embedding.

    Attributes:
        number: its place in `StepCache.masks`.
        in_cache: sinks stand at their distance inside the cache (the paper's rule); else at their true distance.
        sliding: it is the layers' own rule, which no patch asked for.
    """

    sinks: int
    window: int
    rotary: Rotary | None
    number: int = 0
    in_cache: bool = True
    sliding: bool = False

    @property
    def capacity(self) -> int:
        """Tokens kept: S + W."""
        return self.sinks + self.window

    def same_rule(self, other: Lane) -> bool:
        """Whether the layers of both can share one lane."""
        mine, its = ((lane.sinks, lane.window, lane.in_cache, lane.sliding) for lane in (self, other))
        return type(self) is type(other) and mine == its and same_rotary(self.rotary, other.rotary)

    @property
    def steps_from(self) -> int:
        """Tokens seen from which on a step needs `step_tensors`."""
        return self.capacity

    @property
    def sees_all(self) -> bool:
        """Whether a query sees everything that is kept of its row."""
        return True

    def within(self, query: torch.Tensor, key: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Which earlier keys a query sees beside the sinks, by the token numbers of both and the query's row position (broadcast)."""
        return key > query - self.window

    def step_tensors(self, frame: Frame) -> list[torch.Tensor | None]:
        """Of a one-token step: its slot [1], and the cosine and sine [B or 1, 1, 1, n] of the sinks' turn, if they turn."""
        token = torch.tensor([frame.start], device=frame.device)
        cos = sin = None
        if self.sinks and self.rotary is not None:
            offset = frame.excess(token) if self.in_cache else torch.zeros_like(frame.row_positions(token))
            cos, sin = self.rotary.angles((offset - frame.base[:, None])[:, None])
        return [self.slot(token), cos, sin]

    def make_layer(self, index: int, stream: Stream, stock: Any) -> StreamLayer:
        """The cache layer that takes the place of transformers' ``stock`` for attention layer ``index``."""
        if isinstance(stock, _compat.LinearAttentionLayer):
            return StreamLayerWithState(self, stream, stock.number_of_states)
        return StreamLayer(self, stream)

    def count(self, hits: Counter[str], frame: Frame) -> None:
        """Count a forward for the report."""
        hits["forwards"] += 1
        hits["tokens"] += frame.tokens
        hits["tokens evicted"] += max(0, frame.end - self.capacity) - max(0, frame.start - self.capacity)

    def slot(self, token: Any) -> Any:
        """The slot of token ``token`` (int or int64 tensor)."""
        in_ring = self.sinks + (token - self.sinks) % self.window
        if torch.is_tensor(token):
            return torch.where(token < self.capacity, token, in_ring)
        return token if token < self.capacity else in_ring


@dataclass(eq=False)
class Plan:
    """How one patched model streams; made once by the patch, shared by all its caches.

    Attributes:
        lanes: the lane of each cache layer that patchkit keeps; other layers keep transformers' own cache layer.
        main: the lane of the streaming layers; its S + W defines in-cache positions.
        limit: frame positions stay below it. None: not bounded, because some rotary layers keep all keys.
        stock_layers: makes transformers' cache layers of a fresh cache.
        owns_all: every attention layer is in a lane, so no mask of transformers' own is needed.
        has_alibi: some layers add a bias that is linear in the distance.
        make_cache: makes the caches, where something is done about them every so many tokens; None: nothing is.
    """

    lanes: dict[int, Lane]
    main: Lane
    limit: int | None
    stock_layers: Callable[[], list[Any]]
    owns_all: bool = True
    has_alibi: bool = False
    make_cache: Callable[[Plan], StreamingCache] | None = None

    def new_cache(self) -> StreamingCache:
        """An empty cache."""
        return StreamingCache(self) if self.make_cache is None else self.make_cache(self)


@dataclass(eq=False)
class Frame:
    """One forward: T tokens after the ``start`` tokens seen so far.

    Attributes:
        pads: [B] left padding per row, or None.
        base: [B or 1] frame origin of each row.
        many: the general form, for several tokens at once or when gradients are wanted; else the in-place step of one token.
        cached: keys come from a cache; else they are the T new ones as the model made them.
        steady: a step in which every query sees every slot, so that no mask is needed.
        rows: B.
        most_pads: the largest of ``pads``, as a plain number.
        highest: the most tokens ever seen before this forward, those that were taken back included.
    """

    plan: Plan
    start: int
    tokens: int
    pads: torch.Tensor | None
    base: torch.Tensor
    device: torch.device
    many: bool = True
    cached: bool = True
    steady: bool = False
    rows: int = 1
    most_pads: int = 0
    highest: int = 0
    _turns: dict[Any, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Tokens seen after this forward."""
        return self.start + self.tokens

    def row_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B or 1, n] row positions of token numbers [n]; negative where the token is padding."""
        return tokens[None] if self.pads is None else tokens[None] - self.pads[:, None]

    def excess(self, tokens: torch.Tensor) -> torch.Tensor:
        """[B or 1, n] how far each token's row position is beyond the last in-cache position S + W - 1."""
        return (self.row_positions(tokens) - (self.plan.main.capacity - 1)).clamp(min=0)

    def position_ids(self) -> torch.Tensor:
        """[B or 1, T] what the model is told: bounded, and true while nothing has been evicted."""
        rows = self.row_positions(torch.arange(self.start, self.end, device=self.device))
        if self.plan.limit is not None:
            rows = rows.clamp(max=self.plan.main.capacity - 1) if self.many else rows - self.base[:, None]
        return rows.clamp(min=0)

    @property
    def turned(self) -> bool:
        """Whether new keys and queries arrive at other positions than their frame positions."""
        return self.plan.limit is not None and self.many and self.end > self.plan.main.capacity

    def window_turn(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B or 1, 1, T, n] from where the model put the new tokens to their frame positions."""
        return self._turn(rotary, "window", self.start, lambda tokens: self.excess(tokens) - self.base[:, None])

    def sink_turn(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from where the model put the queries to their in-cache positions (unbounded plans only)."""
        return self._turn(rotary, "sinks", self.start, lambda tokens: -self.excess(tokens))

    def unturn(self, rotary: Rotary, delay: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, of token numbers ``first`` to ``end - delay``, from their frame positions to no rotation at all."""
        return self._turn(
            rotary, f"back by {delay}", first, lambda tokens: self.base[:, None] - self.row_positions(tokens), self.end - delay
        )

    def _turn(
        self, rotary: Rotary, name: str, first: int, offsets: Callable[[torch.Tensor], torch.Tensor], end: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = (id(rotary), name, first)
        if key not in self._turns:
            tokens = torch.arange(first, self.end if end is None else end, device=self.device)
            self._turns[key] = tuple(t[:, None] for t in rotary.angles(offsets(tokens)))
        return self._turns[key]

    def key_tokens(self, lane: Lane) -> torch.Tensor:
        """[B or 1, n] the token number of every key that a layer of ``lane`` attends to, in order; -1 for an empty slot."""
        if self.start < lane.capacity:
            return torch.arange(self.end, device=self.device)[None]
        slots = torch.arange(lane.capacity, device=self.device)
        oldest = self.start - lane.window
        if self.many:  # sinks, then the window and the new tokens in order of time
            window = torch.arange(oldest, self.end, device=self.device)
        else:  # slot by slot, after the new token has taken the oldest one's
            window = self.start - (self.start - slots[lane.sinks :]) % lane.window
            oldest += 1
        sinks = slots[None, : lane.sinks]
        if self.pads is not None and lane.sinks:
            # The sink token whose slot this is; it is there from the start, or since the ring dropped it.
            first = self.pads[:, None]
            token = first + (sinks - first) % lane.sinks
            sinks = torch.where((token < lane.sinks) | (token < oldest), token, -1)
        return torch.cat([sinks, window.expand(len(sinks), -1)], 1)

    def visible(self, lane: Lane, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """[B or 1, 1, queries, keys] which keys (token numbers [B or 1, n]) each query (token numbers [T]) attends to."""
        pads = 0 if self.pads is None else self.pads[:, None, None]
        query, key = queries[None, :, None], keys[:, None, :]
        row = key - pads
        seen = (key >= 0) & (row >= 0) & (key <= query) & (lane.within(query, key, query - pads) | (row < lane.sinks))
        # A padding query sees itself, so that no row of the softmax is empty.
        return (seen | ((key == query) & (row < 0)))[:, None]


class Stream:
    """Where a batch of sequences stands: what all layers of one cache share."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.recording = False
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.seen = 0
        self.highest = 0  # the most tokens ever seen, before rollbacks
        self.recorded_since = 0
        self.pads: torch.Tensor | None = None
        self.most_pads = 0
        self.base = torch.zeros(1, dtype=torch.int64)
        self.rebase_at = self.plan.limit
        self.frame: Frame | None = None
        self.broken = False
        self.in_inference = False  # a forward ran in inference mode, whose tensors can be written to there only
        self.mask_unsettled = False  # a row has not begun yet, or ended in padding: the next mask must be read again
        self._steady: dict[int, list[Any]] = {}
        self.step: StepCache | None = None  # made when first wanted, dropped when a tensor in it is replaced

    def set_pads(self, pads: torch.Tensor) -> None:
        """Take note of the left padding [B] of every row."""
        self.pads, self.most_pads = pads, int(pads.max())
        self._schedule_rebase()

    def begin(self, tokens: int, layers: list[StreamLayer], device: torch.device, in_place: bool, batch: int = 1) -> Frame:
        """Open the frame of a forward of ``tokens`` new tokens in each row of ``batch``; ``in_place`` when no gradient is wanted.

        Raises:
            StreamError: an earlier forward did not reach its end.
        """
        if self.broken:
            raise StreamError("an earlier forward with this cache failed half-way, so its contents are not defined. Start a new cache.")
        self.broken = True  # until this forward commits
        self.in_inference = self.in_inference or torch.is_inference_mode_enabled()
        self.base = self.base.to(device)
        many = tokens > 1 or not in_place
        if not many and self.rebase_at is not None and self.plan.limit is not None and self.seen >= self.rebase_at:
            rows, base = self._rows_and_base()
            due = (rows - base >= self.plan.limit) & (rows >= self.plan.main.capacity)
            self.rebase(torch.where(due, rows, base), layers)
        lanes = self.lanes
        filled = self.pads is None or self.seen >= self.most_pads + max(lane.capacity for lane in lanes)
        steady = not many and filled and all(lane.sees_all for lane in lanes)
        self.frame = Frame(
            self.plan,
            self.seen,
            tokens,
            self.pads,
            self.base,
            device,
            many=many,
            steady=steady,
            rows=batch,
            most_pads=self.most_pads,
            highest=max(self.highest, self.seen),
        )
        if not many and self.seen >= min(lane.steps_from for lane in lanes):
            self._prepare_step(self.frame)
        return self.frame

    def commit(self) -> None:
        """The forward has gone through every layer."""
        assert self.frame is not None
        self.seen = self.frame.end
        self.highest = max(self.highest, self.seen)
        self.frame = None
        self.broken = False

    def rebase(self, base: torch.Tensor, layers: list[StreamLayer]) -> None:
        """Move the frame origin to ``base`` [B or 1] and turn every window key by the difference."""
        offsets = (self.base - base)[:, None, None]
        for lane in self.lanes:
            if lane.rotary is not None:
                cos, sin = lane.rotary.angles(offsets)
                for layer in layers:
                    if layer.lane is lane:
                        layer.turn_window(cos, sin)
        self.base = base
        self._schedule_rebase()

    def place(self, rows: torch.Tensor, base: torch.Tensor) -> None:
        """Say that what is kept of the batch rows [n] stands in frames with these origins [n]."""
        if self.pads is None:
            self.base = base[:1].to(self.base.device)
        else:
            moved = self.base.expand(len(self.pads)).clone()
            moved[rows] = base.to(moved.device)
            self.base = moved
        self._schedule_rebase()

    def take_back(self, count: int, layers: list[StreamLayer]) -> None:
        """Count ``count`` tokens as not seen; no row is left before its frame, and those no longer full are in that of a fresh stream."""
        self.seen -= count
        rows, base = self._rows_and_base()
        back = torch.where(rows < self.plan.main.capacity, 0, torch.minimum(base, rows))
        if bool((back != base).any()):
            self.rebase(back, layers)

    @property
    def lanes(self) -> list[Lane]:
        """The distinct lanes of the plan."""
        return list({id(lane): lane for lane in self.plan.lanes.values()}.values())

    def _rows_and_base(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[B or 1] the row position of the next token, and the frame origin."""
        rows = torch.full_like(self.base, self.seen) if self.pads is None else self.seen - self.pads
        return rows, self.base.expand(len(rows))

    def _schedule_rebase(self) -> None:
        """Work out, as a plain number, the first token at which a row leaves its frame: steps must not look into tensors."""
        if self.plan.limit is not None:
            origin = self.base if self.pads is None else self.base + self.pads.to(self.base.device)
            self.rebase_at = int(origin.min()) + self.plan.limit

    def _prepare_step(self, frame: Frame) -> None:
        """Put what this step needs of each lane into tensors whose addresses never change."""
        for lane in self.lanes:
            fresh, held = lane.step_tensors(frame), self._steady.get(id(lane))
            if held is None or any(_layout(kept) != _layout(new) for kept, new in zip(held, fresh, strict=True)):
                self._steady[id(lane)] = fresh
                self.step = None
                continue
            for kept, new in zip(held, fresh, strict=True):
                if kept is not None and new is not None:
                    kept.copy_(new)

    def steady(self, lane: Lane) -> list[Any]:
        """What `Lane.step_tensors` says of this step."""
        return self._steady[id(lane)]

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a selection of batch rows."""
        if self.pads is not None:
            self.pads = index(self.pads)
        if len(self.base) > 1:
            self.base = index(self.base)
        self._steady = {}
        self.step = None

    def fixed_step(self, layers: list[StreamLayer]) -> StepCache | None:
        """This step as compiled code sees it; None where it has to run eagerly."""
        frame, lanes = self.frame, self.lanes
        if frame is None or frame.many or not all(layer.is_initialized for layer in layers):
            return None
        if any(frame.start < lane.sinks for lane in lanes):  # a step writes all sinks anew, so there must be all
            return None
        if frame.start < min(lane.steps_from for lane in lanes):
            self._prepare_step(frame)
        for layer in layers:
            layer.before_fixed_step(frame)
        if self.step is None:
            first = [next(layer for layer in layers if layer.lane is lane) for lane in lanes]
            rows = 1 if self.pads is None else len(self.pads)
            masks = [layer.keys.new_zeros(rows, 1, 1, layer.lane.capacity) for layer in first]
            self.step = StepCache([layer.fixed() for layer in layers], torch.zeros((), dtype=torch.int64, device=frame.device), masks)
        self.step.seen.fill_(frame.start)
        self._write_masks(frame, lanes, self.step)
        return self.step

    def _write_masks(self, frame: Frame, lanes: list[Lane], step: StepCache) -> None:
        """0 where a slot is visible, and the lowest number elsewhere."""
        assert step.masks is not None
        full = frame.steady and frame.end >= max(lane.capacity for lane in lanes)
        if full and step.masks_open:
            return
        query = torch.tensor([frame.start], device=frame.device)
        for lane, mask in zip(lanes, step.masks, strict=True):
            keys = frame.key_tokens(lane) if frame.start >= lane.capacity else torch.arange(lane.capacity, device=frame.device)[None]
            mask.zero_().masked_fill_(~frame.visible(lane, query, keys), torch.finfo(mask.dtype).min)
        step.masks_open = full


def _layout(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.device)


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

    def __init__(self, lane: Lane, stream: Stream) -> None:
        super().__init__()
        self.lane = lane
        self.stream = stream
        self.is_sliding = lane.sliding
        self._forget()

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        # The sinks' rotated dimensions, unturned, in float32, and the same a quarter turn on; kept once tokens are evicted.
        self.raw: torch.Tensor | None = None
        self.raw_quarter: torch.Tensor | None = None
        # Evicted tokens, in slot ``token % log_length``, while `logs`.
        self.log: tuple[torch.Tensor, torch.Tensor] | None = None

    # -- transformers' contract of a cache layer ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = (*key_states.shape[:2], self.lane.capacity)
        self.keys = key_states.new_zeros(*size, key_states.shape[-1])
        self.values = value_states.new_zeros(*size, value_states.shape[-1])
        self.is_initialized = True
        self.stream.step = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Store T new keys [B, G, T, K] and values [B, G, T, V]; return those that the new tokens attend to."""
        frame = self.stream.frame
        if frame is None:
            raise StreamError(
                "this streaming cache was given to a model that is not patched (any more). Use it with the model that made it, patched."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_states, value_states = self._of_one_dtype(key_states, value_states)
        if frame.many:
            return self._extend(frame, key_states, value_states)
        if frame.start < self.lane.capacity:
            if frame.start < self.lane.sinks:
                self.raw = None
            self.keys[:, :, frame.start] = key_states[:, :, 0]
            self.values[:, :, frame.start] = value_states[:, :, 0]
            return self.keys[:, :, : frame.end], self.values[:, :, : frame.end]
        return self._step(frame, key_states, value_states)

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
        seen, capacity = self.stream.seen, self.lane.capacity
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

    def _step(self, frame: Frame, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        slot, cos, sin = self.stream.steady(self.lane)[:3]
        slot = slot.to(k.device)
        self._before_overwriting(frame, slot)
        self.keys.index_copy_(2, slot, k)
        self.values.index_copy_(2, slot, v)
        if self.raw is not None and cos is not None and sin is not None:
            assert self.raw_quarter is not None
            turned = torch.addcmul(self.raw * cos.to(k.device), self.raw_quarter, sin.to(k.device))
            self._rotated(self.keys, self.values)[:, :, : self.lane.sinks].copy_(turned)
        return self.keys, self.values

    def _before_overwriting(self, frame: Frame, slot: torch.Tensor) -> None:
        """Keep what the token's slot [1] holds, and still is needed."""
        if self.lane.sinks and self.raw is None:
            self._capture_sinks()
        if self.logs:
            token = torch.tensor([frame.start - self.lane.window], device=self.keys.device)
            self._write_log(token, self.keys.index_select(2, slot), self.values.index_select(2, slot))
        if self.stream.pads is not None:
            dropped = frame.start - self.lane.window
            if self.lane.sinks and self.lane.sinks <= dropped < self.stream.most_pads + self.lane.sinks:
                self._keep_sinks(frame, dropped, self.keys.index_select(2, slot), self.values.index_select(2, slot))

    def before_fixed_step(self, frame: Frame) -> None:
        """What `_step` does before it writes."""
        if frame.start >= self.lane.capacity:
            self._before_overwriting(frame, self.stream.steady(self.lane)[0])
        elif self.lane.sinks and self.raw is None:
            self._capture_sinks()

    def fixed(self) -> StepLayer:
        """This layer as compiled code sees it."""
        return StepLayer(self.keys, self.values, self.stream.steady(self.lane)[0], self._fixed_sinks())

    def _fixed_sinks(self) -> Sinks | None:
        """What a compiled step turns the sinks with; None where they stay as they are."""
        _, cos, sin = self.stream.steady(self.lane)[:3]
        if self.raw is None or self.raw_quarter is None or cos is None or sin is None:
            return None
        rotary = self.lane.rotary
        assert rotary is not None
        return Sinks(rotary.slot == "values", rotary.cached_start, self.raw, self.raw_quarter, cos, sin)

    # -- several tokens ----------------------------------------------------------------------------------------------------

    def _extend(self, frame: Frame, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lane = self.lane
        if lane.rotary is not None and frame.turned:
            k, v = self._turned(k, v, *frame.window_turn(lane.rotary))
        if frame.start == 0:
            keys, values = k, v
        else:
            past_keys, past_values = self._in_time_order(frame.start)
            keys, values = torch.cat([past_keys, k], 2), torch.cat([past_values, v], 2)
        with torch.no_grad():
            self._store(frame, keys.detach(), values.detach(), k.detach(), v.detach())
        return keys, values

    def _store(self, frame: Frame, keys: torch.Tensor, values: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        lane, start, end = self.lane, frame.start, frame.end
        # Tokens that this forward pushes out of the window, and the row of token i in `keys`: i + offset.
        dropped = range(max(lane.sinks, start - lane.window), max(lane.sinks, end - lane.window))
        offset = lane.capacity - start if start >= lane.capacity else 0
        if self.logs and dropped:
            tokens = torch.arange(max(dropped.start, dropped.stop - self.log_length), dropped.stop, device=k.device)
            self._write_log(tokens, keys.index_select(2, tokens + offset), values.index_select(2, tokens + offset))
        kept = max(0, frame.tokens - lane.window)
        slots = lane.slot(torch.arange(start + kept, end, device=k.device))
        first_sinks = min(lane.sinks, end) - start
        if first_sinks > 0:
            self.raw = None
            self.keys[:, :, start : start + first_sinks] = k[:, :, :first_sinks]
            self.values[:, :, start : start + first_sinks] = v[:, :, :first_sinks]
        self.keys.index_copy_(2, slots, k[:, :, kept:])
        self.values.index_copy_(2, slots, v[:, :, kept:])
        if dropped and lane.sinks:
            if self.raw is None:
                self._capture_sinks()
            if frame.pads is not None:
                for token in range(dropped.start, min(dropped.stop, self.stream.most_pads + lane.sinks)):
                    row = token + offset
                    self._keep_sinks(frame, token, keys[:, :, row : row + 1], values[:, :, row : row + 1])

    def _in_time_order(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of what is kept, oldest first, sinks before the window and turned for a forward of several tokens."""
        lane = self.lane
        if start < lane.capacity:
            return self.keys[:, :, :start], self.values[:, :, :start]
        oldest = lane.slot(start)
        sinks = self._sinks_for_many()
        rings = (self.keys, self.values)
        keys, values = (torch.cat([s, x[:, :, oldest:], x[:, :, lane.sinks : oldest]], 2) for s, x in zip(sinks, rings, strict=True))
        return keys, values

    def _sinks_for_many(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The sinks' keys and values: at their row positions, or with true distances at their frame positions."""
        keys, values = self.keys[:, :, : self.lane.sinks].clone(), self.values[:, :, : self.lane.sinks].clone()
        if self.lane.rotary is not None and self.lane.sinks:
            if self.raw is None:
                self._capture_sinks()
            assert self.raw is not None and self.raw_quarter is not None
            raw = self.raw
            if not self.lane.in_cache:
                cos, sin = self.lane.rotary.angles(-self.stream.base[:, None, None].to(raw.device))
                raw = raw * cos + self.raw_quarter * sin
            self._rotated(keys, values).copy_(raw)
        return keys, values

    # -- sinks, log, turns -------------------------------------------------------------------------------------------------

    def _rotated(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """A view of the rotated dimensions."""
        rotary = self.lane.rotary
        assert rotary is not None
        x = keys if rotary.slot == "keys" else values
        return x[..., rotary.cached_start : rotary.cached_start + rotary.width]

    def _turned(self, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rotary = self.lane.rotary
        assert rotary is not None
        cos, sin = cos.to(k.device), sin.to(k.device)
        if rotary.slot == "keys":
            return rotary.turn(k, cos, sin, rotary.cached_start), v
        return k, rotary.turn(v, cos, sin, rotary.cached_start)

    def _capture_sinks(self) -> None:
        """Keep the sinks as they are, unturned, before the first eviction."""
        if self.lane.rotary is not None:
            self.stream.step = None
            self.raw = self._rotated(self.keys, self.values)[:, :, : self.lane.sinks].float().clone()
            self.raw_quarter = self.lane.rotary.quarter_turn(self.raw)

    def _keep_sinks(self, frame: Frame, token: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Where the dropped ``token`` (its key and value [B, G, 1, *]) is a sink of a left-padded row, move it to its slot."""
        assert frame.pads is not None
        row = token - frame.pads
        mine = ((row >= 0) & (row < self.lane.sinks)).to(k.device)[:, None, None]
        slot = token % self.lane.sinks
        if self.raw is not None:
            assert self.lane.rotary is not None
            self.raw[:, :, slot] = torch.where(mine, self._rotated(k, v)[:, :, 0].float(), self.raw[:, :, slot])
            assert self.raw_quarter is not None
            self.raw_quarter.copy_(self.lane.rotary.quarter_turn(self.raw))
        self.keys[:, :, slot] = torch.where(mine, k[:, :, 0], self.keys[:, :, slot])
        self.values[:, :, slot] = torch.where(mine, v[:, :, 0], self.values[:, :, slot])

    def _write_log(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        if self.log is None:
            self.log = k.new_zeros(*k.shape[:2], self.log_length, k.shape[-1]), v.new_zeros(*v.shape[:2], self.log_length, v.shape[-1])
        for log, x in zip(self.log, (k, v), strict=True):
            log.index_copy_(2, tokens % self.log_length, x)

    def turn_window(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn every key of the ring, and of the log, by one angle [B or 1, 1, 1, n] per row."""
        if not self.is_initialized:
            return
        rotary = self.lane.rotary
        assert rotary is not None
        cos, sin = cos.to(self.keys.device), sin.to(self.keys.device)
        for keys, values in [(self.keys[:, :, self.lane.sinks :], self.values[:, :, self.lane.sinks :]), *([self.log] if self.log else [])]:
            part = self._rotated(keys, values)
            part.copy_(rotary.turn(part, cos, sin, 0))

    def overwrite(self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Replace what is kept of the batch rows [n], in the same slots: keys [n, G, S+W, K] (sinks at their row positions), values."""
        rows = rows.to(self.keys.device)
        self.keys[rows], self.values[rows] = keys, values
        if self.raw is not None and self.raw_quarter is not None:
            self.raw[rows] = self._rotated(keys, values)[:, :, : self.lane.sinks].float()
            assert self.lane.rotary is not None
            self.raw_quarter.copy_(self.lane.rotary.quarter_turn(self.raw))

    def can_roll_back(self, count: int) -> bool:
        """Whether the tokens that the last ``count`` ones pushed out of the window are on record."""
        stream, lane = self.stream, self.lane
        kept = stream.seen - count
        if count == 0 or stream.seen <= lane.capacity:
            return True
        oldest_wanted = max(kept, lane.capacity) - lane.window
        return stream.recording and stream.highest - kept <= ROLLBACK and oldest_wanted >= stream.recorded_since - lane.window

    def roll_back(self, count: int) -> None:
        """Bring back the tokens that the last ``count`` ones pushed out of the window."""
        lane, seen = self.lane, self.stream.seen
        if not self.is_initialized or count == 0 or seen <= lane.capacity:
            return
        first = max(seen - count, lane.capacity)
        # Later ones pushed out tokens that are taken back themselves.
        tokens = torch.arange(first, min(first + lane.window, seen), device=self.keys.device)
        assert self.log is not None
        for ring, log in zip((self.keys, self.values), self.log, strict=True):
            ring.index_copy_(2, lane.slot(tokens), log.index_select(2, (tokens - lane.window) % ROLLBACK))
        if self.raw is not None:
            self._rotated(self.keys, self.values)[:, :, : lane.sinks].copy_(self.raw)

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

    def __init__(self, lane: Lane, stream: Stream, number_of_states: int) -> None:
        StreamLayer.__init__(self, lane, stream)
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
        for shared in (self.plan, *self.plan.lanes.values()):
            memo.setdefault(id(shared), shared)
        copied = memo[id(self)] = type(self).__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def _layer(self, index: int, stock: Any) -> Any:
        lane = self.plan.lanes.get(index)
        return stock if lane is None else lane.make_layer(index, self.stream, stock)

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
            vars(holder).update({name: writable(value) for name, value in vars(holder).items() if name not in ("layers", "frame", "step")})
        self.stream.step, self.stream.in_inference = None, False

    def step(self) -> StepCache | None:
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
