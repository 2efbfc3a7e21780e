"""Triton kernels of the op `int8_linear`, for NVIDIA GPUs from compute capability 8.0.

Shapes: M rows (tokens), K input and N output features. x [M, K], weight int8 [N, K], scale fp32 [N] or [N, K // group], y [M, N].

* `one_to_four_rows`: decoding. It is bound by reading the weights, so 16-byte loads of them have to be in flight all the time. Each
  program computes BLOCK_N output features over all of K; weights go to registers through a pipeline of stages, and are multiplied there
  in fp32 (int32 for int8 rows): tensor cores would have to be fed from shared memory, and took 5 to 80 % longer on an H100.
* `few_rows`, 5 to 16: a handful to verify. The multiplications of 16 rows are too many without tensor cores. K is divided among the warps
  of a program: a batched tl.dot, one batch entry per warp, added up once at the end. Rows are padded to 16.
  Neither of the two has a workspace or atomics, and M is an argument of both, not a constant: each output row comes from its own input
  row by the same operations in the same order, so that a token's result does not depend on the other tokens, nor on their
  number within 1 to 4 and within 5 to 16. int8 rows give the same bits in all kernels: their sums are of integers.
* `many_rows`, M > 16: the usual tiles. The weights are the left operand, because Hopper's tensor cores take only that one
  from registers, where the bytes have just become x's dtype.
* `quantize_rows`: dynamic quantisation, one program per row. The integers then go through the same kernels, in int32.

Weights become x's dtype exactly, products are summed in fp32 and scaled in fp32, and only then cast: nothing overflows on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from patchkit.kernels.triton import FLOAT_TYPES, Launch, Signature

FOUR, FEW = 4, 16
_TYPES = {**FLOAT_TYPES, torch.int8: "i8"}


def run(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation: str) -> torch.Tensor:
    """The op `int8_linear` on a non-empty x and contiguous weights."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype, device=x.device)
    step = None
    # Triton launches on the current device, which is not x's where a model is spread over several.
    with torch.cuda.device_of(x):
        if activation == "int8":
            rows, step = _quantized(rows)
        (m, k), n = rows.shape, weight.shape[0]
        group = 0 if scale.ndim == 1 else k // scale.shape[1]
        launch = plan(m, n, k, rows.dtype, group)
        launch.kernel[launch.grid](rows, weight, scale.contiguous(), bias, step, y, m, n, k, **launch.constants, **launch.options)
    return y


def _quantized(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [M, K] and fp32 [M]: every row as integers times its step."""
    m, k = rows.shape
    integers, step = torch.empty_like(rows, dtype=torch.int8), torch.empty(m, dtype=torch.float32, device=rows.device)
    launch = _plan_quantize(m, k)
    launch.kernel[launch.grid](rows, integers, step, k, **launch.constants, **launch.options)
    return integers, step


def plan(m: int, n: int, k: int, dtype: torch.dtype, group: int) -> Launch:
    """Kernel, grid and tile sizes. Within 1 to 4 rows, and within 5 to 16, the order of operations is independent of the number of rows.

    Args:
        dtype: of the rows; int8 after dynamic quantisation.
        group: input features per scale, a multiple of 16 (of 32 for int8 rows), or 0: one scale per output feature.
    """
    if m <= FOUR:
        # Of 18 choices timed on an H100 on layers of Pythia-2.8b and Llama-3-8B within 2 % of the fastest for one row, and faster than that
        # one for four: evals/results/gpu_int8_tiles.json.
        columns, depth = 8, 512
        constants = dict(GROUP=group, BLOCK_N=columns, BLOCK_K=depth, ROWS=m if m < 3 else FOUR, EVEN_K=k % depth == 0, STAGES=4)
        return Launch(one_to_four_rows, (triton.cdiv(n, columns),), constants, _options(num_warps=4))
    # The largest power of two that a block of K may have, so that it lies in one group.
    most = group & -group if group else 1024
    if m <= FEW:
        # Few parts and narrow tiles, so that several programs fit on a multiprocessor: of ten choices the best over the same layers with
        # one row, which takes this kernel about as long as 16; for 16, on two of the layers, another was 3 to 7 % faster.
        columns, depth, parts = 16, min(32 if dtype == torch.float32 else 64, most), 4
        constants = dict(GROUP=group, BLOCK_M=FEW, BLOCK_N=columns, BLOCK_K=depth, PARTS=parts, EVEN_K=k % (parts * depth) == 0)
        return Launch(few_rows, (triton.cdiv(n, columns),), constants, _options(num_warps=parts, num_stages=5))
    # Without tensor cores (fp32), and where rows start anywhere, larger tiles would not fit into the registers.
    if dtype == torch.float32 or k % 16:
        rows, columns, depth, warps = 64, 64, 32, 4
    else:
        rows, columns, depth, warps = 128 if m > 64 else 64, 128, 128 if dtype == torch.int8 else 64, 8
    constants = dict(GROUP=group, BLOCK_M=rows, BLOCK_N=columns, BLOCK_K=min(depth, most))
    return Launch(many_rows, (triton.cdiv(m, rows) * triton.cdiv(n, columns),), constants, _options(num_warps=warps, num_stages=3))


def _plan_quantize(m: int, k: int) -> Launch:
    return Launch(quantize_rows, (m,), dict(BLOCK_K=min(8192, max(32, triton.next_power_of_2(k)))), _options(num_warps=8))


def signatures() -> Iterator[Signature]:
    """Every kernel with the tiles that `plan` gives it, for each dtype, per channel and per group."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.int8):
        for m, n, group, aligned in (
            *((1, 14336, 0, True), (2, 2560, 0, True), (4, 2560, 0, True), (1, 67, 0, False), (4, 14336, 32, True), (1, 14336, 128, True)),
            *((5, 14336, 0, True), (16, 2560, 0, True), (16, 67, 0, False), (16, 14336, 32, True), (16, 14336, 128, True)),
            *((64, 14336, 0, True), (512, 14336, 0, True), (512, 67, 0, False), (512, 14336, 32, True), (512, 14336, 128, True)),
        ):
            launch = plan(m, n, 4096 if aligned else 67, dtype, group)
            quantised = dtype == torch.int8
            of_output = f"*{_TYPES[torch.float16 if quantised else dtype]}"
            types = dict(x=f"*{_TYPES[dtype]}", weight="*i8", scale="*fp32", bias=of_output if n == 14336 else "none",
                         step="*fp32" if quantised else "none", y=of_output, M="i32", N="i32", K="i32")  # fmt: skip
            label = f"{m} rows of {dtype}, {n} features{f', groups of {group}' if group else ''}{'' if aligned else ', unaligned'}"
            yield Signature(label, launch, types, aligned)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for k, aligned in ((67, False), (14336, True)):
            types = dict(x=f"*{_TYPES[dtype]}", integers="*i8", step="*fp32", K="i32")
            yield Signature(f"{k} features of {dtype}{'' if aligned else ', unaligned'}", _plan_quantize(1, k), types, aligned)


def _options(**options: Any) -> dict[str, Any]:
    # a * b + c is rounded once. Explicit, because Triton's default differs between versions.
    return {**options, "enable_fp_fusion": True}


@triton.jit
def _weights_as(weights, dtype: tl.constexpr):
    """int8 in another dtype, exactly."""
    if dtype == tl.float16:
        # As the last bits of 1024 + (w + 128), because the plain conversion runs at a fraction of the rate of additions.
        return ((weights ^ -128).to(tl.uint8, bitcast=True).to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1152.0
    return weights.to(dtype)


@triton.jit(do_not_specialize=["M"])
def one_to_four_rows(
    x, weight, scale, bias, step, y, M, N, K,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= ROWS, which is 1, 2 or 4. A lane sums its own 16 input features of every block."""
    number: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    lanes = tl.arange(0, BLOCK_K // 16) * 16
    w_rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    sums_0 = tl.zeros((BLOCK_N, BLOCK_K // 16), tl.float32 if GROUP else number)
    sums_1, sums_2, sums_3 = sums_0, sums_0, sums_0
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        inside = EVEN_K | (start + k < K)
        w = tl.load(w_rows + start, mask=(n[:, None] < N) & inside[None, :], other=0).to(number)
        s = sums_0
        if GROUP:
            groups = (start + lanes) // GROUP
            at = scale + n.to(tl.int64)[:, None] * (K // GROUP) + groups[None, :]
            s = tl.load(at, mask=(n[:, None] < N) & (groups[None, :] < K // GROUP), other=0)
        x_row = x + start + k
        sums_0 = _added(sums_0, x_row, 0, M, K, inside, w, s, GROUP)
        if ROWS > 1:
            sums_1 = _added(sums_1, x_row, 1, M, K, inside, w, s, GROUP)
        if ROWS > 2:
            sums_2 = _added(sums_2, x_row, 2, M, K, inside, w, s, GROUP)
            sums_3 = _added(sums_3, x_row, 3, M, K, inside, w, s, GROUP)
    m = tl.arange(0, 1)
    _finish(tl.sum(sums_0, 1)[None, :], scale, bias, step, y, m, n, M, N, GROUP)
    if ROWS > 1:
        _finish(tl.sum(sums_1, 1)[None, :], scale, bias, step, y, m + 1, n, M, N, GROUP)
    if ROWS > 2:
        _finish(tl.sum(sums_2, 1)[None, :], scale, bias, step, y, m + 2, n, M, N, GROUP)
        _finish(tl.sum(sums_3, 1)[None, :], scale, bias, step, y, m + 3, n, M, N, GROUP)


@triton.jit
def _added(sums, x_row, m, M, K, inside, w, s, GROUP: tl.constexpr):
    """sums [BLOCK_N, BLOCK_K // 16] and the products of row m with the weights w [BLOCK_N, BLOCK_K], 16 input features in each sum."""
    values = tl.load(x_row + m * K, mask=inside & (m < M), other=0).to(w.dtype)
    products = tl.sum(tl.reshape(w * values[None, :], [w.shape[0], w.shape[1] // 16, 16]), 2)
    if GROUP:
        return sums + products.to(tl.float32) * s
    return sums + products


@triton.jit(do_not_specialize=["M"])
def few_rows(
    x, weight, scale, bias, step, y, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] for M <= BLOCK_M. Part p of a step takes the input features [start + p * BLOCK_K, start + (p + 1) * BLOCK_K)."""
    sum_type: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.arange(0, PARTS) * BLOCK_K
    k = parts[:, None] + tl.arange(0, BLOCK_K)[None, :]
    x_rows = x + m[None, :, None] * K + k[:, None, :]
    w_rows = weight + n.to(tl.int64)[None, None, :] * K + k[:, :, None]
    sums = tl.zeros((PARTS, BLOCK_M, BLOCK_N), tl.float32 if GROUP else sum_type)
    for start in range(0, K, PARTS * BLOCK_K):
        a = tl.load(x_rows + start, mask=(m[None, :, None] < M) & (EVEN_K | (start + k[:, None, :] < K)), other=0)
        w = tl.load(w_rows + start, mask=(n[None, None, :] < N) & (EVEN_K | (start + k[:, :, None] < K)), other=0)
        # Three passes of tf32 keep fp32's precision: a byte needs no more than one, x splits into two.
        if GROUP:
            groups = (start + parts) // GROUP
            at = scale + n.to(tl.int64)[None, :] * (K // GROUP) + groups[:, None]
            s = tl.load(at, mask=(n[None, :] < N) & (groups[:, None] < K // GROUP), other=0)
            product = tl.dot(a, _weights_as(w, a.dtype), input_precision="tf32x3", out_dtype=sum_type)
            sums += product.to(tl.float32) * s[:, None, :]
        else:
            sums = tl.dot(a, _weights_as(w, a.dtype), sums, input_precision="tf32x3", out_dtype=sum_type)
    _finish(tl.sum(sums, 0), scale, bias, step, y, m, n, M, N, GROUP)


@triton.jit(do_not_specialize=["M"])
def many_rows(
    x, weight, scale, bias, step, y, M, N, K,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y [M, N] in tiles of BLOCK_M x BLOCK_N. Neighbouring programs share their weights."""
    sum_type: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    tiles = tl.cdiv(M, BLOCK_M)
    m = (tl.program_id(0) % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_rows = x + m.to(tl.int64)[None, :] * K + k[:, None]
    w_rows = weight + n.to(tl.int64)[:, None] * K + k[None, :]
    sums = tl.zeros((BLOCK_N, BLOCK_M), tl.float32 if GROUP else sum_type)
    for start in range(0, K, BLOCK_K):
        a = tl.load(x_rows + start, mask=(m[None, :] < M) & (start + k[:, None] < K), other=0)
        w = tl.load(w_rows + start, mask=(n[:, None] < N) & (start + k[None, :] < K), other=0)
        if GROUP:
            s = tl.load(scale + n.to(tl.int64) * (K // GROUP) + start // GROUP, mask=n < N, other=0)
            sums += tl.dot(_weights_as(w, a.dtype), a, input_precision="ieee", out_dtype=sum_type).to(tl.float32) * s[:, None]
        else:
            sums = tl.dot(_weights_as(w, a.dtype), a, sums, input_precision="ieee", out_dtype=sum_type)
    _finish(tl.trans(sums), scale, bias, step, y, m, n, M, N, GROUP)


@triton.jit
def _finish(sums, scale, bias, step, y, m, n, M, N, GROUP: tl.constexpr):
    """Scale, add the bias, cast and store sums [BLOCK_M, BLOCK_N]."""
    out = sums.to(tl.float32)
    if GROUP == 0:
        out *= tl.load(scale + n, mask=n < N, other=0)[None, :]
    if step is not None:
        out *= tl.load(step + m, mask=m < M, other=0)[:, None]
    if bias is not None:
        out += tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    to = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(to, out.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))


@triton.jit
def quantize_rows(x, integers, step, K, BLOCK_K: tl.constexpr):
    """One row [K] as int8 and its step: ``x ~ integers * step``. A row with an inf or a NaN gets the step NaN."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    largest = 0.0
    for start in range(0, K, BLOCK_K):
        values = tl.load(x + row * K + start + k, mask=start + k < K, other=0).to(tl.float32)
        # tl.max passes NaNs over; a sum does not, and 0 * inf is one.
        largest = tl.maximum(largest, tl.max(tl.abs(values), 0) + tl.sum(values * 0.0, 0), propagate_nan=tl.PropagateNan.ALL)
    # The smallest normal number keeps a row of zeros from dividing by zero.
    one = tl.div_rn(tl.maximum(largest, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL), 127.0)
    tl.store(step + row, one)
    for start in range(0, K, BLOCK_K):
        values = tl.load(x + row * K + start + k, mask=start + k < K, other=0).to(tl.float32)
        # Adding 1.5 * 2^23 leaves no bit for a fraction: it rounds to the nearest integer, ties to even.
        rounded = (tl.div_rn(values, one) + 12582912.0) - 12582912.0
        tl.store(integers + row * K + start + k, tl.where(one == one, rounded, 0.0).to(tl.int8), mask=start + k < K)
