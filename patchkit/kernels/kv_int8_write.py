"""kv_int8_write: new keys and values of one layer into int8, keys without their rotation.

Shapes: B rows, G kv heads, C slots, T new tokens, K key and V value dimensions, n rotated dimensions.
`patchkit.kernels.kv_int8` has the format.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels import native
from patchkit.kernels.kv_int8 import FINE, SCALE, angles_at, pack, rotate_pairs
from patchkit.kernels.kv_int8_read import tables
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

# The native kernel's buffers for one key or value.
_MOST_DIMENSIONS = 1024


@op(mutates=("keys", "values"))
def kv_int8_write(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    start: int,
    interleaved: bool,
) -> None:
    """New keys and values of one layer into int8, keys without their rotation.

    ``keys[b, g, slots[t]] = pack(R(-offset) new_keys[b, g, t])``, ``values[b, g, slots[t]] = pack(new_values[b, g, t])``, in fp32.

    Args:
        keys: [B, G, C, K + 2] int8, packed.
        values: [B, G, C, V + 2] int8, packed.
        new_keys: [B, G, T, K] floating point, rotated by their offsets.
        new_values: [B, G, T, V].
        slots: [T] int64, from 0 to C - 1, all different.
        offsets: [B or 1, 1, T] int64.
        coarse: [rows, 2, n/2] fp32; n = 0 where keys do not rotate.
        fine: [256, 2, n/2] fp32.
        start: first of the n rotated dimensions of a key.
        interleaved: dimensions 2d and 2d + 1 are a pair, else d and d + n/2.
    """
    cos, sin = angles_at(offsets, coarse, fine)
    keys.index_copy_(2, slots, pack(rotate_pairs(new_keys.float(), cos, -sin, start, interleaved)))
    values.index_copy_(2, slots, pack(new_values))


@kv_int8_write.fake
def _(*args: Any) -> None:
    return None


@kv_int8_write.definition
def _(
    keys: Any, values: Any, new_keys: Any, new_values: Any, slots: Any, offsets: Any, coarse: Any, fine: Any, start: Any, interleaved: Any
) -> tuple[torch.Tensor, ...]:
    """Number by number: the packed tensors afterwards."""
    pairs = coarse.shape[-1]
    for b, g, t in torch.cartesian_prod(*(torch.arange(size) for size in new_keys.shape[:3])).tolist():
        key, offset = new_keys[b, g, t].double(), offsets[b % len(offsets), 0, t].item()
        for i in range(pairs):
            one, two = (start + 2 * i, start + 2 * i + 1) if interleaved else (start + i, start + pairs + i)
            turn = complex(*coarse[offset // 256, :, i].tolist()) * complex(*fine[offset % 256, :, i].tolist())
            turned = complex(key[one].item(), key[two].item()) * turn.conjugate()
            key[one], key[two] = turned.real, turned.imag
        for kept, x in ((keys, key), (values, new_values[b, g, t].double())):
            scale = torch.tensor(max(map(abs, x.tolist())) / 127, dtype=torch.float64).to(torch.bfloat16)
            codes = [max(-127, min(127, round(each / (scale.item() or 1.0)))) for each in x.tolist()]
            kept[b, g, slots[t].item()] = torch.tensor([*codes, *scale[None].view(torch.int8).tolist()], dtype=torch.int8)
    return keys, values


@kv_int8_write.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int, g: int, t: int, c: int, k: int, v: int, pairs: int, start: int = 0, interleaved: bool = False, dtype: Any = torch.float32
    ) -> tuple[Any, ...]:
        kept = [torch.randint(-128, 128, (b, g, c, d + SCALE), generator=generator).to(device, torch.int8) for d in (k, v)]
        new = [torch.randn(b, t, g, d, generator=generator).to(device, dtype).transpose(1, 2) for d in (k, v)]
        slots = torch.randperm(c, generator=generator)[:t].to(device)
        offsets = torch.randint(0, 2 * FINE, (b, 1, t), generator=generator).to(device)
        return *kept, *new, slots, offsets, *tables(generator, 2, pairs, device), start, interleaved

    yield "typical", make(1, 3, 1, 70, 64, 64, 32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield f"several tokens, {dtype}", make(3, 2, 4, 9, 80, 33, 40, dtype=dtype)
        yield f"pairs side by side, a part rotates, {dtype}", make(2, 3, 1, 5, 40, 8, 7, 11, True, dtype)
    yield "nothing rotates", make(1, 1, 2, 3, 16, 2, 0)
    yield "one dimension", make(1, 1, 1, 1, 2, 1, 1)
    keys, values, new_keys, new_values, *rest = make(2, 1, 1, 4, 8, 8, 4)
    yield (
        "very large, very small and zero",
        (keys, values, new_keys * 1e30, new_values * 1e-30 * (new_values > 0), *rest),
    )
    yield "rows share their offsets", (keys, values, new_keys, new_values, rest[0], rest[1][:1], *rest[2:])


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # Keys, values, new keys and values, slots, offsets, tables; sizes.
    return native.load("kv_int8_write", (ctypes.c_void_p,) * 9)


def _native_refuses(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, *rest: Any) -> str | None:
    if (reason := not_on_cpu(keys)) is not None:
        return reason
    if not (keys.is_contiguous() and values.is_contiguous()) or new_keys.numel() == 0 or new_values.numel() == 0:
        return "the packed tensors are not contiguous, or there is nothing to write"
    if max(new_keys.shape[3], new_values.shape[3]) > _MOST_DIMENSIONS:
        return f"a key or value has more than {_MOST_DIMENSIONS} dimensions"
    if torch.float64 in (new_keys.dtype, new_values.dtype):
        return "float64: it computes in fp32"
    return _kernel()[1]


@kv_int8_write.backend("native", refuses=_native_refuses)
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    coarse: torch.Tensor,
    fine: torch.Tensor,
    start: int,
    interleaved: bool,
) -> None:
    """C++, one pass: `native/kv_int8_write.cpp`."""
    batch, groups, count, k = new_keys.shape
    # Named, so that they live until the call is over.
    given = new_keys.float().contiguous(), new_values.float().contiguous()
    places = slots.contiguous(), offsets.contiguous(), coarse.contiguous(), fine.contiguous()
    numbers = batch, groups, count, keys.shape[2], k, new_values.shape[3], coarse.shape[-1], start, int(interleaved)
    sizes = (ctypes.c_int64 * 10)(*numbers, count if len(offsets) > 1 else 0)
    _kernel()[0](*(x.data_ptr() for x in (keys, values, *given, *places)), ctypes.addressof(sizes))
