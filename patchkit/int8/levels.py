"""Weights that were rounded to 8 bits before: the scales by which their rows are integers, so that they are not rounded a second time.

Libraries differ in the largest integer, 127 or -128, and in the dtype of the scales, which a dequantised weight has too.
"""

from __future__ import annotations

import torch

# Inputs of each row that are looked at before all are: hardly any row of other weights gets further.
_SAMPLE = 16


def scales_of(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scales [N] fp32 of ``rows`` [N, K] fp32: those by which a row was rounded before, and otherwise max|row| / 127.

    A row was rounded by a scale if integers from -128 to 127 times the scale are the row, to the last bit of ``dtype``, bf16 or fp16.
    """
    largest = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    scale = largest / 127
    sample = rows[:, :: max(1, rows.shape[1] // _SAMPLE)]
    left = ~_are_levels(sample, scale, dtype)
    alike = (~left).nonzero()[:, 0]  # a sample of zeros, say, is on any levels
    left[alike] = ~_are_levels(rows[alike], scale[alike], dtype)
    for tried in (largest / 128, scale.bfloat16().float(), scale.half().float()):
        candidates = (left & _are_levels(sample, tried, dtype)).nonzero()[:, 0]
        found = candidates[_are_levels(rows[candidates], tried[candidates], dtype)]
        scale[found] = tried[found]
        left[found] = False
    return scale


def _are_levels(rows: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Whether integers from -128 to 127 times ``scale`` [n] are each row of ``rows`` [n, k]: [n] bool."""
    values = (rows / scale[:, None]).round().clamp_(-128, 127) * scale[:, None]
    same = torch.zeros_like(scale, dtype=torch.bool)
    for kind in {dtype, torch.bfloat16, torch.float16}:
        same |= (values.to(kind).float() == rows).all(1)
    return same
