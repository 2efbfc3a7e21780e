"""RefreshLite: what a streaming cache does every R tokens about what it has forgotten.

Shapes: B batch, G kv heads, H query heads, T new tokens, n rows or tokens, K key dim, V value dim; S sinks, W window, C slots of the cache:
S + W, or S + N + W with the N exchanged slots of `DynamicSinks`.

A row is due before the token at row position ``C + k R``, k = 1, 2, ...: at places in the text, whatever the calls. Forwards of several
tokens are cut there (`patchkit.patches.streaming`), so that logits do not depend on how a text is fed, and rows of a left-padded batch are
refreshed at their own times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from patchkit import _compat
from patchkit.errors import StreamError
from patchkit.patch import Spelled
from patchkit.streaming.cache import ROLLBACK, Frame, Lane, Plan, Stream, StreamingCache, StreamLayer, writable
from patchkit.target import AttentionLayer, Rotary

# Runs the patched decoder over token ids with a cache, uncounted.
Run = Callable[[torch.Tensor, StreamingCache], object]


class Refresh(Spelled):
    """What `StreamingLLM(refresh=...)` takes; a subclass is a frozen dataclass.

    Attributes:
        every: R, tokens between two refreshes.
    """

    # Tokens that were fed can be taken back, and steps can run compiled.
    can_roll_back: ClassVar[bool] = True

    every: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field.name}={value!r}: give a whole number of tokens, at least 1")

    def lane(self, sinks: int, window: int, rotary: Rotary | None) -> Lane:
        """The rule of a layer."""
        return Lane(sinks, window, rotary)

    def new_cache(self, plan: Plan) -> RefreshedCache:
        """An empty cache."""
        raise NotImplementedError

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        """Why these layers, all of the model's, cannot be refreshed; None if they can."""
        if not plan.owns_all:
            return "some attention layers keep all keys (layers=, or chunked attention), and a refresh is one of the whole model"
        return None


@dataclass(frozen=True)
class Reencode(Refresh):
    """Every R tokens the window is encoded anew, so that its keys and values depend on nothing that was evicted.

    Before token i = C + k R is fed, the cache becomes that of the unpatched model after the text of C tokens ``0 .. S-1, i-W .. i-1``, at
    positions ``0 .. C-1``. So the logits of tokens i .. i+R-1 are those of streaming over that text followed by these tokens. Costs a
    forward of C tokens every R, and the ids of C tokens; while the past is recorded (speculation), also a copy of the cache for every
    refresh in the last 256 tokens.

    Raises:
        ValueError: ``every`` is no whole number of tokens, at least 1.
    """

    name = "reencode"

    every: int = 64

    def new_cache(self, plan: Plan) -> RefreshedCache:
        return ReencodedCache(plan, self)

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        if any(isinstance(layer, _compat.LinearAttentionLayer) for layer in plan.stock_layers()):
            return "its recurrent layers hold a state of the whole text, which an encoding of the window alone would lose"
        longest = max(lane.window for lane in plan.lanes.values())
        if longest > plan.main.window:
            return f"it has layers with a window of their own, of {longest} tokens, which cannot be encoded from {plan.main.window}"
        return super().obstacle(plan, layers)


@dataclass(frozen=True)
class DynamicSinks(Refresh):
    """N evicted tokens with the highest attention mass stay visible, in order of the text, between the sinks and the window.

    Each kv head g of each layer chooses for itself, by the attention that queries gave a token while they saw it,

        m_g(j) = sum over queries q < i that see j, over heads h of group g, of  L(q) * softmax_j(query_qh . key_jg * scale)

    (Zhang et al. 2023, "H2O", https://arxiv.org/abs/2306.14048, section 4). Up to token C + R the N tokens after the sinks hold the N
    slots. Before token i = C + k R, the N tokens with the most mass, of those N and of the R tokens evicted since i - R, take the slots
    in order of the text; the others are forgotten. In-cache positions: sinks 0 .. S-1, these S .. S+N-1, the window S+N .. C-1.

    Differs from H2O in four ways. Choices are made every R tokens, not at each. Keys stand at in-cache positions. An evicted token is not
    seen until the next choice. And masses in the slots are scaled by W / (W + R) before each choice, the current one included, so that
    L(q) is that to the power of the choices since q in which j was in a slot: those tokens are seen by R queries more than the evicted
    ones, and by plain sums nearly nothing would ever be exchanged.

    Costs the scores of every query once more, and per layer N slots, R evicted keys and values, and C + R sums. Masses that differ by no
    more than rounding may be ranked otherwise when tokens are fed in other chunks.

    Args:
        n: N.

    Raises:
        ValueError: an option is no whole number of tokens, at least 1.
    """

    name = "dynamic_sinks"
    can_roll_back = False

    n: int = 16
    every: int = 64

    def place(self, lane: Lane) -> int:
        """In-cache position of the first of the N tokens, once they were chosen."""
        return lane.sinks - self.n

    def lane(self, sinks: int, window: int, rotary: Rotary | None) -> Lane:
        return DynamicLane(sinks + self.n, window, rotary, refresh=self)

    def new_cache(self, plan: Plan) -> RefreshedCache:
        return DynamicCache(plan, self)

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        for layer in layers:
            unknown = [name for name in layer.arguments if name in ("softcap", "s_aux", "position_bias")]
            if not layer.interface or unknown:
                what = ", ".join(unknown) or "attention of its own"
                return f"layer {layer.index} ({layer.name}) has {what}, so the attention that a token gets is not a softmax of its scores"
        if any(isinstance(stock, _compat.LinearAttentionLayer) and index in plan.lanes for index, stock in enumerate(plan.stock_layers())):
            return "its attention layers hold recurrent states beside keys and values"
        return super().obstacle(plan, layers)


class RefreshedCache(StreamingCache):
    """A `StreamingCache` that is refreshed; `refresh_at` says when, `refresh` does it.

    Attributes:
        refreshed: tokens seen at the last refresh.
    """

    def __init__(self, plan: Plan, options: Refresh) -> None:
        self.options = options
        self.cut: Any = None  # of a forward that was cut at refreshes, until it returns
        super().__init__(plan)
        self._clear()

    def _clear(self) -> None:
        self.refreshed = 0
        self._pads: tuple[torch.Tensor | None, list[int]] = (None, [0])

    def reset(self) -> None:
        super().reset()
        self._clear()

    @property
    def pads(self) -> list[int]:
        """Left padding of every row, or [0]; read off the tensor once, because steps must not look into tensors."""
        pads = self.stream.pads
        if self._pads[0] is not pads:
            self._pads = pads, [0] if pads is None else pads.tolist()
        return self._pads[1]

    def refresh_at(self) -> int:
        """The number of seen tokens, this one or a later one, at which a row is due."""
        first, every = max(self.stream.seen, self.refreshed + 1), self.options.every
        starts = (pad + self.plan.main.capacity for pad in self.pads)
        return min(start + every * max(1, -((start - first) // every)) for start in starts)

    def refresh(self, run: Run) -> bool:
        """Refresh the rows that are due now. Returns whether there were any."""
        seen, every = self.stream.seen, self.options.every
        ages = [seen - pad - self.plan.main.capacity for pad in self.pads]
        due = [row for row, age in enumerate(ages) if age > 0 and age % every == 0]
        if not due:
            return False
        # Without padding all rows are due at once.
        batch = self.own_layers[0].keys.shape[0]
        rows = torch.arange(batch) if self.stream.pads is None else torch.tensor(due)
        with torch.no_grad():
            self._refresh_rows(rows, run)
        self.refreshed = seen
        return True

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        raise NotImplementedError

    def remember(self, ids: torch.Tensor | None) -> None:
        """Take note of the token ids [B, T] that were fed last."""

    def _row_pads(self, rows: torch.Tensor) -> torch.Tensor:
        """[n] left padding of these rows."""
        pads = self.stream.pads
        return torch.zeros_like(rows) if pads is None else pads.cpu()[rows]


@dataclass(eq=False)
class _Before:
    """What a refresh has replaced, for a rollback to before it."""

    seen: int
    refreshed: int
    base: torch.Tensor
    rebase_at: int | None
    layers: list[dict[str, Any]]


class ReencodedCache(RefreshedCache):
    """The cache of `Reencode`.

    Attributes:
        sinks: [B, S] int64, token ids of each row's sinks, as far as they were seen.
        recent: [B, at most W] int64, ids of the last tokens; of ROLLBACK more while the past is recorded.
        before: what the refreshes have replaced since the past is recorded.
    """

    def _clear(self) -> None:
        super()._clear()
        self.sinks: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.before: list[_Before] = []

    def remember(self, ids: torch.Tensor | None) -> None:
        if ids is None:
            raise StreamError("refresh=reencode(...) encodes token ids anew, and was given inputs_embeds: call the model with input_ids")
        lane, end = self.plan.main, self.stream.seen
        if self.sinks is None or self.recent is None:
            self.sinks, self.recent = ids.new_zeros(len(ids), lane.sinks), ids[:, :0]
        start = end - ids.shape[1]
        if lane.sinks and start < self.stream.most_pads + lane.sinks:
            pads = 0 if self.stream.pads is None else self.stream.pads.to(ids.device)[:, None]
            column = pads + torch.arange(lane.sinks, device=ids.device)[None] - start
            inside = (column >= 0) & (column < ids.shape[1])
            found = ids.gather(1, column.clamp(0, ids.shape[1] - 1).expand(len(ids), -1))
            self.sinks = torch.where(inside, found, self.sinks)
        kept = lane.window + (ROLLBACK if self.stream.recording else 0)
        self.recent = torch.cat([self.recent, ids], 1)[:, -kept:]

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        assert self.sinks is not None and self.recent is not None
        stream, main = self.stream, self.plan.main
        if stream.recording:
            self._save()
        else:
            self.before.clear()
        on_device = rows.to(self.recent.device)
        fresh = StreamingCache(self.plan)
        run(torch.cat([self.sinks[on_device], self.recent[on_device, -main.window :]], 1), fresh)
        pads = self._row_pads(rows)
        base = stream.seen - pads - main.capacity
        after = Frame(self.plan, stream.seen - 1, 1, None if stream.pads is None else stream.pads.cpu(), base, rows.device, many=False)
        for layer, new in zip(self.own_layers, fresh.own_layers, strict=True):
            lane = layer.lane
            tokens = _of_rows(after.key_tokens(lane), rows) - pads[:, None]
            slots = lane.slot(torch.where(tokens < main.sinks, tokens, tokens - base[:, None])).to(new.keys.device)
            keys, values = (x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (new.keys, new.values))
            layer.overwrite(rows, keys, values)
        stream.place(rows, base)

    def make_writable(self) -> None:
        super().make_writable()
        if not torch.is_inference_mode_enabled():
            for before in self.before:
                before.base, before.layers = writable(before.base), writable(before.layers)

    # -- rollback ----------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        stream = self.stream
        self.before = [before for before in self.before if stream.highest - before.seen < ROLLBACK]
        self.before.append(
            _Before(stream.seen, self.refreshed, stream.base, stream.rebase_at, [_tensors_of(layer) for layer in self.own_layers])
        )

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        kept = self.stream.seen - count
        if 0 <= count <= self.stream.seen and all(layer.can_roll_back(count) for layer in self.own_layers):
            while self.before and kept < self.before[-1].seen:
                self._put_back(self.before.pop())
            tokens_to_remove = kept - self.stream.seen
        super().crop(tokens_to_remove)
        if self.recent is not None and count:
            self.recent = self.recent[:, :-count]

    def _put_back(self, before: _Before) -> None:
        self.stream.seen, self.refreshed = before.seen, before.refreshed
        self.stream.base, self.stream.rebase_at = before.base, before.rebase_at
        for layer, tensors in zip(self.own_layers, before.layers, strict=True):
            for name in ("keys", "values", "raw", "raw_quarter"):
                if tensors[name] is not None:
                    getattr(layer, name).copy_(tensors[name])  # steps that are compiled know these by their addresses
            layer.log = tensors["log"]

    def _select(self, index: Callable[[torch.Tensor], torch.Tensor], other: Callable[[Any], None]) -> None:
        super()._select(index, other)
        if self.sinks is not None and self.recent is not None:
            self.sinks, self.recent = index(self.sinks), index(self.recent)
        for before in self.before:
            before.base = index(before.base) if len(before.base) > 1 else before.base
            for tensors in before.layers:
                tensors.update({name: _mapped(index, value) for name, value in tensors.items()})

    def n_bytes(self) -> int:
        kept = [self.sinks, self.recent, *(value for before in self.before for tensors in before.layers for value in tensors.values())]
        flat = [tensor for value in kept for tensor in (value if isinstance(value, tuple) else [value]) if tensor is not None]
        return super().n_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in flat)


def _of_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The rows [n] of x [B or 1, ...]; what holds for all holds for them."""
    return x[rows] if len(x) > 1 else x


def _tensors_of(layer: StreamLayer) -> dict[str, Any]:
    return {name: _mapped(torch.clone, getattr(layer, name)) for name in ("keys", "values", "raw", "raw_quarter", "log")}


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(function(tensor) for tensor in value)
    return None if value is None else function(value)


# -- dynamic sinks ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class DynamicLane(Lane):
    """Layers with N exchanged slots; ``sinks`` counts those too, so S + N."""

    refresh: DynamicSinks = DynamicSinks()

    def make_layer(self, index: int, stream: Stream, stock: Any) -> StreamLayer:
        return DynamicLayer(self, stream)


class DynamicCache(RefreshedCache):
    """The cache of `DynamicSinks`."""

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        for layer in self.own_layers:
            if isinstance(layer, DynamicLayer):
                layer.exchange(rows, self._row_pads(rows))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:
            raise StreamError(f"{self.options.spec} has counted the attention of tokens that were fed, so they cannot be taken back")
        super().crop(tokens_to_remove)


class DynamicLayer(StreamLayer):
    """One layer's sinks, exchanged slots and window, and the attention mass of its tokens.

    Attributes:
        mass: [B, G, S + N + W + R] float32, of the token at row position r < S + N at r, of later ones at S + N + (r - S - N) % (W + R).
    """

    is_croppable = False
    lane: DynamicLane
    mass: Any

    def __init__(self, lane: DynamicLane, stream: Stream) -> None:
        self.log_length = lane.refresh.every
        super().__init__(lane, stream)

    @property
    def logs(self) -> bool:
        return True

    def _forget(self) -> None:
        super()._forget()
        self.mass = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        frame = self.stream.frame
        if frame is not None:
            if self.mass is None:
                room = self.lane.capacity + self.lane.refresh.every
                self.mass = key_states.new_zeros(*key_states.shape[:2], room, dtype=torch.float32)
            places = self._places(frame.row_positions(torch.arange(frame.start, frame.end, device=frame.device)))
            self.mass.scatter_(2, self._per_head(places, len(self.mass)), 0.0)
        return super().update(key_states, value_states, *args, **kwargs)

    def observe(
        self, frame: Frame, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, tokens: torch.Tensor, scaling: float | None
    ) -> None:
        """Add the attention of queries [B, H, T, K] to keys [B, H or a divisor, n, K] (token numbers [B or 1, n]) to the mass.

        Args:
            mask: [B or 1, 1, T, n], True where visible, or what to add to the scores; None hides nothing.
        """
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            batch = len(query)
            groups = query.float().unflatten(1, (key.shape[1], -1))  # [B, G', h, T, K]
            scores = groups @ key.float().mT[:, :, None] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if mask is not None:
                mask = mask[:, :, None]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
            weights = scores.softmax(-1).sum((2, 3)).view(batch, self.mass.shape[1], -1, key.shape[2]).sum(2)
            rows = tokens if frame.pads is None else tokens - frame.pads[:, None].to(tokens.device)
            weights = weights * (rows >= 0)[:, None].to(weights.device)  # padding sees itself
            self.mass.scatter_add_(2, self._per_head(self._places(rows), batch), weights)

    def exchange(self, rows: torch.Tensor, pads: torch.Tensor) -> None:
        """Choose anew which tokens the N slots hold, in the batch rows [n] with this padding [n]."""
        lane, seen = self.lane, self.stream.seen
        count, every, device = lane.refresh.n, lane.refresh.every, self.keys.device
        fixed, place = lane.sinks - count, lane.refresh.place(lane)
        rows, pads, order = rows.to(device), pads.to(device)[:, None], torch.arange(count, device=device)
        # Candidates: what is in the slots, then what was evicted since the last time; in order of the text.
        slots = (pads + fixed + order) % lane.sinks  # [n, N]
        evicted = torch.arange(seen - lane.window - every, seen - lane.window, device=device)
        assert self.log is not None
        logged = [log[rows].index_select(2, evicted % every) for log in self.log]
        kept = [_at(x[rows], slots) for x in (self.keys, self.values)]
        keys, values = (torch.cat(pair, 2) for pair in zip(kept, logged, strict=True))
        places = torch.cat([(fixed + order).expand(len(rows), -1), self._places(evicted - pads)], 1)
        masses = self.mass[rows].gather(2, self._per_head(places, len(rows)))
        masses[:, :, :count] *= lane.window / (lane.window + every)
        chosen = masses.topk(count, dim=2).indices.sort(2).values  # [n, G, N]
        if lane.rotary is not None:
            assert self.raw is not None and self.raw_quarter is not None
            part = torch.cat([_at(self.raw[rows], slots), self._rotated(*logged).float()], 2)
            first = seen - pads == lane.capacity + every  # the slots hold the tokens after the sinks, where those were
            base = _of_rows(self.stream.base.to(device), rows)[:, None]
            stands = torch.cat([torch.where(first, fixed, place) + order, evicted - pads - base], 1)  # [n, N + R]
            offsets = place + order - stands[:, None].expand(-1, masses.shape[1], -1).gather(2, chosen)
            cos, sin = lane.rotary.angles(offsets)
            raw = self.raw[rows]
            self.raw[rows] = _put(raw, slots, lane.rotary.turn(_at(part, chosen), cos, sin, 0))
            self.raw_quarter.copy_(lane.rotary.quarter_turn(self.raw))
        self.keys[rows] = _put(self.keys[rows], slots, _at(keys, chosen))
        self.values[rows] = _put(self.values[rows], slots, _at(values, chosen))
        self.mass[rows[:, None], :, (fixed + order)[None]] = masses.gather(2, chosen).transpose(1, 2)

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Where in ``mass`` the tokens at these row positions [B or 1, n] are; padding anywhere."""
        sinks, later = self.lane.sinks, self.lane.window + self.lane.refresh.every
        return torch.where(rows < sinks, rows.clamp(min=0), sinks + (rows - sinks) % later)

    def _per_head(self, places: torch.Tensor, batch: int) -> torch.Tensor:
        """Places [B or 1, n] as an index [B, G, n]."""
        return places.to(self.mass.device)[:, None].expand(batch, self.mass.shape[1], -1)

    def can_roll_back(self, count: int) -> bool:
        return count == 0

    def select_rows(self, index: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().select_rows(index)
        if self.mass is not None:
            self.mass = index(self.mass)

    def n_bytes(self) -> int:
        return super().n_bytes() + (0 if self.mass is None else self.mass.numel() * self.mass.element_size())


def _wide(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Places [n, m] or [n, G, m] of x [n, G, C, D] as an index [n, G, m, D]."""
    places = places[:, None] if places.ndim == 2 else places
    return places[..., None].expand(-1, x.shape[1], -1, x.shape[3])


def _at(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return x.gather(2, _wide(x, places))


def _put(x: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return x.scatter(2, _wide(x, places), new.to(x.dtype))
