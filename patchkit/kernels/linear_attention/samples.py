"""Samples of linear_attention: every dtype, odd sizes, grouped heads, feature maps, padding, a resumed state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels.linear_attention.inputs import FEATURE_MAPS
from patchkit.kernels.linear_attention.reference import linear_attention


@linear_attention.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int,
        h: int,
        g: int,
        t: int,
        k: int,
        v: int,
        *rest: Any,
        dtype: torch.dtype = torch.float32,
        resumed: bool = False,
        mask: Any = None,
    ) -> tuple[Any, ...]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        state = (draw(b, g, k, v), draw(b, g, k).abs() * 5) if resumed else (None, None)
        given = None if mask is None else torch.tensor(mask, dtype=torch.bool, device=device)
        return draw(b, h, t, k).to(dtype), draw(b, g, t, k).to(dtype), draw(b, g, t, v).to(dtype), *state, given, *rest

    yield "typical", make(1, 4, 4, 100, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, h, g, t, k, v in (
            (1, 1, 1, 1, 8, 8),
            (2, 4, 2, 63, 60, 60),
            (1, 6, 1, 130, 32, 48),
            (1, 2, 2, 65, 128, 80),
            (1, 1, 1, 33, 256, 192),
        ):
            yield f"{b} x {h}/{g} x {t} x {k}/{v}, {dtype}", make(b, h, g, t, k, v, dtype=dtype)
    for kind in FEATURE_MAPS:
        for normalize in (True, False):
            # An identity with a normaliser is divided by sums that may come close to 0.
            if normalize and kind == "identity":
                continue
            yield f"{kind}, normalize {normalize}, resumed", make(2, 4, 2, 70, 24, 40, kind, normalize, 16, resumed=True)
    padded = [[False] * 40 + [True] * 30, [True] * 60 + [False] * 10, [False] * 70]
    yield "padding on both sides, and a row of nothing else", make(3, 4, 2, 70, 16, 16, "elu1", True, 32, mask=padded)
    yield "padding, resumed", make(3, 4, 2, 70, 16, 16, "relu", False, 32, mask=padded, resumed=True)
    q, key, value, *rest = make(2, 4, 2, 50, 32, 48)
    yield "not contiguous", (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, key, value)), *rest)
