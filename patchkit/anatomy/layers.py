"""Facts about attention layers and feed-forward blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from patchkit.anatomy.rotary import Rotary
from patchkit.errors import NothingMatched

# An `AttentionLayer.obstacle` that matters only to patches that move keys.
BAKED_IN = "positions are baked into its keys or values (learned, sinusoidal, or normalised after rotation), so kept keys cannot move"

Kind = Literal["full", "sliding", "chunked", "other"]


@dataclass(eq=False)
class AttentionLayer:
    """One attention layer, as probed.

    Attributes:
        index: its index in the cache.
        name, module: the attention module, as in ``model.named_modules()``.
        kind: "full" causal attention, "sliding" (own window), "chunked" (own chunk), or "other" (compressed, indexed, ...).
        window: tokens a sliding layer sees, the current one included, or a chunk's length; None for other kinds.
        rotary: its rotary embedding; None if the layer's keys carry no position.
        alibi: name of the keyword argument with a bias that is linear in the key's position (ALiBi, Press et al. 2022); None without one.
        slopes: [H] float64, that bias per position; None without one.
        mask_is_boolean: a layer with ALiBi takes a mask that is True where a key is hidden; otherwise one that is added to the scores.
        interface: it calls transformers' attention interface, so that a registered attention function is used.
        obstacle: the reason why nothing can be promised about evicting its keys; None if there is none.
        calls: number of times that a forward calls that interface for this layer.
        arguments: the keyword arguments of those calls that are set: not None, False or 0.
        attends_stored: those calls receive the keys and values of the cache (in multi-head latent attention they do not).
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
    """The modules of a decoder's feed-forward blocks, by name.

    Attributes:
        linears: `nn.Linear` and transformers' `Conv1D` modules (whose weight is [in, out]).
        experts: modules with the weights of all experts in 3-D parameters, which use transformers' experts interface.
        left_alone: modules that are neither, with the reason.
    """

    linears: dict[str, Any]
    experts: dict[str, nn.Module]
    left_alone: dict[str, str]


class Subject(Protocol):
    """The part of `Target` that the functions use which examine a model."""

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


def decoder_layers(model: Any) -> nn.ModuleList:
    """Return the list of a model's decoder layers.

    Raises:
        NothingMatched: there is no list of as many modules as the config has layers.
    """
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise NothingMatched(f"{type(model).__name__} has no list of {depth} decoder layers")
