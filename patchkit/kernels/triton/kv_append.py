"""Triton kernel of the op `kv_append`: one launch for keys and values.

Shapes: B rows, G kv heads, C slots, T new tokens, K key and V value dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from patchkit.kernels.triton import FLOAT_TYPES, Launch, Signature


def run(keys: torch.Tensor, values: torch.Tensor, new_keys: torch.Tensor, new_values: torch.Tensor, offsets: torch.Tensor) -> None:
    """The op `kv_append` on a cache whose last dimension has stride 1, and at least one new token."""
    (b, g, t, k), c, v = new_keys.shape, keys.shape[2], values.shape[3]
    new_keys, new_values = (new if new.stride(3) == 1 else new.contiguous() for new in (new_keys, new_values))
    launch = plan(b, g, t, k, v)
    strides = [stride for tensor in (keys, values, new_keys, new_values) for stride in tensor.stride()[:3]]
    sizes = (g, t, c, k, v)
    # Triton launches on the current device, which is not the cache's where a model is spread over several.
    with torch.cuda.device_of(keys):
        launch.kernel[launch.grid](
            keys, values, new_keys, new_values, offsets.contiguous(), *sizes, *strides, **launch.constants, **launch.options
        )


def plan(b: int, g: int, t: int, k: int, v: int) -> Launch:
    """One program for every head of a row and up to 16 tokens."""
    tokens = min(16, triton.next_power_of_2(t))
    constants = dict(BLOCK_T=tokens, BLOCK_K=triton.next_power_of_2(k), BLOCK_V=triton.next_power_of_2(v))
    return Launch(append, (b * g, triton.cdiv(t, tokens)), constants, dict(num_warps=4, enable_fp_fusion=False))


def signatures() -> Iterator[Signature]:
    """Every dtype, for the usual sizes and for odd ones."""
    pointers = ("keys", "values", "new_keys", "new_values")
    sizes = ("G", "T", "C", "K", "V", *(f"{name}_{dimension}" for name in pointers for dimension in "bgt"))
    for dtype, name in FLOAT_TYPES.items():
        for t, k, v in ((5, 64, 64), (300, 256, 256), (1, 128, 128), (3, 17, 33)):
            types = {pointer: f"*{name}" for pointer in pointers} | {"offsets": "*i64"} | dict.fromkeys(sizes, "i32")
            label = f"{t} tokens, K = {k}, V = {v}, {dtype}"
            yield Signature(label, plan(8, 4, t, k, v), types, aligned=k % 16 == 0)


@triton.jit(do_not_specialize=["G", "T", "C"])
def append(
    keys, values, new_keys, new_values, offsets, G, T, C, K, V,
    keys_b, keys_g, keys_t, values_b, values_g, values_t,
    new_keys_b, new_keys_g, new_keys_t, new_values_b, new_values_g, new_values_t,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens of head ``program_id(0) % G`` of row ``program_id(0) // G``. A slot outside the cache is not written."""
    b, g = (tl.program_id(0) // G).to(tl.int64), (tl.program_id(0) % G).to(tl.int64)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot = tl.load(offsets + b) + t
    inside = ((t < T) & (slot >= 0) & (slot < C))[:, None]
    token = t.to(tl.int64)[:, None]

    v = tl.arange(0, BLOCK_V)[None, :]
    value = tl.load(new_values + b * new_values_b + g * new_values_g + token * new_values_t + v, mask=inside & (v < V), other=0)
    to = values + b * values_b + g * values_g + slot[:, None] * values_t + v
    tl.store(to, value.to(values.dtype.element_ty), mask=inside & (v < V))

    k = tl.arange(0, BLOCK_K)[None, :]
    key = tl.load(new_keys + b * new_keys_b + g * new_keys_g + token * new_keys_t + k, mask=inside & (k < K), other=0)
    to = keys + b * keys_b + g * keys_g + slot[:, None] * keys_t + k
    tl.store(to, key.to(keys.dtype.element_ty), mask=inside & (k < K))
