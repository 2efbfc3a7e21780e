"""Bugs to seed into patchkit, each with a patch that runs into it and the promise that is broken by it.

A bug is a function of pytest's monkeypatch. They change the code that the patches run; what `patchkit prove` compares with must not
notice them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import patchkit.int4.scheme
import patchkit.int4.weight
import patchkit.int8.weight
import patchkit.linear.attention
import patchkit.memory.attention
import patchkit.memory.layer
import patchkit.streaming.hooks
import patchkit.streaming.refreshing
from patchkit.linear.cache import LinearLayer
from patchkit.memory.slots import Slots
from patchkit.speculation import batch, judge
from patchkit.speculation.cached_model import CachedModel
from patchkit.speculation.constraint import Constraint
from patchkit.speculation.judge import RowByRow
from patchkit.speculation.stops import Stops
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.rollback_log import RollbackLog
from patchkit.streaming.rule import ForwardContext, LayerRule, Plan
from patchkit.streaming.sinks import UnrotatedSinks
from patchkit.streaming.stream import Stream

STREAMING = "streaming(sinks=2, window=10)"
MEMORY = "memory(sinks=2, window=8, slots=6, block=4)"
LINEAR = "linear(sinks=2, window=10)"


@dataclass(frozen=True)
class Bug:
    """`seed` puts it in; ``spec`` runs into it; ``promise`` is what has to be found broken."""

    seed: Callable[[Any], None]
    spec: str
    promise: str


def position_off_by_one(monkeypatch: Any) -> None:
    def excess(self: ForwardContext, tokens: torch.Tensor) -> torch.Tensor:
        return (self.row_positions(tokens) - self.plan.main.reach).clamp(min=0)

    monkeypatch.setattr(ForwardContext, "excess", excess)


def sink_dropped(monkeypatch: Any) -> None:
    right = ForwardContext.visible

    def visible(self: ForwardContext, rule: LayerRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        pads = 0 if self.pads is None else self.pads[:, None]
        forgotten = (keys - pads == 0)[:, None, None] & (queries[None, None, :, None] >= rule.capacity)
        return right(self, rule, queries, keys) & ~forgotten

    monkeypatch.setattr(ForwardContext, "visible", visible)


def window_not_rolled_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(StreamLayer, "roll_back", lambda self, count: None)


def drafts_not_rolled_back(monkeypatch: Any) -> None:
    class KeepsAll(CachedModel):
        def keep(self, counts: list[int]) -> None:
            super().keep([self.pending] * len(counts))

    monkeypatch.setattr(batch, "CachedModel", KeepsAll)


def scale_after_matmul(monkeypatch: Any) -> None:
    """In the activations' dtype, so that float16 overflows."""

    def int8_linear(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float"
    ) -> torch.Tensor:
        y = (x @ weight.to(x.dtype).T) * scale.to(x.dtype)
        return y if bias is None else y + bias

    monkeypatch.setattr(patchkit.int8.weight, "int8_linear", int8_linear)


def scale_of_another_channel(monkeypatch: Any) -> None:
    right = patchkit.int8.weight.int8_linear
    monkeypatch.setattr(patchkit.int8.weight, "int8_linear", lambda x, w, scale, *rest: right(x, w, scale.roll(1), *rest))


def scale_a_little_large(monkeypatch: Any) -> None:
    """By a thousandth: a tenth of what rounding itself does to these logits."""
    right = patchkit.int8.weight.int8_linear
    monkeypatch.setattr(patchkit.int8.weight, "int8_linear", lambda x, w, scale, *rest: right(x, w, 1.001 * scale, *rest))


def inputs_rounded_together(monkeypatch: Any) -> None:
    """One step for all tokens of a forward, so that a token's result depends on its neighbours."""
    right = patchkit.int8.weight.int8_linear

    def int8_linear(
        x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float"
    ) -> torch.Tensor:
        if activation == "float":
            return right(x, weight, scale, bias, activation)
        step = x.float().abs().max().clamp(min=1e-30) / 127
        y = ((x.float() / step).round() @ weight.float().T) * scale * step
        return (y if bias is None else y + bias).to(x.dtype)

    monkeypatch.setattr(patchkit.int8.weight, "int8_linear", int8_linear)


def unit_a_little_large(monkeypatch: Any) -> None:
    right = patchkit.int4.weight.int4_linear
    monkeypatch.setattr(patchkit.int4.weight, "int4_linear", lambda x, w, unit, *rest: right(x, w, 1.001 * unit, *rest))


def inputs_that_count_alike(monkeypatch: Any) -> None:
    """The grid of a group is chosen without the inputs of its layer."""
    right = patchkit.int4.scheme.importance_of
    monkeypatch.setattr(patchkit.int4.scheme, "importance_of", lambda squares, *rest: right(None, *rest))


def mask_lost(monkeypatch: Any) -> None:
    right = ForwardContext.visible
    monkeypatch.setattr(ForwardContext, "visible", lambda self, *args: torch.ones_like(right(self, *args)))


def window_off_by_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(LayerRule, "within", lambda self, query, key, row: key >= query - self.window)


def linear_window_off_by_one(monkeypatch: Any) -> None:
    right = patchkit.linear.attention.banded_softmax_part
    monkeypatch.setattr(patchkit.linear.attention, "banded_softmax_part", lambda q, k, v, window, *rest: right(q, k, v, window - 1, *rest))


def ring_too_short(monkeypatch: Any) -> None:
    monkeypatch.setattr(LayerRule, "slot", lambda self, token: self.sinks + (token - self.sinks) % max(1, self.window - 1))


def wrong_rotary_half(monkeypatch: Any) -> None:
    """Sinks are rotated in pairs of neighbours where the model rotates pairs of halves."""
    right = StreamLayer._capture_sinks

    def capture(self: StreamLayer) -> None:
        right(self)
        assert self.unrotated is not None
        raw = self.unrotated.raw
        self.unrotated = UnrotatedSinks(raw, torch.stack([-raw[..., 1::2], raw[..., 0::2]], -1).flatten(-2))

    monkeypatch.setattr(StreamLayer, "_capture_sinks", capture)


def state_not_reset(monkeypatch: Any) -> None:
    right = LinearLayer._clear

    def clear(self: LinearLayer) -> None:
        kept = getattr(self, "state", None), getattr(self, "normalizer", None)
        right(self)
        self.state, self.normalizer = kept

    monkeypatch.setattr(LinearLayer, "_clear", clear)


def cache_of_the_last_text(monkeypatch: Any) -> None:
    right = Plan.new_cache
    caches: dict[int, Any] = {}

    def new_cache(self: Plan) -> Any:
        if id(self) not in caches:
            caches[id(self)] = right(self)
        return caches[id(self)]

    monkeypatch.setattr(Plan, "new_cache", new_cache)


def padding_counted(monkeypatch: Any) -> None:
    for module in (patchkit.streaming.hooks, patchkit.streaming.refreshing):
        monkeypatch.setattr(module, "notice_padding", lambda *args: None)


def eos_ignored(monkeypatch: Any) -> None:
    right = Stops.after

    def after(self: Any, *args: Any) -> bool:
        self.ends = set()
        return right(self, *args)

    monkeypatch.setattr(Stops, "after", after)


def every_draft_accepted(monkeypatch: Any) -> None:
    right = judge.verify_prefix

    def verify_prefix(logits: torch.Tensor, drafts: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        choice, _ = right(logits, drafts, counts)
        return torch.cat([drafts, choice[:, -1:]], 1), counts

    monkeypatch.setattr(judge, "verify_prefix", verify_prefix)


def window_not_rotated_when_the_base_moves(monkeypatch: Any) -> None:
    monkeypatch.setattr(StreamLayer, "rotate_window", lambda *args: None)


def log_does_not_wrap(monkeypatch: Any) -> None:
    right = RollbackLog.write
    monkeypatch.setattr(RollbackLog, "write", lambda self, tokens, k, v: right(self, tokens + (tokens >= self.length), k, v))


def padding_not_reset(monkeypatch: Any) -> None:
    right = Stream.reset

    def reset(self: Stream) -> None:
        kept = getattr(self, "pads", None), getattr(self, "most_pads", 0)
        right(self)
        self.pads, self.most_pads = kept

    monkeypatch.setattr(Stream, "reset", reset)


def eos_ignored_one_by_one(monkeypatch: Any) -> None:
    right = RowByRow.walk

    def walk(self: Any, row: int, *args: Any) -> Any:
        stops = self.rows.rows[row].stops
        ends, stops.ends = stops.ends, set()
        try:
            return right(self, row, *args)
        finally:
            stops.ends = ends

    monkeypatch.setattr(RowByRow, "walk", walk)


def forbidden_tokens_chosen(monkeypatch: Any) -> None:
    monkeypatch.setattr(Constraint, "allows", lambda self, row, node, token: True)


def rotated_keys_compared(monkeypatch: Any) -> None:
    def rotated(rule: Any, context: ForwardContext, fetch: Any, first: int, count: int) -> torch.Tensor:
        keys: torch.Tensor = fetch(torch.arange(first, first + count).clamp(min=0))[0]
        return keys

    monkeypatch.setattr(patchkit.memory.layer, "_plain", rotated)


def every_head_sees_the_pool(monkeypatch: Any) -> None:
    right = patchkit.memory.attention.visible_slots

    def visible(slots: Slots, *args: Any) -> torch.Tensor:
        return right(slots._replace(owners=torch.zeros_like(slots.owners)), *args)

    monkeypatch.setattr(patchkit.memory.attention, "visible_slots", visible)


def slots_not_rolled_back(monkeypatch: Any) -> None:
    monkeypatch.setattr(patchkit.memory.layer, "undo", lambda slots, taken: None)


BUGS = {
    "rotated keys compared": Bug(rotated_keys_compared, MEMORY, "logits are those of the definition"),
    "every head sees the pool": Bug(every_head_sees_the_pool, MEMORY, "logits are those of the definition"),
    "slots not rolled back": Bug(slots_not_rolled_back, MEMORY, "rolled back tokens leave no trace"),
    "position off by one": Bug(position_off_by_one, STREAMING, "logits are those of the definition"),
    "sink dropped": Bug(sink_dropped, STREAMING, "logits are those of the definition"),
    "window not rolled back": Bug(window_not_rolled_back, STREAMING, "rolled back tokens leave no trace"),
    "drafts not rolled back": Bug(drafts_not_rolled_back, "speculative", "greedy text stays the same"),
    "forbidden tokens chosen": Bug(forbidden_tokens_chosen, "speculative", "constrained text equals constrained plain text"),
    "scale after matmul": Bug(scale_after_matmul, "mlp_int8(mode=weight_only)", "no overflow in 16 bits"),
    "scale of another channel": Bug(scale_of_another_channel, "mlp_int8", "logits are those of the definition"),
    "scale a little large": Bug(scale_a_little_large, "mlp_int8(mode=weight_only)", "logits are those of the definition"),
    "scale a little large, inputs rounded": Bug(scale_a_little_large, "mlp_int8(mode=dynamic)", "logits are those of the definition"),
    "unit a little large": Bug(unit_a_little_large, "int4(mode=weight_only)", "logits are those of the definition"),
    "inputs that count alike": Bug(inputs_that_count_alike, "int4(mode=dynamic)", "logits are those of the definition"),
    "inputs rounded together": Bug(inputs_rounded_together, "mlp_int8(mode=dynamic)", "logits are those of the definition"),
    "mask lost": Bug(mask_lost, STREAMING, "no token sees a later one"),
    "window off by one": Bug(window_off_by_one, STREAMING, "logits are those of the definition"),
    "linear window off by one": Bug(linear_window_off_by_one, LINEAR, "logits are those of the definition"),
    "ring too short": Bug(ring_too_short, STREAMING, "logits are those of the definition"),
    "wrong rotary half": Bug(wrong_rotary_half, STREAMING, "logits are those of the definition"),
    "state not reset": Bug(state_not_reset, LINEAR, "a text after others is as in a fresh model"),
    "cache of the last text": Bug(cache_of_the_last_text, STREAMING, "a text after others is as in a fresh model"),
    "padding counted": Bug(padding_counted, STREAMING, "a padded row is the row alone"),
    "EOS ignored": Bug(eos_ignored, "speculative", "greedy text stays the same"),
    "every draft accepted": Bug(every_draft_accepted, "speculative", "greedy text stays the same"),
    "window not rotated when positions begin anew": Bug(
        window_not_rotated_when_the_base_moves, STREAMING, "any chunking gives the same logits"
    ),
    "log does not wrap": Bug(log_does_not_wrap, STREAMING, "rolled back tokens leave no trace"),
    "padding not reset": Bug(padding_not_reset, STREAMING, "a text after others is as in a fresh model"),
    "EOS ignored with a lossy acceptance": Bug(
        eos_ignored_one_by_one, "speculative(acceptance='topk_agree(2)')", "a text ends where it has to"
    ),
}
