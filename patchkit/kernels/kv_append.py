"""kv_append: new keys and values into a static cache, each row at its own offset, with the rotation of the keys on the way.

Shapes: B rows, G kv heads, C slots, T new tokens, K key and V value dimensions, n <= K rotated dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import KernelError
from patchkit.kernels import triton
from patchkit.kernels.op import op


@op(mutates=("keys", "values"))
def kv_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    offsets: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """``keys[b, g, offsets[b] + t] = rotated(new_keys[b, g, t])``, ``values[b, g, offsets[b] + t] = new_values[b, g, t]``, in place.

    ``rotated(k)[i] = k[i] * cos[i] + h[i] * sin[i]`` with ``h = (-k[n/2 : n], k[: n/2])`` for the first n dimensions, the others as they
    are: rotary embedding (Su et al. 2021, arXiv 2104.09864) with the two halves of Llama and GPT-NeoX, not interleaved pairs. It is
    computed in fp32 (fp64 for fp64 keys) and rounded once, to the dtype of the cache: in fp32 the bits that transformers computes, in
    16 bits, where that rounds after every operation, closer to the exact value.

    Args:
        keys: [B, G, C, K] floating point.
        values: [B, G, C, V].
        new_keys: [B, G, T, K]; T <= C.
        new_values: [B, G, T, V].
        offsets: [B] int64, 0 .. C - T: the slot of the first new token.
        cos, sin: [B, T, n] with n even, or None: the keys are written as they are.

    Raises:
        KernelError: a row does not fit between slot 0 and C. Nothing is written then. The triton backend on a GPU does not read the
            offsets back, which would wait for the device: it leaves out what lies outside, and raises nothing.
    """
    first = _first_slots(keys, new_keys, offsets)
    tokens = new_keys.shape[2]
    if cos is not None and sin is not None:
        new_keys = _rotated(new_keys, cos, sin, torch.promote_types(keys.dtype, torch.float32))
    for b, slot in enumerate(first):
        keys[b, :, slot : slot + tokens] = new_keys[b]
        values[b, :, slot : slot + tokens] = new_values[b]


def _rotated(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    n, cos, sin = cos.shape[-1], cos[:, None].to(dtype), sin[:, None].to(dtype)
    turned, rest = k[..., :n].to(dtype), k[..., n:]
    half = torch.cat((-turned[..., n // 2 :], turned[..., : n // 2]), -1)
    turned = turned * cos + half * sin
    return torch.cat((turned, rest.to(dtype)), -1) if rest.shape[-1] else turned


def _first_slots(keys: torch.Tensor, new_keys: torch.Tensor, offsets: torch.Tensor) -> list[int]:
    """The offsets, all of which fit."""
    slots, tokens, first = keys.shape[2], new_keys.shape[2], offsets.tolist()
    if first and (min(first) < 0 or max(first) + tokens > slots):
        raise KernelError(
            f"kv_append: {tokens} tokens at offsets {min(first)} to {max(first)} do not fit into {slots} slots: make the cache larger"
        )
    return first


@kv_append.fake
def _(keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any, cos: Any = None, sin: Any = None) -> None:
    return None


@kv_append.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int, g: int, t: int, c: int, k: int, v: int, n: int = 0, dtype: torch.dtype = torch.float32
    ) -> tuple[torch.Tensor | None, ...]:
        shapes = (b, g, c, k), (b, g, c, v), (b, g, t, k), (b, g, t, v)
        cache = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        offsets = torch.randint(0, c - t + 1, (b,), generator=generator)
        offsets[-1], offsets[0] = c - t, 0  # both ends
        angles = torch.rand(b, t, n // 2, generator=generator).mul(6).repeat(1, 1, 2)
        return *cache, offsets.to(device), *((angles.cos().to(device), angles.sin().to(device)) if n else (None, None))

    yield "typical", make(2, 4, 5, 64, 64, 64, n=64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, g, t, c, k, v, n in (
            (1, 1, 1, 1, 2, 1, 2),
            (3, 2, 5, 40, 60, 33, 0),
            (4, 1, 1, 9, 80, 80, 20),
            (2, 3, 19, 30, 17, 64, 16),
            (2, 2, 3, 3, 128, 8, 128),
        ):
            label = f"{b} x {g} heads, {t} tokens into {c} slots, K = {k}, V = {v}, n = {n}, {dtype}"
            yield label, make(b, g, t, c, k, v, n, dtype)
    # As models hand them over: [B, T, G, K] transposed, and one rotation expanded to all rows.
    given = make(3, 4, 6, 20, 32, 32, n=32)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given[:4] if x is not None]
    rotations = [x[:1].expand(3, -1, -1) for x in given[5:] if x is not None]
    yield "nothing contiguous", (*turned, given[4], *rotations)
    keys, values, *rest = make(2, 2, 3, 12, 16, 16, n=8)
    assert keys is not None and values is not None
    yield "fp32 keys into a cache of fp16", (keys.half(), values.half(), *rest)


# -- CPU -------------------------------------------------------------------------------------------------------------------------


def _cpu_refuses(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, *rest: Any) -> str | None:
    if keys.device.type != "cpu":
        return f"keys are on {keys.device.type}"
    return "one row: two slices of the reference cost less" if len(keys) == 1 else None


@kv_append.backend("cpu", refuses=_cpu_refuses)
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    offsets: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """A slice per row in NumPy, which costs a fraction of a torch operator; index_put_ of all rows at once is slower at eight rows."""
    first = _first_slots(keys, new_keys, offsets)
    tokens = new_keys.shape[2]
    if cos is not None and sin is not None:
        new_keys = _rotated(new_keys, cos, sin, torch.promote_types(keys.dtype, torch.float32))
    for cache, new in ((keys, new_keys), (values, new_values)):
        to, given = _bits(cache), _bits(new.to(cache.dtype))
        for b, slot in enumerate(first):
            to[b, :, slot : slot + tokens] = given[b]


def _bits(x: torch.Tensor) -> Any:
    """The memory of x as a NumPy array, which has no bfloat16."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()


# -- Triton -----------------------------------------------------------------------------------------------------------------------


def _triton_refuses(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, *rest: Any) -> str | None:
    if keys.stride(3) != 1 or values.stride(3) != 1:
        return "the dimensions of a key or value do not lie side by side in the cache"
    if new_keys.numel() == 0:
        return "there is nothing to append"
    return triton.refusal(keys) or triton.refusal(new_keys)


@kv_append.backend("triton", refuses=_triton_refuses)
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    offsets: torch.Tensor,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
) -> None:
    """`patchkit.kernels.triton.kv_append`: one launch."""
    from patchkit.kernels.triton.kv_append import run

    if offsets.device.type == "cpu":  # the interpreter; on a GPU the kernel leaves out what lies outside
        _first_slots(keys, new_keys, offsets)
    run(keys, values, new_keys, new_values, offsets, cos, sin)
