"""kv_append: new keys and values into a static cache, each row at its own offset.

Shapes: B rows, G kv heads, C slots, T new tokens, K key and V value dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import KernelError
from patchkit.kernels import triton
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu


@op(mutates=("keys", "values"))
def kv_append(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, offsets: torch.Tensor) -> None:
    """T new keys and values of every row in a static cache, written in place at the row's own offset.

    ``keys[b, g, offsets[b] + t] = new_keys[b, g, t]``, ``values[b, g, offsets[b] + t] = new_values[b, g, t]``.

    Args:
        keys: [B, G, C, K] floating point.
        values: [B, G, C, V].
        new_keys: [B, G, T, K]; T <= C.
        new_values: [B, G, T, V].
        offsets: [B] int64, 0 .. C - T: the slot of the first new token.

    Raises:
        KernelError: a row does not fit between slot 0 and C. Nothing is written then. The triton backend on a GPU does not read the
            offsets back, which would wait for the device: it skips the slots outside of the cache, and raises nothing.
    """
    tokens = new_keys.shape[2]
    for b, slot in enumerate(_first_slots(keys, new_keys, offsets)):
        keys[b, :, slot : slot + tokens] = new_keys[b]
        values[b, :, slot : slot + tokens] = new_values[b]


def _first_slots(keys: torch.Tensor, new_keys: torch.Tensor, offsets: torch.Tensor) -> list[int]:
    """Offsets as Python integers, after a check that all rows fit."""
    slots, tokens, first = keys.shape[2], new_keys.shape[2], offsets.tolist()
    if first and (min(first) < 0 or max(first) + tokens > slots):
        raise KernelError(
            f"kv_append: {tokens} tokens at offsets {min(first)} to {max(first)} do not fit into {slots} slots: make the cache larger"
        )
    return first


@kv_append.fake
def _(keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any) -> None:
    return None


@kv_append.definition
def _(keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any) -> tuple[torch.Tensor, ...]:
    """Token by token: the cache afterwards."""
    keys, values = keys.double(), values.double()
    for row, first in enumerate(offsets.tolist()):
        for t in range(new_keys.shape[2]):
            keys[row, :, first + t], values[row, :, first + t] = new_keys[row, :, t].double(), new_values[row, :, t].double()
    return keys, values


@kv_append.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(b: int, g: int, t: int, c: int, k: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        shapes = (b, g, c, k), (b, g, c, v), (b, g, t, k), (b, g, t, v)
        cache = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        offsets = torch.randint(0, c - t + 1, (b,), generator=generator)
        offsets[-1], offsets[0] = c - t, 0  # both ends
        return *cache, offsets.to(device)

    yield "typical", make(2, 4, 5, 64, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, g, t, c, k, v in (
            (1, 1, 1, 1, 2, 1),
            (3, 2, 5, 40, 60, 33),
            (4, 1, 1, 9, 80, 80),
            (2, 3, 19, 30, 17, 64),
            (2, 2, 3, 3, 128, 8),
        ):
            yield f"{b} x {g} heads, {t} tokens into {c} slots, K = {k}, V = {v}, {dtype}", make(b, g, t, c, k, v, dtype)
    # In a model's own layout: [B, T, G, K] transposed.
    *given, offsets = make(3, 4, 6, 20, 32, 32)
    yield "nothing contiguous", (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in given), offsets)
    keys, values, *rest = make(2, 2, 3, 12, 16, 16)
    yield "fp32 keys into a cache of fp16", (keys.half(), values.half(), *rest)


def _cpu_refuses(keys: torch.Tensor, *rest: Any) -> str | None:
    return not_on_cpu(keys) or ("one row: two slices of the reference cost less" if len(keys) == 1 else None)


@kv_append.backend("cpu", refuses=_cpu_refuses)
def _(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, offsets: torch.Tensor) -> None:
    """NumPy slices, from two rows on.

    A slice in NumPy costs a fraction of a torch operator; index_put_ of all rows at once is slower at eight rows.
    """
    first, tokens = _first_slots(keys, new_keys, offsets), new_keys.shape[2]
    for cache, new in ((keys, new_keys), (values, new_values)):
        to, given = _bits(cache), _bits(new.to(cache.dtype))
        for b, slot in enumerate(first):
            to[b, :, slot : slot + tokens] = given[b]


def _bits(x: torch.Tensor) -> Any:
    """The memory of x as a NumPy array, which has no bfloat16."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


def _triton_refuses(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, *rest: Any) -> str | None:
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the dimensions of a key or value are not contiguous in the cache"
    if new_keys.numel() == 0:
        return "there is nothing to append"
    return triton.refusal(keys) or triton.refusal(new_keys)


@kv_append.backend("triton", refuses=_triton_refuses)
def _(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, offsets: torch.Tensor) -> None:
    """One launch."""
    from patchkit.kernels.triton.kv_append import run

    if offsets.device.type == "cpu":  # the interpreter; on a GPU the kernel skips the slots outside of the cache
        _first_slots(keys, new_keys, offsets)
    run(keys, values, new_keys, new_values, offsets)
