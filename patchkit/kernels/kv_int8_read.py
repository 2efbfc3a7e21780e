"""kv_int8_read: keys and values of one layer out of int8, keys rotated to positions of their own.

Shapes: B rows, G kv heads, N slots, K key and V value dimensions, n rotated dimensions, C rows of the coarse table.
`patchkit.kernels.kv_int8` has the format.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels import native
from patchkit.kernels.kv_int8 import FINE, SCALE, angles_at, pack, rotate_pairs, unpack
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

# The native kernel's buffer for the angles of one key.
_MOST_PAIRS = 512


@op
def kv_int8_read(
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    start: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of one layer out of int8, keys rotated to positions of their own.

    ``key = R(offset) (scale * codes)``, ``value = scale * codes``, computed in fp32.

    Args:
        keys: [B, G, N, K + 2] int8, packed.
        values: [B, G, N, V + 2] int8, packed.
        offsets: [B or 1, G or 1, N] int64, from 0 to 256 C - 1.
        coarse: [C, 2, n/2] fp32; n = 0 where keys do not rotate.
        fine: [256, 2, n/2] fp32.
        start: first of the n rotated dimensions of a key.
        interleaved: dimensions 2d and 2d + 1 are a pair, else d and d + n/2.
        dtype: of the results, a floating one.

    Returns:
        Keys [B, G, N, K] and values [B, G, N, V], contiguous.
    """
    rotated = rotate_pairs(unpack(keys), *angles_at(offsets, coarse, fine), start, interleaved)
    return rotated.to(dtype).contiguous(), unpack(values).to(dtype).contiguous()


@kv_int8_read.fake
def _(
    keys: Any, values: Any, offsets: Any, coarse: Any, fine: Any, start: Any, interleaved: Any, dtype: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(x.new_empty(*x.shape[:3], x.shape[3] - SCALE, dtype=dtype) for x in (keys, values))


@kv_int8_read.definition
def _(keys: Any, values: Any, offsets: Any, coarse: Any, fine: Any, start: Any, interleaved: Any, dtype: Any) -> tuple[torch.Tensor, ...]:
    """Key by key, with complex numbers."""

    def plain(x: torch.Tensor) -> torch.Tensor:
        scales = x[..., -2:].flatten().clone().view(torch.bfloat16)
        return x[..., :-2].double() * scales.double().view(*x.shape[:-1], 1)

    pairs = coarse.shape[-1]
    turned = plain(keys)
    turns = [torch.complex(*table.double().unbind(1)) for table in (coarse, fine)]
    for b, g, t in torch.cartesian_prod(*(torch.arange(size) for size in keys.shape[:3])).tolist():
        offset = offsets[b % len(offsets), g % offsets.shape[1], t].item()
        pair = torch.arange(pairs)
        first, second = (start + 2 * pair, start + 2 * pair + 1) if interleaved else (start + pair, start + pairs + pair)
        key = turned[b, g, t]
        rotated = torch.complex(key[first], key[second]) * turns[0][offset // 256] * turns[1][offset % 256]
        key[first], key[second] = rotated.real, rotated.imag
    return turned, plain(values)


def tables(generator: torch.Generator, rows: int, pairs: int, device: torch.device) -> list[torch.Tensor]:
    """Random angles as a coarse table of so many rows and a fine one, for the samples."""
    angles = [torch.rand(n, pairs, generator=generator, dtype=torch.float64) * 6 for n in (rows, FINE)]
    return [torch.stack([x.cos(), x.sin()], 1).float().to(device) for x in angles]


@kv_int8_read.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int, g: int, n: int, k: int, v: int, pairs: int, rows: int = 3, per: tuple[int, int] = (1, 1), start: int = 0, ends: Any = False
    ) -> tuple[Any, ...]:
        keys, values = (pack(torch.randn(b, g, n, d, generator=generator)).to(device) for d in (k, v))
        offsets = torch.randint(0, FINE * rows, (*per, n), generator=generator).to(device)
        return keys, values, offsets, *tables(generator, rows, pairs, device), start, ends

    yield "typical", (*make(1, 3, 70, 64, 64, 32), torch.float32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield f"rows and heads of their own, {dtype}", (*make(3, 2, 9, 80, 33, 40, 4, (3, 2)), dtype)
        yield f"pairs side by side, a part rotates, {dtype}", (*make(2, 3, 17, 40, 8, 7, 1, (2, 1), 11, True), dtype)
        yield f"a part rotates, {dtype}", (*make(2, 2, 5, 64, 128, 8, 2, (1, 2), 48), dtype)
    yield "nothing rotates", (*make(1, 1, 3, 16, 2, 0), torch.float32)
    yield "one token of one dimension", (*make(1, 1, 1, 2, 1, 1, 1), torch.float32)
    keys, values, *rest = make(2, 2, 12, 16, 16, 8, per=(2, 1))
    yield "the front of a ring", (keys[:, :, :7], values[:, :, :7], rest[0][:, :, :7], *rest[1:], torch.float32)
    zeros = torch.zeros(1, 1, 4, 10, dtype=torch.int8, device=device)
    yield (
        "half empty",
        (torch.cat([zeros, pack(torch.randn(1, 1, 4, 8, generator=generator)).to(device)], 2),) * 2
        + (
            torch.zeros(1, 1, 8, dtype=torch.int64, device=device),
            *tables(generator, 1, 4, device),
            0,
            False,
            torch.float32,
        ),
    )


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # Keys, values, offsets, tables, results; sizes; threads.
    return native.load("kv_int8_read", (ctypes.c_void_p,) * 8 + (ctypes.c_int,))


def _native_refuses(
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    start: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> str | None:
    if (reason := not_on_cpu(keys)) is not None:
        return reason
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype}: it writes fp32 and bf16"
    if coarse.shape[-1] > _MOST_PAIRS:
        return f"{coarse.shape[-1]} rotated pairs: at most {_MOST_PAIRS}"
    if keys.stride(3) != 1 or values.stride(3) != 1 or keys.numel() == 0 or values.numel() == 0:
        return "the bytes of a key or value are not side by side, or there are none"
    return _kernel()[1]


@kv_int8_read.backend("native", refuses=_native_refuses)
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    start: int,
    interleaved: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """C++, one pass: `native/kv_int8_read.cpp`."""
    batch, groups, count, k = keys.shape
    k, v = k - SCALE, values.shape[3] - SCALE
    # Named, so that they live until the call is over.
    offsets, coarse, fine = offsets.contiguous(), coarse.contiguous(), fine.contiguous()
    out = torch.empty(batch, groups, count, k, dtype=dtype), torch.empty(batch, groups, count, v, dtype=dtype)
    own_rows, own_heads = (size if n > 1 else 0 for n, size in zip(offsets.shape[:2], (math.prod(offsets.shape[1:]), count), strict=True))
    steps = *keys.stride()[:3], *values.stride()[:3], own_rows, own_heads
    numbers = batch, groups, count, k, v, coarse.shape[-1], start, int(interleaved), int(dtype == torch.bfloat16)
    sizes = (ctypes.c_int64 * 17)(*numbers, *steps)
    tensors = keys, values, offsets, coarse, fine, *out
    _kernel()[0](*(x.data_ptr() for x in tensors), ctypes.addressof(sizes), torch.get_num_threads())
    return out
