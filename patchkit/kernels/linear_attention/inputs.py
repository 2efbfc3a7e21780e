"""Arguments of `linear_attention`: their names and defaults, the checks, and the feature maps."""

from __future__ import annotations

from typing import NamedTuple

import torch

from patchkit.errors import KernelError

FEATURE_MAPS = ("identity", "elu1", "relu")  # numbered like this in `native/linear_attention.cpp` and in the Triton kernels
MOST_FEATURES = 256  # of the native and the Triton kernels


class Inputs(NamedTuple):
    """Arguments of the op in its order, with its defaults; `linear_attention` describes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    state: torch.Tensor | None = None
    normalizer: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    feature_map: str = "elu1"
    normalize: bool = True
    chunk: int = 64


def check(x: Inputs) -> None:
    """Refuse arguments that do not fit together: a kernel would read memory that is not its own.

    Raises:
        KernelError: an unknown feature map, shapes, dtypes or devices that do not fit, no token, or chunk < 1.
    """
    if x.feature_map not in FEATURE_MAPS:
        raise KernelError(
            f"feature_map={x.feature_map!r} is unknown: give one of {', '.join(FEATURE_MAPS)}, maps with weights are applied before"
        )
    if x.chunk < 1:
        raise KernelError(f"chunk={x.chunk}: give at least 1")
    (batch, heads, tokens, width), (groups, value_width) = x.q.shape, (x.k.shape[1], x.v.shape[-1])
    if tokens < 1:
        raise KernelError("there is no token: give at least one")
    if heads % groups:
        raise KernelError(f"{heads} query heads cannot share {groups} kv heads evenly")
    wanted = {
        "k": (x.k, (batch, groups, tokens, width)),
        "v": (x.v, (batch, groups, tokens, value_width)),
        "mask": (x.mask, (batch, tokens)),
        "state": (x.state, (batch, groups, width, value_width)),
        "normalizer": (x.normalizer, (batch, groups, width)),
    }
    if x.mask is not None and x.mask.dtype != torch.bool:
        raise KernelError(f"mask is {x.mask.dtype}: give bool, False for padding")
    for name, (given, shape) in wanted.items():
        if given is not None and tuple(given.shape) != shape:
            raise KernelError(f"{name} has shape {tuple(given.shape)}; with q of shape {tuple(x.q.shape)} it has to be {shape}")
        if given is not None and given.device != x.q.device:
            raise KernelError(f"{name} is on {given.device}, q on {x.q.device}: move one of them")


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """``f(x)``, elementwise."""
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 would cancel
    return x.relu() if feature_map == "relu" else x


def slope(x: torch.Tensor, feature_map: str) -> torch.Tensor | float:
    """``f'(x)``, elementwise."""
    if feature_map == "elu1":
        return x.clamp(max=0).exp()
    return (x > 0).to(x.dtype) if feature_map == "relu" else 1.0
