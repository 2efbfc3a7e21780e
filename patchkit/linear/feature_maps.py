"""Feature maps, by which linear attention replaces the exponential: ``exp(q . k) -> map(q) . map(k)``.

A map is a module for all heads of one layer; some have weights to train. Every map but `Identity` gives features that are at least 0,
so that attention weights are at least 0.

Shapes: B batch, H heads, T tokens, K head dimension, F features.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

_maps: dict[str, type[FeatureMap]] = {}


class FeatureMap(nn.Module):
    """Base class of feature maps; `make_feature_map` finds a subclass with ``kind="name"`` by that name.

    Attributes:
        kind: its name.
        fused: the op `linear_attention` computes it itself, from the name; it has no weights.
        n_features: F.
    """

    kind: ClassVar[str]
    fused: ClassVar[bool] = False

    def __init_subclass__(cls, kind: str) -> None:
        cls.kind = kind
        _maps[kind] = cls

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.n_features = head_dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [B, H, T, F] float32 of queries or keys [B, H, T, K]."""
        raise NotImplementedError

    def start_behind(self, rotation: torch.Tensor) -> None:
        """Initialise the weights as if inputs were multiplied by ``rotation`` [K, K] first; do nothing in a map without weights."""


class Identity(FeatureMap, kind="identity"):
    """No map. Weights may be negative, so use it without a normaliser, or with features that are already mapped."""

    fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float()


class EluPlusOne(FeatureMap, kind="elu1"):
    """The map ``elu(x) + 1``. Katharopoulos et al. 2020, "Transformers are RNNs", https://arxiv.org/abs/2006.16236, equation 7."""

    fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 would cancel


class Relu(FeatureMap, kind="relu"):
    """The map ``max(x, 0)``."""

    fused = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().relu()


class Hedgehog(FeatureMap, kind="hedgehog"):
    """The map ``[softmax(W x), softmax(-W x)]`` with a trained W for each head, initially the identity; F = 2 K.

    Zhang et al. 2024, "The Hedgehog & the Porcupine", https://arxiv.org/abs/2402.04347, section 4.2, with the softmax over features.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.n_features = 2 * head_dim
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mapped = x.float() @ self.weight.float().mT
        return torch.cat([mapped.softmax(-1), (-mapped).softmax(-1)], -1)

    def start_behind(self, rotation: torch.Tensor) -> None:
        self.weight.data.copy_(rotation.mT)


class T2R(FeatureMap, kind="t2r"):
    """The map ``relu(W x + b)`` with a trained W, initially the identity, and a trained b for each head.

    Kasai et al. 2021, "Finetuning Pretrained Transformers into RNNs", https://arxiv.org/abs/2103.13076, equation 5.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.zeros(heads, 1, head_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() @ self.weight.float().mT + self.bias.float()).relu()

    def start_behind(self, rotation: torch.Tensor) -> None:
        self.weight.data.copy_(rotation.mT)


def available_feature_maps() -> list[str]:
    """Return the names of all feature maps, sorted."""
    return sorted(_maps)


def make_feature_map(kind: str, heads: int, head_dim: int) -> FeatureMap:
    """Make the feature map named ``kind`` for ``heads`` heads of dimension ``head_dim``.

    Raises:
        ValueError: no map has this name.
    """
    if kind not in _maps:
        raise ValueError(f"feature_map={kind!r} is unknown: give one of {', '.join(available_feature_maps())}")
    return _maps[kind](heads, head_dim)
