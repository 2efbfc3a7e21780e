"""gemv: a linear layer of a few rows, in one pass over its floating-point weights."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels import native
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

# Rows up to which one pass over the weights beats what torch calls; in 16 bits that computes with instructions of its own.
_MOST_ROWS = {torch.float32: 16, torch.bfloat16: 6, torch.float16: 6}

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_INSTRUCTIONS = 2


@op
def gemv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Linear layer, ``y = x W^T + bias``, of so few rows that it takes the time of reading its weights.

    ``y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n]``, summed in fp32, returned in x's dtype.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: [N, K] in x's dtype.
        bias: [N] in x's dtype, or None.

    There is no gradient.
    """
    y = x.float() @ weight.float().T
    return (y if bias is None else y + bias.float()).to(x.dtype)


@gemv.fake
def _(x: Any, weight: Any, bias: Any = None) -> Any:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@gemv.direct
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return x.is_cpu and x.dtype is torch.float32 and 0 < x.numel() <= _MOST_ROWS[torch.float32] * weight.shape[-1]


@gemv.definition
def _(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    y = (x.double().unsqueeze(-2) * weight.double()).sum(-1)
    return y if bias is None else y + bias.double()


@gemv.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], n: int, dtype: torch.dtype, bias: bool) -> tuple[Any, ...]:
        tensors = torch.randn(shape, generator=generator), torch.randn(n, shape[-1], generator=generator) / 8
        b = torch.randn(n, generator=generator).to(device, dtype) if bias else None
        return *(each.to(device, dtype) for each in tensors), b

    yield "one row", make((1, 1, 576), 1536, torch.float32, bias=False)
    for dtype in _KINDS:
        for rows in range(1, most_rows(dtype) + 2):
            yield f"{rows} rows, {dtype}", make((rows, 200), 33, dtype, bias=rows % 2 == 1)
        for shape, n in (((1, 1), 7), ((2, 3, 67), 1), ((1, 1, 15), 4), ((0, 32), 16), ((1, 4096), 3)):
            yield f"{tuple(shape)} x {n}, {dtype}", make(shape, n, dtype, bias=True)
    x, weight, bias = make((3, 130), 40, torch.float32, bias=True)
    yield "a weight with gaps between its rows", (x, torch.cat([weight, weight], 1)[:, :130], bias)


def most_rows(dtype: torch.dtype) -> int:
    """Number of rows up to which the native kernel serves weights of this dtype; 0 for a dtype that it does not serve."""
    return _MOST_ROWS.get(dtype, 0)


def why_not(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Reason why the native kernel cannot serve these tensors, or None."""
    return _native_refuses(x, weight)


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # Four addresses, rows, n, k, kind, threads.
    function, reason = native.load("gemv", (ctypes.c_void_p,) * 4 + (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 2)
    if function is not None and function(None, None, None, None, 0, 0, 0, 0, 1) == _NO_INSTRUCTIONS:
        return None, "the processor has neither AVX-512 nor AVX2 with FMA and F16C"
    return function, reason


def _native_refuses(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> str | None:
    for tensor in (x, weight) if bias is None else (x, weight, bias):
        if (reason := not_on_cpu(tensor)) is not None:
            return reason
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        return "x or weight is not dense"
    if x.dtype not in _KINDS or weight.dtype is not x.dtype:
        return f"x is {x.dtype} and weight {weight.dtype}: both must be fp32, both fp16 or both bf16"
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    # The kernel takes the sizes of the weight for all.
    if not x.ndim or x.shape[-1] != weight.shape[-1] or weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        return f"x {[*x.shape]}, weight {[*weight.shape]}, bias {None if bias is None else [*bias.shape]}: no linear layer's shapes"
    rows = x.numel() // x.shape[-1]
    if rows > most_rows(weight.dtype):
        return f"{rows} rows: at most {most_rows(weight.dtype)} are served"
    if not weight.is_contiguous():
        return "weight is not contiguous"
    return _kernel()[1]


@gemv.backend("native", refuses=_native_refuses)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """C++ with AVX-512 or AVX2, 1 to 16 rows; a row's result does not depend on the other rows, nor on their number."""
    n, k = weight.shape
    # Named, so that they live until the call is over.
    rows, b = x.float().contiguous(), None if bias is None else bias.float().contiguous()
    y = rows.new_empty(*x.shape[:-1], n)  # on the CPU, whatever torch.set_default_device is
    addresses = rows.data_ptr(), weight.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr()
    _kernel()[0](*addresses, rows.numel() // k, n, k, _KINDS[weight.dtype], torch.get_num_threads())
    return y if y.dtype is x.dtype else y.to(x.dtype)  # a call of `to` costs a microsecond
