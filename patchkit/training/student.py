"""Student of a conversion: a model whose attention layers run as hybrid attention on whole sequences, with gradients.

It is a twin of the model, a second module tree over the same weights; the model itself is not edited.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.anatomy.target import Target
from patchkit.attention import AttentionFunction, AttentionOutput, alias_of, attending
from patchkit.linear.hybrid import HybridAttention, hybrid_attention
from patchkit.linear.state import LinearState

# Called as watch(index, the hybrid's inputs, the softmax output [B, H, T, V]).
Watch = Callable[[int, "AttentionInputs", torch.Tensor], None]


@dataclass(frozen=True)
class AttentionInputs:
    """AttentionInputs of one layer's attention: q [B, H, T, K], k and v [B, G, T, *], and q and k without rotation."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    plain_q: torch.Tensor
    plain_k: torch.Tensor
    scaling: float

    def through(self, part: HybridAttention, state: LinearState) -> torch.Tensor:
        """The hybrid's output [B, H, T, V] float32, with the window and sinks of ``state``."""
        return hybrid_attention(part, self.q, self.k, self.v, self.plain_q, self.plain_k, state.window, self.scaling, sinks=state.sinks)


class Student:
    """A twin of a model with the attention of a `LinearState`.

    Attributes:
        model: the twin.
        state: holds the trained parts; layers may be removed from it.
    """

    def __init__(self, model: Any, target: Target, state: LinearState) -> None:
        self.model = model
        self.state = state
        names = dict(model.named_modules())
        self._layers = [(layer, names[layer.name]) for layer in target.attention_layers if layer.index in state.parts]

    @contextlib.contextmanager
    def hybrid(self) -> Iterator[Any]:
        """Run the model's layers as hybrid attention in this context, on whole sequences without padding or a cache."""
        with self._attention(lambda layer: functools.partial(_hybrid, self.state.parts[layer.index], layer.rotary, self.state)):
            yield self.model

    @contextlib.contextmanager
    def watched(self, watch: Watch) -> Iterator[Any]:
        """Run the unchanged model in this context, and call ``watch`` with the inputs and the output of every layer's attention."""
        with self._attention(lambda layer: functools.partial(_watched, watch, layer)):
            yield self.model

    @contextlib.contextmanager
    def _attention(self, function_of: Callable[[AttentionLayer], AttentionFunction]) -> Iterator[None]:
        functions = [(module, function_of(layer)) for layer, module in self._layers if layer.index in self.state.parts]
        with _compat.attention_set_to(self.model, alias_of), attending(functions):
            yield


def _hybrid(
    part: HybridAttention,
    rotary: Rotary | None,
    state: LinearState,
    original: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    out = _inputs(rotary, query, key, value, kwargs).through(part, state)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _watched(
    watch: Watch,
    layer: AttentionLayer,
    original: AttentionFunction,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    out, weights = original(module, query, key, value, attention_mask, **kwargs)
    watch(layer.index, _inputs(layer.rotary, query, key, value, kwargs), out.transpose(1, 2).float())
    return out, weights


def _inputs(rotary: Rotary | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kwargs: dict[str, Any]) -> AttentionInputs:
    plain_q, plain_k = (x if rotary is None else unrotated(x, rotary) for x in (q, k))
    scaling = kwargs.get("scaling")
    return AttentionInputs(q, k, v, plain_q, plain_k, q.shape[-1] ** -0.5 if scaling is None else scaling)


def unrotated(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Undo the rotation of queries or keys [B, H, T, K] at positions 0 .. T - 1."""
    cos, sin = _angles(rotary, x.shape[-2], x.device)
    return rotary.rotate(x, cos, -sin, rotary.start)


@functools.lru_cache(maxsize=8)
def _angles(rotary: Rotary, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary.angles(torch.arange(tokens, device=device))
