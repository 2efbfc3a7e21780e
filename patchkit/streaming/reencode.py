"""`Reencode`: the window is encoded again every R tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.errors import StreamError
from patchkit.streaming.cache import StreamingCache, writable
from patchkit.streaming.layer import StreamLayer
from patchkit.streaming.refresh import Refresh, RefreshedCache, Run, of_rows
from patchkit.streaming.rollback_log import ROLLBACK, RollbackLog
from patchkit.streaming.rule import ForwardContext, Plan
from patchkit.streaming.sinks import UnrotatedSinks


@dataclass(frozen=True)
class Reencode(Refresh):
    """Encode the window again every R tokens, so that its keys and values depend on nothing that was evicted.

    Before token i = C + k R is fed, the cache becomes that of the unpatched model after the sequence of C tokens ``0 .. S-1, i-W .. i-1``,
    at positions ``0 .. C-1``. So the logits of tokens i .. i+R-1 are those of streaming over that sequence followed by these tokens.
    Costs a forward of C tokens every R, and the ids of C tokens; while the past is recorded (speculation), also a copy of the cache for
    every refresh in the last 256 tokens.

    Args:
        every: R.

    Raises:
        ValueError: ``every`` is not a whole number of tokens, at least 1.
    """

    name = "reencode"

    every: int = 64

    def new_cache(self, plan: Plan) -> RefreshedCache:
        return ReencodedCache(plan, self)

    def obstacle(self, plan: Plan, layers: list[AttentionLayer]) -> str | None:
        if any(isinstance(layer, _compat.LinearAttentionLayer) for layer in plan.stock_layers()):
            return "its recurrent layers hold a state of the whole sequence, which an encoding of the window alone would lose"
        longest = max(rule.window for rule in plan.rules.values())
        if longest > plan.main.window:
            return f"it has layers with their own window, of {longest} tokens, which cannot be encoded from {plan.main.window}"
        return super().obstacle(plan, layers)


@dataclass(eq=False)
class _Snapshot:
    """The state of a cache just before a refresh, for a rollback to before it."""

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
        snapshots: one before each refresh in the last ROLLBACK tokens, while the past is recorded.
    """

    def _clear(self) -> None:
        super()._clear()
        self.sinks: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.snapshots: list[_Snapshot] = []

    def remember(self, ids: torch.Tensor | None) -> None:
        if ids is None:
            raise StreamError("refresh=reencode(...) encodes token ids again, and was given inputs_embeds: call the model with input_ids")
        rule, end = self.plan.main, self.stream.seen
        if self.sinks is None or self.recent is None:
            self.sinks, self.recent = ids.new_zeros(len(ids), rule.sinks), ids[:, :0]
        start = end - ids.shape[1]
        if rule.sinks and start < self.stream.most_pads + rule.sinks:
            pads = 0 if self.stream.pads is None else self.stream.pads.to(ids.device)[:, None]
            column = pads + torch.arange(rule.sinks, device=ids.device)[None] - start
            inside = (column >= 0) & (column < ids.shape[1])
            found = ids.gather(1, column.clamp(0, ids.shape[1] - 1).expand(len(ids), -1))
            self.sinks = torch.where(inside, found, self.sinks)
        kept = rule.window + (ROLLBACK if self.stream.recording else 0)
        self.recent = torch.cat([self.recent, ids], 1)[:, -kept:]

    def _refresh_rows(self, rows: torch.Tensor, run: Run) -> None:
        assert self.sinks is not None and self.recent is not None
        stream, main = self.stream, self.plan.main
        if stream.recording:
            self._take_snapshot()
        else:
            self.snapshots.clear()
        on_device = rows.to(self.recent.device)
        fresh = StreamingCache(self.plan)
        run(torch.cat([self.sinks[on_device], self.recent[on_device, -main.window :]], 1), fresh)
        pads = self._row_pads(rows)
        base = stream.seen - pads - main.capacity
        after = ForwardContext(
            self.plan, stream.seen - 1, 1, None if stream.pads is None else stream.pads.cpu(), base, rows.device, in_blocks=False
        )
        for layer, new in zip(self.own_layers, fresh.own_layers, strict=True):
            rule = layer.rule
            tokens = of_rows(after.key_tokens(rule), rows) - pads[:, None]
            slots = rule.slot(torch.where(tokens < main.sinks, tokens, tokens - base[:, None])).to(new.keys.device)
            keys, values = (x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in (new.keys, new.values))
            layer.overwrite(rows, keys, values)
        stream.set_bases(rows, base)

    def make_writable(self) -> None:
        super().make_writable()
        if not torch.is_inference_mode_enabled():
            for snapshot in self.snapshots:
                snapshot.base, snapshot.layers = writable(snapshot.base), writable(snapshot.layers)

    # -- rollback ----------------------------------------------------------------------------------------------------------

    def _take_snapshot(self) -> None:
        stream = self.stream
        self.snapshots = [snapshot for snapshot in self.snapshots if stream.highest - snapshot.seen < ROLLBACK]
        self.snapshots.append(
            _Snapshot(stream.seen, self.refreshed, stream.base, stream.rebase_at, [_tensors_of(layer) for layer in self.own_layers])
        )

    def crop(self, tokens_to_remove: int) -> None:
        count = -tokens_to_remove
        kept = self.stream.seen - count
        if 0 <= count <= self.stream.seen and all(layer.can_roll_back(count) for layer in self.own_layers):
            while self.snapshots and kept < self.snapshots[-1].seen:
                self._restore(self.snapshots.pop())
            tokens_to_remove = kept - self.stream.seen
        super().crop(tokens_to_remove)
        if self.recent is not None and count:
            self.recent = self.recent[:, :-count]

    def _restore(self, snapshot: _Snapshot) -> None:
        self.stream.seen, self.refreshed = snapshot.seen, snapshot.refreshed
        self.stream.base, self.stream.rebase_at = snapshot.base, snapshot.rebase_at
        for layer, tensors in zip(self.own_layers, snapshot.layers, strict=True):
            # Copied in place, because compiled steps know these tensors by their addresses.
            sinks = zip(layer.unrotated or (), tensors["unrotated"] or (), strict=False)
            for kept, saved in ((layer.keys, tensors["keys"]), (layer.values, tensors["values"]), *sinks):
                if saved is not None:
                    kept.copy_(saved)
            layer.log = tensors["log"]

    def _select(self, index: Callable[[torch.Tensor], torch.Tensor], other: Callable[[Any], None]) -> None:
        super()._select(index, other)
        if self.sinks is not None and self.recent is not None:
            self.sinks, self.recent = index(self.sinks), index(self.recent)
        for snapshot in self.snapshots:
            snapshot.base = index(snapshot.base) if len(snapshot.base) > 1 else snapshot.base
            for tensors in snapshot.layers:
                tensors.update({name: _mapped(index, value) for name, value in tensors.items()})

    def n_bytes(self) -> int:
        kept = [
            self.sinks,
            self.recent,
            *(value for snapshot in self.snapshots for tensors in snapshot.layers for value in tensors.values()),
        ]
        flat = [tensor for value in kept for tensor in (value if isinstance(value, tuple) else [value]) if tensor is not None]
        return super().n_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in flat)


def _tensors_of(layer: StreamLayer) -> dict[str, Any]:
    return {name: _mapped(torch.clone, getattr(layer, name)) for name in ("keys", "values", "unrotated", "log")}


def _mapped(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, UnrotatedSinks | RollbackLog):
        return type(value)(*map(function, value))
    return None if value is None else function(value)
