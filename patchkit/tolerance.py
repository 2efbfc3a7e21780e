"""Largest allowed difference between two computations of the same tensor, by dtype."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True)
class Tolerance:
    """One row of ``TOLERANCES``.

    Attributes:
        logits: largest allowed ``logit_error`` between two computations of the same logits.
        ratio: largest allowed RMSE of an op's output relative to the RMS of its reference.
        differs: a difference of logits that rounding cannot explain; tests demand it where a rule must have an effect.
    """

    logits: float
    ratio: float
    differs: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float64: Tolerance(logits=1e-9, ratio=1e-10, differs=1e-6),
        torch.float32: Tolerance(logits=1e-4, ratio=1e-5, differs=1e-3),
        torch.float16: Tolerance(logits=2e-2, ratio=2e-3, differs=1e-1),
        torch.bfloat16: Tolerance(logits=1.5e-1, ratio=1.5e-2, differs=5e-1),
    }
)


def logit_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference of two logit tensors of one shape, relative to ``max |expected|`` where that exceeds 10.

    The result is infinite if one tensor has a NaN or an infinity where the other has not.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"logits of shape {list(actual.shape)} cannot be compared with {list(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    left, right = actual.detach().double(), expected.detach().double()
    finite = right.isfinite()
    if not torch.equal(left[~finite].nan_to_num(), right[~finite].nan_to_num()) or not left[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    return ((left - right)[finite].abs().max() / (right[finite].abs().max() / 10).clamp(min=1.0)).item()
