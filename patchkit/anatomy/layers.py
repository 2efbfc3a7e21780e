"""What is known of a layer that attends, and of the feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from patchkit.anatomy.rotary import Rotary

# An `AttentionLayer.obstacle` that matters only to patches that move keys.
BAKED_IN = "positions are baked into its keys or values (learned, sinusoidal, or normalised after rotation), so kept keys cannot move"

Kind = Literal["full", "sliding", "chunked", "other"]


@dataclass(eq=False)
class AttentionLayer:
    """One attention layer, as probed.

    Attributes:
        index: its place in the cache.
        name, module: the attention module, as in ``model.named_modules()``.
        kind: "full" causal attention, "sliding" (own window), "chunked" (own chunk), or "other" (compressed, indexed, ...).
        window: tokens a sliding layer sees, the current one included, or a chunk's length; None for other kinds.
        rotary: how positions enter; None when the layer's keys carry no position.
        alibi: the layer receives a bias that is linear in the key's position (Press et al. 2022): its keyword argument's name.
        slopes: [H] float64, the bias per position, with alibi.
        mask_is_boolean: such a layer takes a mask that is True where a key is hidden; else one that is added to the scores.
        interface: it calls transformers' attention interface, so a registered attention function reaches it.
        obstacle: why nothing can be promised about evicting its keys; None when all is understood.
        calls: how many times a forward calls that interface for this layer.
        arguments: the keyword arguments of those calls that are set: not None, False or 0.
        attends_stored: the keys and values of those calls are what is in the cache (in multi-head latent attention they are not).
    """

    index: int
    name: str
    module: nn.Module
    kind: Kind
    window: int | None = None
    interface: bool = False
    rotary: Rotary | None = None
    alibi: str | None = None
    slopes: torch.Tensor | None = None
    mask_is_boolean: bool = False
    obstacle: str | None = None
    calls: int = 0
    arguments: tuple[str, ...] = ()
    attends_stored: bool = False


@dataclass(eq=False)
class FeedForward:
    """What the feed-forward blocks of a decoder are made of, by module name.

    Attributes:
        linears: `nn.Linear` and transformers' `Conv1D` modules (whose weight is [in, out]).
        experts: modules with the weights of all experts in 3-D parameters, that go through transformers' experts interface.
        left_alone: modules that are neither, and why.
    """

    linears: dict[str, Any]
    experts: dict[str, nn.Module]
    left_alone: dict[str, str]


class Subject(Protocol):
    """A model that is being examined (`Target`), as far as the functions that examine it know it."""

    model: Any

    @property
    def config(self) -> Any: ...
    @property
    def decoder(self) -> nn.Module: ...
    @property
    def position_limit(self) -> int | None: ...
    @property
    def attention_layers(self) -> list[AttentionLayer]: ...
    def forward(self, ids: torch.Tensor) -> None: ...
