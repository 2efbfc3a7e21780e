"""Triton kernels of the ops `linear_attention` and `linear_attention_step`.

Shapes: B batch, H heads, G kv heads, T tokens, K = F features, V value dimension. q [B, H, T, K], k [B, G, T, K], v [B, G, T, V].

The tokens are cut into segments, at least one per multiprocessor where there are enough tokens, and read in tiles of BLOCK_T:

* `sum_segments`: ``f(k)^T v`` and the sum of f(k) of each segment, [B, G, segments, F * V + F] fp32.
* `scan_segments`: replaces them by the sums of all tokens before the segment, and writes the state after the last.
* `outputs`: one pass over each segment, the state of a block of V in registers.

`step` takes one token: one program per kv head, because all blocks of V read the normaliser that is being updated.
Sums are in an order that depends on the shapes alone: there are no atomics. The gradient is made of the same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from patchkit.kernels.linear_attention.inputs import FEATURE_MAPS
from patchkit.kernels.triton import FLOAT_TYPES, Launch, Signature

# Two for every multiprocessor of an H100.
_PROGRAMS = 264

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    feature_map: str,
    normalize: bool,
) -> Four:
    """The op `linear_attention` on tensors that are not empty."""
    (b, h, t, width), g, value_width = q.shape, k.shape[1], v.shape[-1]
    q, k, v = _alike(q, k, v)
    made = torch.empty(b, h, t, value_width, dtype=q.dtype if normalize else torch.float32, device=q.device)
    denominator = made.new_empty(b, h, t, dtype=torch.float32)
    after, sums = (denominator.new_empty(b, g, width, *rest) for rest in ((value_width,), ()))
    launches, segment = plan(b, h, g, t, width, value_width, q.dtype, feature_map, normalize)
    segments = triton.cdiv(t, segment)
    before = denominator.new_empty(b, g, segments, width * value_width + width)
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    tensors = {
        "sum_segments": (k, v, seen, before, t, g, width, value_width, segment, *k.stride()[:3], *v.stride()[:3]),
        "scan_segments": (before, *_contiguous(state, normalizer), after, sums, segments, width, value_width),
        "outputs": (
            *(q, k, v, seen, before, made, denominator, t, h, g, width, value_width, segment),
            *(step for x in (q, k, v) for step in x.stride()[:3]),
        ),
    }
    # Triton launches on the current device, which is not q's where a model is spread over several.
    with torch.cuda.device_of(q):
        for launch in launches:
            launch.kernel[launch.grid](*tensors[launch.kernel.__name__], **launch.constants, **launch.options)
    return made, denominator, after, sums


def run_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    mask: torch.Tensor | None,
    feature_map: str,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `linear_attention_step` on tensors that are not empty and a contiguous state."""
    (b, h, _, width), g, value_width = q.shape, k.shape[1], v.shape[-1]
    out = torch.empty(b, h, 1, value_width, dtype=q.dtype if normalize else torch.float32, device=q.device)
    denominator = out.new_empty(b, h, 1, dtype=torch.float32)
    seen = None if mask is None else mask.contiguous().view(torch.uint8)
    launch = plan_step(b, h, g, width, value_width, feature_map, normalize)
    with torch.cuda.device_of(q):
        launch.kernel[launch.grid](
            *_contiguous(q, k, v), seen, state, normalizer, out, denominator, g, width, value_width, **launch.constants, **launch.options
        )
    return out, denominator


def _alike(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one dtype, with a contiguous last dimension."""
    dtype = tensors[0].dtype if len({x.dtype for x in tensors}) == 1 else torch.float32
    return [x.to(dtype) if x.stride(-1) == 1 else x.to(dtype).contiguous() for x in tensors]


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def plan(
    b: int, h: int, g: int, t: int, width: int, value_width: int, dtype: torch.dtype, feature_map: str, normalize: bool
) -> tuple[tuple[Launch, Launch, Launch], int]:
    """The three launches of `linear_attention`, and the tokens of a segment."""
    # The largest tiles for the registers and the shared memory of every GPU from compute capability 8.0 on.
    halves, block_f = 2 if dtype == torch.bfloat16 else 1, _block(width)
    block_t = min(32, (16 if block_f > 128 else 32) * halves)
    block_v = min(_block(value_width), (16 if block_f > 128 else 32) * halves)
    blocks = triton.cdiv(value_width, block_v)
    segments = max(1, min(triton.cdiv(t, block_t), triton.cdiv(_PROGRAMS, b * h * blocks)))
    segment = triton.cdiv(triton.cdiv(t, segments), block_t) * block_t
    segments = triton.cdiv(t, segment)
    constants = dict(MAP=FEATURE_MAPS.index(feature_map), BLOCK_T=block_t, BLOCK_V=block_v)
    part_f = min(block_f, 64)
    size = width * value_width + width
    return (
        Launch(sum_segments, (b * g * segments, triton.cdiv(width, part_f), blocks), {**constants, "BLOCK_F": part_f}, _options(4, 2)),
        Launch(scan_segments, (b * g, triton.cdiv(size, 1024)), dict(BLOCK=1024), _options(4, 1)),
        Launch(
            outputs,
            (b * h * segments, blocks),
            {**constants, "BLOCK_F": block_f, "NORMALIZE": normalize},
            _options(8, 2 if dtype == torch.bfloat16 and block_f <= 128 else 1),
        ),
    ), segment


def plan_step(b: int, h: int, g: int, width: int, value_width: int, feature_map: str, normalize: bool) -> Launch:
    """The launch of `linear_attention_step`."""
    constants = dict(
        SHARED=h // g, MAP=FEATURE_MAPS.index(feature_map), NORMALIZE=normalize, BLOCK_F=_block(width), BLOCK_V=min(_block(value_width), 16)
    )
    return Launch(step, (b * g,), constants, _options(8, 2))


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _options(warps: int, stages: int) -> dict[str, Any]:
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def signatures() -> Iterator[Signature]:
    """Every kernel for each dtype and for head sizes up to 256, one that no power of two divides included."""
    for dtype, name in FLOAT_TYPES.items():
        for width, value_width, masked in ((128, 128, False), (256, 256, False), (80, 72, True)):
            # The sums of an op that is not normalised are fp32.
            normalize = not (masked and dtype == torch.bfloat16)
            launches, _ = plan(1, 8, 8, 4096, width, value_width, dtype, "elu1", normalize)
            inputs, result = {x: f"*{name}" for x in "qkv"}, f"*{name}" if normalize else "*fp32"
            seen, states = "*u8" if masked else "none", {x: "*fp32" if masked else "none" for x in ("state", "normalizer")}
            floats = {x: "*fp32" for x in ("before", "after", "sums", "denominator")}
            integers = {x: "i32" for x in ("T", "H", "G", "K", "V", "SEGMENT", "SEGMENTS")}
            strides = {f"{x}_{of}": "i32" for x in "qkv" for of in ("batch", "head", "token")}
            given = {**inputs, "mask": seen, "out": result, **states, **floats, **integers, **strides}
            for launch in (*launches, plan_step(1, 8, 2, width, value_width, "elu1", normalize)):
                types = given | (dict(state="*fp32", normalizer="*fp32") if launch.kernel is step else {})
                if launch.kernel is not scan_segments or dtype == torch.float32:
                    of_kernel = {x: kind for x, kind in types.items() if x in launch.kernel.arg_names}
                    yield Signature(f"{width}/{value_width}, {dtype}", launch, of_kernel, aligned=not masked)


@triton.jit
def _features(x, inside, MAP: tl.constexpr):
    """f(x) in fp32, 0 outside."""
    x = x.to(tl.float32)
    if MAP == 1:
        x = tl.where(x > 0, x + 1, tl.exp(x))
    if MAP == 2:
        x = tl.where(x < 0, 0.0, x)
    return tl.where(inside, x, 0.0)


@triton.jit
def _dot(a, b, sum, dtype: tl.constexpr):
    """a b + sum on tensor cores: in bf16 if the op's inputs are, else in TF32, because in fp16 sums of products could overflow."""
    if dtype != tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum, input_precision="tf32")
    else:
        return tl.dot(a.to(dtype), b.to(dtype), sum)


@triton.jit
def _keys(k, mask, t, f, last, K, k_token, MAP: tl.constexpr):
    """Features [F, T] of keys at the tokens t < last."""
    seen = t < last
    x = tl.load(k + t[None, :].to(tl.int64) * k_token + f[:, None], mask=seen[None, :] & (f[:, None] < K), other=0)
    if mask is not None:
        seen = seen & (tl.load(mask + t, mask=seen, other=0) != 0)
    return _features(x, seen[None, :] & (f[:, None] < K), MAP)


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def sum_segments(
    k, v, mask, before, T, G, K, V, SEGMENT, k_batch, k_head, k_token, v_batch, v_head, v_token,
    MAP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A block [BLOCK_F, BLOCK_V] of the sum over one segment, into before [B, G, segments, F * V + F]."""
    segments = tl.cdiv(T, SEGMENT)
    place = tl.program_id(0).to(tl.int64)
    segment, pair = (place % segments).to(tl.int32), place // segments
    k += pair // G * k_batch + pair % G * k_head
    v += pair // G * v_batch + pair % G * v_head
    if mask is not None:
        mask += pair // G * T
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    c = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    total = tl.zeros((BLOCK_F,), tl.float32)
    last = tl.minimum((segment + 1) * SEGMENT, T)
    for start in range(segment * SEGMENT, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        keys = _keys(k, mask, t, f, last, K, k_token, MAP)
        values = tl.load(v + t[:, None].to(tl.int64) * v_token + c[None, :], mask=(t[:, None] < last) & (c[None, :] < V), other=0)
        state = _dot(keys, values, state, v.dtype.element_ty)
        total += tl.sum(keys, 1)
    before += place * (K * V + K)
    tl.store(before + f[:, None] * V + c[None, :], state, mask=(f[:, None] < K) & (c[None, :] < V))
    if tl.program_id(2) == 0:
        tl.store(before + K * V + f, total, mask=f < K)


@triton.jit(do_not_specialize=["SEGMENTS"])
def scan_segments(before, state, normalizer, after, sums, SEGMENTS, K, V, BLOCK: tl.constexpr):
    """Each of the sums in before is replaced by the initial value and all sums before it; the total is left in after and sums."""
    pair = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size = K * V
    carried = tl.zeros((BLOCK,), tl.float32)
    if state is not None:
        carried += tl.load(state + pair * size + i, mask=i < size, other=0)
    if normalizer is not None:
        carried += tl.load(normalizer + pair * K + i - size, mask=(i >= size) & (i < size + K), other=0)
    for segment in range(SEGMENTS):
        at = before + (pair * SEGMENTS + segment) * (size + K) + i
        found = tl.load(at, mask=i < size + K, other=0)
        tl.store(at, carried, mask=i < size + K)
        carried += found
    tl.store(after + pair * size + i, carried, mask=i < size)
    tl.store(sums + pair * K + i - size, carried, mask=(i >= size) & (i < size + K))


@triton.jit(do_not_specialize=["T", "SEGMENT"])
def outputs(
    q, k, v, mask, before, out, denominator, T, H, G, K, V, SEGMENT,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_V columns of out for one segment of one head, and the denominators."""
    segments = tl.cdiv(T, SEGMENT)
    place = tl.program_id(0).to(tl.int64)
    segment, row = (place % segments).to(tl.int32), place // segments
    batch, head = row // H, row % H
    group = head // (H // G)
    q += batch * q_batch + head * q_head
    k += batch * k_batch + group * k_head
    v += batch * v_batch + group * v_head
    if mask is not None:
        mask += batch * T
    out += row * T * V
    denominator += row * T
    before += ((batch * G + group) * segments + segment) * (K * V + K)
    f = tl.arange(0, BLOCK_F)
    c = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    state = tl.load(before + f[:, None] * V + c[None, :], mask=(f[:, None] < K) & (c[None, :] < V), other=0)
    total = tl.load(before + K * V + f, mask=f < K, other=0)
    dtype: tl.constexpr = v.dtype.element_ty
    last = tl.minimum((segment + 1) * SEGMENT, T)
    for start in range(segment * SEGMENT, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        inside = (t[:, None] < last) & (f[None, :] < K)
        queries = _features(tl.load(q + t[:, None].to(tl.int64) * q_token + f[None, :], mask=inside, other=0), inside, MAP)
        keys = _keys(k, mask, t, f, last, K, k_token, MAP)
        values = tl.load(v + t[:, None].to(tl.int64) * v_token + c[None, :], mask=(t[:, None] < last) & (c[None, :] < V), other=0)
        weights = _dot(queries, keys, tl.zeros((BLOCK_T, BLOCK_T), tl.float32), dtype)
        weights = tl.where(t[:, None] >= t[None, :], weights, 0.0)
        made = _dot(queries, state, tl.zeros((BLOCK_T, BLOCK_V), tl.float32), dtype)
        made = _dot(weights, values, made, dtype)
        sum = tl.sum(weights, 1) + tl.sum(queries * total[None, :], 1)
        if NORMALIZE:
            made = tl.where(sum[:, None] == 0, 0.0, made / tl.where(sum == 0, 1.0, sum)[:, None])
        tl.store(out + t[:, None].to(tl.int64) * V + c[None, :], made.to(out.dtype.element_ty), mask=(t[:, None] < last) & (c[None, :] < V))
        if tl.program_id(1) == 0:
            tl.store(denominator + t, sum, mask=t < last)
        state = _dot(keys, values, state, dtype)
        total += tl.sum(keys, 1)


@triton.jit
def step(
    q, k, v, mask, state, normalizer, out, denominator, G, K, V,
    SHARED: tl.constexpr, MAP: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One token of one kv head, for the SHARED heads that read it: state and normalizer are updated and read."""
    pair = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, BLOCK_F)
    seen = f < K
    if mask is not None:
        seen = seen & (tl.load(mask + pair // G) != 0)
    key = _features(tl.load(k + pair * K + f, mask=f < K, other=0), seen, MAP)
    total = tl.load(normalizer + pair * K + f, mask=f < K, other=0) + key
    tl.store(normalizer + pair * K + f, total, mask=f < K)
    for first in range(0, V, BLOCK_V):
        c = first + tl.arange(0, BLOCK_V)
        at = state + pair * K * V + f[:, None] * V + c[None, :]
        inside = (f[:, None] < K) & (c[None, :] < V)
        value = tl.load(v + pair * V + c, mask=c < V, other=0).to(tl.float32)
        updated = tl.load(at, mask=inside, other=0) + key[:, None] * value[None, :]
        tl.store(at, updated, mask=inside)
        for i in range(SHARED):
            head = pair * SHARED + i
            query = _features(tl.load(q + head * K + f, mask=f < K, other=0), f < K, MAP)
            sum = tl.sum(query * total, 0)
            made = tl.sum(query[:, None] * updated, 0)
            if NORMALIZE:
                made = tl.where(sum == 0, 0.0, made / tl.where(sum == 0, 1.0, sum))
            tl.store(out + head * V + c, made.to(out.dtype.element_ty), mask=c < V)
            tl.store(denominator + head, sum)
