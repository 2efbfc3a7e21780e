"""One-token steps of a linear layer, as tensors at fixed addresses.

Shapes: B batch, H heads, G kv heads, K key dim, V value dim, F features; S sinks, R length of the ring, W softmax window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from patchkit import _compat
from patchkit.anatomy.rotary import Rotary
from patchkit.linear.hybrid import HybridAttention
from patchkit.static_step import Sinks, StepLayer


class LinearStep(NamedTuple):
    """The work of a one-token step of query t on the state, as tensors at fixed addresses.

    Attributes:
        slot: [1] int64, slot of key t - W in the ring; any slot if there is no such key.
        key_cos, key_sin: [B or 1, 1, 1, n], undo that key's rotation; None if it has none.
        query_cos, query_sin: [B or 1, 1, 1, n], undo the query's rotation; None if it has none.
        old: [B or 1, 1, 1, 1] float32, 1 if key t - W enters the state, 0 if it is padding, a sink, or absent.
        old_keys: [B or 1, 1] float32, number of keys in the state after that.
        short: [B or 1, 1] bool, the query sees all keys by softmax and does not use the state; None if this holds for no query.
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

    def update_state(
        self,
        part: HybridAttention,
        rotary: Rotary | None,
        keys: torch.Tensor,
        values: torch.Tensor,
        state: torch.Tensor,
        normalizer: torch.Tensor,
    ) -> None:
        """Add key t - W of the ring (keys [B, G, S + R, K], values [B, G, S + R, V]) to state and normalizer, in place."""
        features, value = self.entering(part, rotary, keys, values)
        state.addcmul_(features.mT, value)
        normalizer.add_(features[:, :, 0])

    def entering(
        self, part: HybridAttention, rotary: Rotary | None, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, G, 1, F], 0 where nothing enters the state, and value [B, G, 1, V], both float32, of key t - W."""
        slot = self.slot.to(keys.device)
        key = _rotated_by(keys.index_select(2, slot), rotary, self.key_cos, self.key_sin)
        return part.key_map(key) * self.old.to(keys.device), values.index_select(2, slot).float()


def _rotated_by(x: torch.Tensor, rotary: Rotary | None, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    if rotary is None or cos is None or sin is None:
        return x
    return rotary.rotate(x, cos.to(x.device), sin.to(x.device), rotary.start)


class LinearStepLayer(StepLayer):
    """The view of a `LinearLayer` that compiled code works on.

    Attributes:
        state, normalizer, part: those of the `LinearLayer`.
        rotary: that of its rule.
        linear: its `LinearLayer.linear_step`.
    """

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        sinks: Sinks | None,
        state: torch.Tensor,
        normalizer: torch.Tensor,
        part: HybridAttention,
        rotary: Rotary | None,
        linear: LinearStep,
    ) -> None:
        super().__init__(keys, values, slots, sinks)
        self.state, self.normalizer, self.part, self.rotary, self.linear = state, normalizer, part, rotary, linear
        for tensor in [self.state, self.normalizer, *self.linear]:
            if tensor is not None:
                _compat.mark_static_address(tensor)

    def linear_step(self) -> LinearStep:
        """The work of this step on the state."""
        return self.linear

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None and self.values is not None
        self.linear.update_state(self.part, self.rotary, self.keys, self.values, self.state, self.normalizer)
        return super().update(key_states, value_states)
