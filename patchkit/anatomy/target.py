"""`Target`: a model and its anatomy, for patches to read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.feed_forward import find_feed_forward
from patchkit.anatomy.layers import AttentionLayer, FeedForward
from patchkit.anatomy.probe import Probe, run_probe
from patchkit.anatomy.read_probe import read_probe
from patchkit.attention import original_name
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.record import Named
from patchkit.views import evaluating


@dataclass(eq=False)
class Target:
    """A model and its anatomy. Probing is lazy: a forward runs when a property first needs it.

    Attributes:
        patches: all patches that are being applied, in the order of application.
        patch: function that patches another model without logging, for views that `Patch.check` makes as draft models.
        views: other models over the same weights, made by `Patch.check` while the model is unpatched, for `Patch.apply`.
        attention_implementation: ``config._attn_implementation`` of the unpatched model: "sdpa", "eager", "flash_attention_2", ...
    """

    model: Any
    patches: tuple[Named, ...] = ()
    patch: Callable[[Any, list[Any]], Any] | None = field(default=None, repr=False)
    views: dict[int, Any] = field(default_factory=dict, repr=False)
    attention_implementation: str = field(init=False)

    def __post_init__(self) -> None:
        _compat.unpack_weights(self.model)  # as the first forward would
        # Read now, because applying a patch sets an alias there; so may a patch of another model with this config.
        self.attention_implementation = original_name(self.config)

    @cached_property
    def config(self) -> Any:
        """The text decoder's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module whose forward takes the 2-D ``attention_mask``, ``position_ids`` and the cache."""
        return self._probe.decoder

    @cached_property
    def _probe(self) -> Probe:
        return run_probe(self)

    @property
    def attention_calls(self) -> list[dict[str, Any]]:
        """The arguments of each call of transformers' attention interface in a short forward, and the layer's index in the cache."""
        return self._probe.calls

    @cached_property
    def position_limit(self) -> int | None:
        """Number of positions for which the model was made, with the rotary frequencies of a short sequence; None without a limit."""
        config = self.config
        limits = [getattr(config, "max_position_embeddings", None)]
        rope = getattr(config, "rope_parameters", None) or {}
        for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
            # These two types change all frequencies once a position passes the original length.
            if parameters.get("rope_type") in ("dynamic", "longrope"):
                limits.append(parameters.get("original_max_position_embeddings"))
                limits.append(getattr(config, "original_max_position_embeddings", None))
        known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
        return min(known) if known else None

    @cached_property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every layer that stores keys and values, in cache order.

        Raises:
            UnsupportedModel: the model keeps its own cache class, or cannot be probed.
            NothingMatched: the model has no attention.
        """
        layers = read_probe(self, self._probe)
        if not layers:
            raise NothingMatched(
                f"{type(self.model).__name__} has no attention layers with a key-value cache, so an attention patch has nothing to act on"
            )
        return layers

    @cached_property
    def feed_forward(self) -> FeedForward:
        """The feed-forward blocks of the decoder's layers.

        Raises:
            UnsupportedModel: the model cannot be probed.
        """
        return find_feed_forward(self)

    def forward(self, ids: torch.Tensor) -> None:
        """Run the model once over token ids [B, T], in evaluation mode, without gradients or a cache.

        Raises:
            UnsupportedModel: the forward fails.
        """
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except Exception as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} failed on {tuple(ids.shape)} token ids ({type(error).__name__}: {error}). "
                "Does model(input_ids) run unpatched?"
            ) from error

    def describe(self) -> dict[str, Any]:
        """Return the anatomy as plain data, for ``patchkit inspect``."""
        rows = []
        for layer in self.attention_layers:
            rotary = layer.rotary
            rows.append(
                {
                    "layer": layer.index,
                    "module": layer.name,
                    "kind": layer.kind,
                    "window": layer.window,
                    "positions": "alibi" if layer.alibi else "none" if rotary is None else f"rotary, {rotary.style}",
                    "rotated_dims": None if rotary is None else rotary.width,
                    "frequencies": None if rotary is None else rotary.buffer,
                    "obstacle": layer.obstacle,
                }
            )
        return {
            "class": type(self.model).__name__,
            "model_type": self.config.model_type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "attention": self.attention_implementation,
            "position_limit": self.position_limit,
            "decoder": type(self.decoder).__name__,
            "attention_layers": rows,
            "feed_forward_linears": len(self.feed_forward.linears),
            "fused_experts": len(self.feed_forward.experts),
        }
