"""`DynamicSinks`: the evicted tokens that got most attention (heavy hitters, H2O) stay visible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.errors import StreamError
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.make_layer import make_layer
from patchkit.streaming.refresh import Refresh, RefreshedCache, Run, of_rows
from patchkit.streaming.rule import ForwardContext, LayerRule, Plan
from patchkit.streaming.stream import Stream


@dataclass(frozen=True)
class DynamicSinks(Refresh):
    """Heavy hitters: N evicted tokens with the highest attention mass stay visible, in sequence order, between sinks and window.

    Each kv head g of each layer chooses for itself, by the attention that queries gave a token while they saw it,

        m_g(j) = sum over queries q < i that see j, over heads h of group g, of  L(q) * softmax_j(query_qh . key_jg * scale)

    (Zhang et al. 2023, "H2O", https://arxiv.org/abs/2306.14048, section 4). Up to token C + R the N tokens after the sinks hold the N
    slots. Before token i = C + k R, the N tokens with the most mass, of those N and of the R tokens evicted since i - R, take the slots
    in sequence order; the others are dropped. In-cache positions: sinks 0 .. S-1, these S .. S+N-1, the window S+N .. C-1.

    Differs from H2O in four ways:

    * Choices are made every R tokens, not at each.
    * Keys are at in-cache positions.
    * An evicted token is not visible until the next choice.
    * ``mass <- mass * W / (W + R)`` in the N slots at every choice, before the masses are compared. So L(q) is ``(W / (W + R)) ** c`` with
      c the choices since q in which j was in a slot. Tokens in slots are seen by R queries more than evicted ones; with plain sums they
      would nearly always win.

    Costs the scores of every query once more, and per layer N slots, R evicted keys and values, and C + R sums. Masses that differ by no
    more than rounding may be ranked differently when tokens are fed in other chunks.

    Args:
        n: N.
        every: R.

    Raises:
        ValueError: an option is not a whole number of tokens, at least 1.
    """

    name = "dynamic_sinks"
    can_roll_back = False

    n: int = 16
    every: int = 64

    def first_position(self, rule: LayerRule) -> int:
        """In-cache position of the first of the N tokens, once they have been chosen."""
        return rule.sinks - self.n

    def rule(self, sinks: int, window: int, rotary: Rotary | None) -> LayerRule:
        return HeavyHitterRule(sinks + self.n, window, rotary, refresh=self)

    def new_cache(self, plan: Plan) -> RefreshedCache:
        return HeavyHitterCache(plan, self)

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        for layer in layers:
            unknown = [name for name in layer.arguments if name in ("softcap", "s_aux", "position_bias")]
            if not layer.interface or unknown:
                what = ", ".join(unknown) or "its own attention function"
                return f"layer {layer.index} ({layer.name}) has {what}, so the attention that a token gets is not a softmax of its scores"
        if any(isinstance(stock, _compat.LinearAttentionLayer) and index in plan.rules for index, stock in enumerate(plan.stock_layers())):
            return "its attention layers hold recurrent states in addition to keys and values"
        return super().obstacle(plan, layers)


@dataclass(eq=False)
class HeavyHitterRule(LayerRule):
    """The rule of layers with N exchanged slots; ``sinks`` counts those too, so it is S + N."""

    refresh: DynamicSinks = DynamicSinks()


class HeavyHitterCache(RefreshedCache):
    """The cache of `DynamicSinks`."""

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        for layer in self.own_layers:
            if isinstance(layer, HeavyHitterLayer):
                layer.exchange(rows, self._row_pads(rows))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0:
            raise StreamError(f"{self.options.spec} has counted the attention of tokens that were fed, so they cannot be rolled back")
        super().crop(tokens_to_remove)


class HeavyHitterLayer(StreamLayer):
    """One layer's sinks, exchanged slots and window, and the attention mass of its tokens.

    Attributes:
        mass: [B, G, S + N + W + R] float32, of the token at row position r < S + N at r, of later ones at S + N + (r - S - N) % (W + R).
    """

    is_croppable = False
    rule: HeavyHitterRule
    mass: Any

    def __init__(self, rule: HeavyHitterRule, stream: Stream) -> None:
        self.log_length = rule.refresh.every
        super().__init__(rule, stream)

    @property
    def logs(self) -> bool:
        return True

    def _clear(self) -> None:
        super()._clear()
        self.mass = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        context = self.stream.context
        if context is not None:
            if self.mass is None:
                room = self.rule.capacity + self.rule.refresh.every
                self.mass = key_states.new_zeros(*key_states.shape[:2], room, dtype=torch.float32)
            places = self._places(context.row_positions(torch.arange(context.start, context.end, device=context.device)))
            self.mass.scatter_(2, self._per_head(places, len(self.mass)), 0.0)
        return super().update(key_states, value_states, *args, **kwargs)

    def observe(
        self,
        context: ForwardContext,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        tokens: torch.Tensor,
        scaling: float | None,
    ) -> None:
        """Add the attention that queries give to keys to the mass of the keys.

        Args:
            query, key: [B, H, T, K] and [B, H or a divisor, n, K].
            mask: [B or 1, 1, T, n], True where visible, or numbers to add to the scores; None hides nothing.
            tokens: [B or 1, n] token numbers of the keys.
            scaling: of the scores; None for ``K ** -0.5``.
        """
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            batch = len(query)
            groups = query.float().unflatten(1, (key.shape[1], -1))  # [B, G', h, T, K]
            scores = groups @ key.float().mT[:, :, None] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
            if mask is not None:
                mask = mask[:, :, None]
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
            weights = scores.softmax(-1).sum((2, 3)).view(batch, self.mass.shape[1], -1, key.shape[2]).sum(2)
            rows = tokens if context.pads is None else tokens - context.pads[:, None].to(tokens.device)
            weights = weights * (rows >= 0)[:, None].to(weights.device)  # padding sees itself
            self.mass.scatter_add_(2, self._per_head(self._places(rows), batch), weights)

    def exchange(self, rows: torch.Tensor, pads: torch.Tensor) -> None:
        """Choose again which tokens the N slots hold, in the batch rows [n] with this padding [n]."""
        rule, seen = self.rule, self.stream.seen
        count, every, device = rule.refresh.n, rule.refresh.every, self.keys.device
        fixed, place = rule.sinks - count, rule.refresh.first_position(rule)
        rows, pads, order = rows.to(device), pads.to(device)[:, None], torch.arange(count, device=device)
        # Candidates: the tokens in the slots, then those evicted since the last choice; in sequence order.
        slots = (pads + fixed + order) % rule.sinks  # [n, N]
        evicted = torch.arange(seen - rule.window - every, seen - rule.window, device=device)
        assert self.log is not None
        logged = [log[rows].index_select(2, evicted % every) for log in self.log]  # every == log.length
        kept = [_at(x[rows], slots) for x in (self.keys, self.values)]
        keys, values = (torch.cat(pair, 2) for pair in zip(kept, logged, strict=True))
        places = torch.cat([(fixed + order).expand(len(rows), -1), self._places(evicted - pads)], 1)
        masses = self.mass[rows].gather(2, self._per_head(places, len(rows)))
        masses[:, :, :count] *= rule.window / (rule.window + every)
        chosen = masses.topk(count, dim=2).indices.sort(2).values  # [n, G, N]
        if rule.rotary is not None:
            assert self.unrotated is not None
            all_raw = self.unrotated.raw
            raw = all_raw[rows]
            part = torch.cat([_at(raw, slots), self._rotated_part(*logged).float()], 2)
            first = seen - pads == rule.capacity + every  # the slots hold the tokens after the sinks, where those were
            base = of_rows(self.stream.base.to(device), rows)[:, None]
            positions = torch.cat([torch.where(first, fixed, place) + order, evicted - pads - base], 1)  # [n, N + R]
            offsets = place + order - positions[:, None].expand(-1, masses.shape[1], -1).gather(2, chosen)
            cos, sin = rule.rotary.angles(offsets)
            all_raw[rows] = _put(raw, slots, rule.rotary.rotate(_at(part, chosen), cos, sin, 0))
            self.unrotated.update_quarter(rule.rotary)
        self.keys[rows] = _put(self.keys[rows], slots, _at(keys, chosen))
        self.values[rows] = _put(self.values[rows], slots, _at(values, chosen))
        self.mass[rows[:, None], :, (fixed + order)[None]] = masses.gather(2, chosen).transpose(1, 2)

    def _places(self, rows: torch.Tensor) -> torch.Tensor:
        """Indices into the last dimension of ``mass`` for tokens at these row positions [B or 1, n]; arbitrary for padding."""
        sinks, later = self.rule.sinks, self.rule.window + self.rule.refresh.every
        return torch.where(rows < sinks, rows.clamp(min=0), sinks + (rows - sinks) % later)

    def _per_head(self, places: torch.Tensor, batch: int) -> torch.Tensor:
        """Expand indices [B or 1, n] to [B, G, n]."""
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
    """Expand indices [n, m] or [n, G, m] into x [n, G, C, D] to [n, G, m, D]."""
    places = places[:, None] if places.ndim == 2 else places
    return places[..., None].expand(-1, x.shape[1], -1, x.shape[3])


def _at(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    return x.gather(2, _wide(x, places))


def _put(x: torch.Tensor, places: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return x.scatter(2, _wide(x, places), new.to(x.dtype))


@make_layer.register
def _(rule: HeavyHitterRule, index: int, stream: Stream, stock: Any) -> StreamLayer:
    return HeavyHitterLayer(rule, stream)
