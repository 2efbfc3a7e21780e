"""The rule of a layer (`LayerRule`), the rules of a model (`Plan`), and the positions of one forward (`ForwardContext`).

Shapes: B batch, T new tokens. Tokens are numbered as they are fed; `patchkit.streaming.cache` tells at which positions keys are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from patchkit.anatomy.rotary import Rotary, same_rotary
from patchkit.kernels.kv_int8 import FINE


class AngleTables(NamedTuple):
    """Tables of angles for `patchkit.kernels.kv_int8_read`, one coarse table per batch row or one for all.

    Attributes:
        coarse: [C, 2, n/2] float32, of the batch rows one after the other.
        fine: [256, 2, n/2] float32, of the positions 0 to 255.
        near: coarse rows per batch row that are not for sinks.
        first: [B or 1] int64, the row position of the first of these.
        rows: batch rows that have a coarse table.
    """

    coarse: torch.Tensor
    fine: torch.Tensor
    near: int
    first: torch.Tensor
    rows: int = 1

    def within(self, offsets: torch.Tensor) -> torch.Tensor:
        """Move offsets that are for no visible key into the table."""
        return offsets.clamp(0, max(0, FINE * self.near - 1))

    def of_rows(self, offsets: torch.Tensor) -> torch.Tensor:
        """Add to offsets [B or 1, ...] where the table of their batch row begins."""
        if self.rows == 1:
            return offsets
        begins = torch.arange(self.rows, device=offsets.device) * (FINE * len(self.coarse) // self.rows)
        return offsets + begins.view(-1, *(1,) * (offsets.ndim - 1))


def _by_pair(rotary: Rotary, positions: torch.Tensor) -> torch.Tensor:
    """Cosines and sines [..., 2, n/2] float32 of positions [...], one per rotated pair of dimensions."""
    both = torch.stack(rotary.angles(positions), -2)
    return both[..., : rotary.width // 2] if rotary.style == "half" else both[..., ::2]


@dataclass(eq=False)
class LayerRule:
    """The rule of one or several layers: S sinks, a window of W tokens, one rotary embedding.

    Attributes:
        number: the index of its mask in `StepCache.masks`.
        in_cache: the distance to a sink is that inside the cache (the paper's rule); otherwise the true distance.
        sliding: the model itself has this sliding window; no patch asked for it.
        int8: keys and values are kept in int8, keys without their rotation (`patchkit.streaming.int8_layer`).
    """

    sinks: int
    window: int
    rotary: Rotary | None
    number: int = 0
    in_cache: bool = True
    sliding: bool = False
    int8: bool = False
    _fine: Any = field(default=None, repr=False)  # frequencies, and the fine table that was made of them

    @property
    def capacity(self) -> int:
        """Tokens kept: S + W."""
        return self.sinks + self.window

    @property
    def reach(self) -> int:
        """Row position from which on a query's distance to a sink grows no further: S + W, the paper's rule."""
        return self.capacity

    def same_rule(self, other: LayerRule) -> bool:
        """Whether the layers of both can share one rule."""
        mine, its = ((rule.sinks, rule.window, rule.in_cache, rule.sliding, rule.int8) for rule in (self, other))
        return type(self) is type(other) and mine == its and same_rotary(self.rotary, other.rotary)

    @property
    def full_from(self) -> int:
        """Number of tokens that fill sinks and window; every later token pushes one out, and a step needs `step_tensors`. With int8: 0."""
        return 0 if self.int8 else self.capacity

    @property
    def sees_all(self) -> bool:
        """Whether a query sees everything that is kept of its row."""
        return True

    def within(self, query: torch.Tensor, key: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Whether a query sees an earlier key that is no sink: bool, of the broadcast shape of the arguments.

        Args:
            query, key: token numbers.
            row: row position of the query.
        """
        return key > query - self.window

    def step_tensors(self, context: ForwardContext) -> list[torch.Tensor | None]:
        """Tensors that a one-token step needs: its slot [1] int64, then cosine and sine [B or 1, 1, 1, n] of the sinks' rotation.

        Cosine and sine are None if the sinks do not rotate. Subclasses append theirs. With int8: its slot, the offsets of all slots
        [B or 1, 1, S + W] int64, and the tables that they are for.
        """
        token = torch.tensor([context.start], device=context.device)
        if self.int8:
            keys = context.key_tokens(self) if context.start >= self.capacity else torch.arange(self.capacity, device=context.device)[None]
            tables = self.angle_tables(context, context.start)
            return [self.slot(token), self.offsets(context, tables, keys)[:, None], tables.coarse, tables.fine]
        cos = sin = None
        if self.sinks and self.rotary is not None:
            offset = context.excess(token) if self.in_cache else torch.zeros_like(context.row_positions(token))
            cos, sin = self.rotary.angles((offset - context.base[:, None])[:, None])
        return [self.slot(token), cos, sin]

    def angle_tables(self, context: ForwardContext, token: int) -> AngleTables:
        """Tables that rotate what token ``token`` sees to bounded positions: of each row positions from R on, then those of its sinks."""
        if self.rotary is None:
            empty = torch.zeros(FINE, 2, 0, device=context.device)
            return AngleTables(empty[:1], empty, 0, torch.zeros(1, dtype=torch.int64, device=context.device))
        tokens = torch.tensor([token], device=context.device)
        first = (context.row_positions(tokens) - (self.reach - 1)).clamp(min=0)
        positions = first + torch.arange(0, self.reach, FINE, device=context.device)
        near = positions.shape[1]
        if self.sinks:
            origin = context.excess(tokens) if self.in_cache else torch.zeros_like(first)
            positions = torch.cat([positions, origin + torch.arange(0, self.sinks, FINE, device=context.device)], 1)
        coarse = _by_pair(self.rotary, positions - context.base[:, None])
        if self._fine is None or self._fine[0] is not self.rotary.frequencies or self._fine[1].device != context.device:
            with torch.inference_mode(False):
                table = _by_pair(self.rotary, torch.arange(FINE, device=context.device))
            self._fine = self.rotary.frequencies, table
        return AngleTables(coarse.flatten(0, 1), self._fine[1], near, first[:, 0], len(coarse))

    def offsets(self, context: ForwardContext, tables: AngleTables, keys: torch.Tensor) -> torch.Tensor:
        """Offsets [B or 1, n] in these tables of keys with token numbers [B or 1, n]; any for empty slots and padding."""
        rows = keys if context.pads is None else keys - context.pads[:, None]
        if self.rotary is None:
            return torch.zeros_like(rows)
        offsets = tables.within(rows - tables.first[:, None])
        if self.sinks:
            offsets = torch.where((rows >= 0) & (rows < self.sinks), FINE * tables.near + rows, offsets)
        return tables.of_rows(offsets)

    def count(self, hits: Counter[str], context: ForwardContext) -> None:
        """Count a forward for the report."""
        hits["forwards"] += 1
        hits["tokens"] += context.tokens
        hits["tokens evicted"] += max(0, context.end - self.capacity) - max(0, context.start - self.capacity)

    def slot(self, token: Any) -> Any:
        """The slot of token ``token`` (int or int64 tensor)."""
        in_ring = self.sinks + (token - self.sinks) % self.window
        if torch.is_tensor(token):
            return torch.where(token < self.capacity, token, in_ring)
        return token if token < self.capacity else in_ring


@dataclass(eq=False)
class Plan:
    """The rules of all layers of one patched model; made once by the patch, shared by all its caches.

    Attributes:
        rules: the rule of each cache layer that patchkit keeps; other layers keep transformers' own cache layer.
        main: the rule of the streaming layers; its reach, S + W as a rule, defines in-cache positions.
        limit: bounded positions stay below it. None: not bounded, because some rotary layers keep all keys.
        stock_layers: makes transformers' cache layers of a fresh cache.
        owns_all: every attention layer is in a rule, so no mask of transformers' own is needed.
        has_alibi: some layers add a bias that is linear in the distance.
        make_cache: makes an empty cache.
    """

    rules: dict[int, LayerRule]
    main: LayerRule
    limit: int | None
    stock_layers: Callable[[], list[Any]]
    make_cache: Callable[[Plan], Any]
    owns_all: bool = True
    has_alibi: bool = False

    def new_cache(self) -> Any:
        """Return an empty cache."""
        return self.make_cache(self)


@dataclass(eq=False)
class ForwardContext:
    """One forward: T tokens after the ``start`` tokens seen so far.

    Attributes:
        pads: [B] left padding per row, or None.
        base: [B or 1] row position from which the bounded positions of each row are counted.
        in_blocks: attention in blocks of queries over concatenated keys, for several tokens or when gradients are wanted; otherwise
            one token is written into the buffers in place.
        cached: keys come from a cache; else they are the T new ones as the model made them.
        sees_every_slot: a step in which every query sees every slot, so that no mask is needed.
        rows: B.
        most_pads: the largest of ``pads``, as a plain number.
        pad_list: ``pads`` as plain numbers; (0,) without padding.
        highest: the most tokens ever seen before this forward, those that were rolled back included.
        packed: in a forward in blocks, keys and values in int8 that the current layer attends to, in order of time.
    """

    plan: Plan
    start: int
    tokens: int
    pads: torch.Tensor | None
    base: torch.Tensor
    device: torch.device
    in_blocks: bool = True
    cached: bool = True
    sees_every_slot: bool = False
    rows: int = 1
    most_pads: int = 0
    highest: int = 0
    pad_list: tuple[int, ...] = (0,)
    packed: tuple[torch.Tensor, torch.Tensor] | None = None
    _rotations: dict[Any, Any] = field(default_factory=dict)

    @property
    def end(self) -> int:
        """Tokens seen after this forward."""
        return self.start + self.tokens

    def row_positions(self, tokens: torch.Tensor) -> torch.Tensor:
        """Row positions [B or 1, n] of the token numbers [n]; negative where the token is padding."""
        return tokens[None] if self.pads is None else tokens[None] - self.pads[:, None]

    def excess(self, tokens: torch.Tensor) -> torch.Tensor:
        """Distances [B or 1, n] of the tokens' row positions beyond the last in-cache position, `LayerRule.reach` - 1, else 0."""
        return (self.row_positions(tokens) - (self.plan.main.reach - 1)).clamp(min=0)

    def position_ids(self) -> torch.Tensor:
        """Position ids [B or 1, T] for the model: bounded, and the true ones while nothing has been evicted."""
        rows = self.row_positions(torch.arange(self.start, self.end, device=self.device))
        if self.plan.limit is not None:
            rows = rows.clamp(max=self.plan.main.reach - 1) if self.in_blocks else rows - self.base[:, None]
        return rows.clamp(min=0)

    @property
    def repositions(self) -> bool:
        """Whether new keys and queries arrive at other positions than their bounded positions."""
        return self.plan.limit is not None and self.in_blocks and self.end > self.plan.main.reach

    def window_rotation(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B or 1, 1, T, n] that rotate the new tokens from the model's positions to their bounded positions."""
        return self._rotation(rotary, "window", self.start, lambda tokens: self.excess(tokens) - self.base[:, None])

    def sink_rotation(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B or 1, 1, T, n] that rotate queries from the model's positions to in-cache ones (unbounded plans only)."""
        return self._rotation(rotary, "sinks", self.start, lambda tokens: -self.excess(tokens))

    def inverse_rotation(self, rotary: Rotary, delay: int, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine that undo the rotation of tokens ``first`` to ``end - delay``, so that they can be stored unrotated."""
        return self._rotation(
            rotary, f"back by {delay}", first, lambda tokens: self.base[:, None] - self.row_positions(tokens), self.end - delay
        )

    def unrotation(self, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B or 1, 1, T, n] that take the model's own rotation from the new keys."""
        return self._rotation(rotary, "unrotated", self.start, lambda tokens: -self.position_ids())

    def rotation_of_keys(self, rule: LayerRule, rotary: Rotary) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [B or 1, 1, n, n'] that rotate the keys of a forward in blocks, in their order, to where its queries see them."""
        key = (id(rule), "keys")
        if key not in self._rotations:
            rows = self.key_tokens(rule)
            rows = rows if self.pads is None else rows - self.pads[:, None]
            at = rows - self.base[:, None]
            if rule.in_cache:  # queries turn to the sinks
                at = torch.where((rows >= 0) & (rows < rule.sinks), rows, at)
            self._rotations[key] = tuple(t[:, None] for t in rotary.angles(at))
        return self._rotations[key]

    def _rotation(
        self, rotary: Rotary, name: str, first: int, offsets: Callable[[torch.Tensor], torch.Tensor], end: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key = (id(rotary), name, first)
        if key not in self._rotations:
            tokens = torch.arange(first, self.end if end is None else end, device=self.device)
            self._rotations[key] = tuple(t[:, None] for t in rotary.angles(offsets(tokens)))
        return self._rotations[key]

    def key_tokens(self, rule: LayerRule) -> torch.Tensor:
        """Token numbers [B or 1, n] of the keys that a layer of ``rule`` attends to, in their order; -1 for an empty slot."""
        if self.start < rule.capacity:
            return torch.arange(self.end, device=self.device)[None]
        slots = torch.arange(rule.capacity, device=self.device)
        oldest = self.start - rule.window
        if self.in_blocks:  # sinks, then the window and the new tokens in order of time
            window = torch.arange(oldest, self.end, device=self.device)
        else:  # slot by slot, after the new token has taken the oldest one's
            window = self.start - (self.start - slots[rule.sinks :]) % rule.window
            oldest += 1
        sinks = slots[None, : rule.sinks]
        if self.pads is not None and rule.sinks:
            # The sink token whose slot this is; it is there from the start, or since the ring dropped it.
            first = self.pads[:, None]
            token = first + (sinks - first) % rule.sinks
            sinks = torch.where((token < rule.sinks) | (token < oldest), token, -1)
        return torch.cat([sinks, window.expand(len(sinks), -1)], 1)

    def visible(self, rule: LayerRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Mask [B or 1, 1, T, n]: True where a query (token numbers [T]) attends to a key (token numbers [B or 1, n])."""
        pads = 0 if self.pads is None else self.pads[:, None, None]
        query, key = queries[None, :, None], keys[:, None, :]
        row = key - pads
        seen = (key >= 0) & (row >= 0) & (key <= query) & (rule.within(query, key, query - pads) | (row < rule.sinks))
        # A padding query sees itself, so that no row of the softmax is empty.
        return (seen | ((key == query) & (row < 0)))[:, None]
