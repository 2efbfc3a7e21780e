"""int4_linear: a linear layer over int4 weights in groups of inputs, each with its own scale."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels import native
from patchkit.kernels.int4_layout import GROUPS, OUTPUTS, is_symmetric, pack, values
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

# Bytes of an activation, by which the kernel multiplies one after the other.
_PLANES = {"int8": 1, "float": 2}
# What the kernel returns without rows: the instructions that it was compiled for.
_PLAIN = 1
# Rows up to which plain C++ beats the product of torch, which uses vector instructions.
_MOST_PLAIN_ROWS = 2


@op
def int4_linear(
    x: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor, bias: torch.Tensor | None = None, group: int = 32, activation: str = "float"
) -> torch.Tensor:
    """Linear layer over int4 weights, ``y = x W^T + bias``, with a scale and a minimum for each group of inputs; activations as they
    are, or rounded to int8 per group.

    ``W[n, k] = unit[n] * (level[n, k] * scale[n, k // group] + minimum[n, k // group])``, levels from 0 to 15; without minima
    ``unit[n] * (level[n, k] - 8) * scale[n, k // group]``. Summed in fp32, returned in x's dtype.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: [ceil(N / 16), ceil(K / group), B] uint8: levels, and scales and minima in fp16, as
            `patchkit.kernels.int4_layout.pack` packs them.
        unit: [N] fp32, a power of two for each output, which brings its scales into fp16's range.
        bias: [N] in x's dtype, or None.
        group: 32 or 128.
        activation: "float" leaves x as it is (weight-only quantisation). "int8" first rounds every group of every token to
            ``round(x / s) * s`` with ``s = max|x| / 127``, the maximum being that of the group: dynamic quantisation, symmetric.

    A row with an inf or a NaN gives NaNs or infs. There is no gradient.
    """
    rows = x.float()
    k = rows.shape[-1]
    if -(-k // group) != weight.shape[1]:
        raise RuntimeError(f"x {[*x.shape]} has {k} input features, and the weight has {weight.shape[1]} groups of {group}")
    if activation == "int8":
        grouped = torch.nn.functional.pad(rows, (0, -k % group)).unflatten(-1, (-1, group))
        step = grouped.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rows = ((grouped / step).round() * step).flatten(-2)[..., :k]
    y = rows @ values(weight, unit, k, group).T
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


@int4_linear.fake
def _(x: Any, weight: Any, unit: Any, bias: Any = None, group: int = 32, activation: str = "float") -> Any:
    return x.new_empty(*x.shape[:-1], unit.shape[0])


@int4_linear.direct
def _(x: Any, weight: Any, unit: Any, bias: Any = None, group: int = 32, activation: str = "float") -> bool:
    return bool(x.is_cpu and x.dtype is torch.float32 and x.numel() > 0)


@int4_linear.definition
def _(x: Any, weight: Any, unit: Any, bias: Any = None, group: int = 32, activation: str = "float") -> torch.Tensor:
    """Each level, scale and minimum is looked up by its address."""
    n, k = len(unit), x.shape[-1]
    out, into = torch.arange(n, device=x.device)[:, None], torch.arange(k, device=x.device)[None]
    within = into % group
    heading = weight.shape[2] - 8 * group

    def byte(offset: torch.Tensor) -> torch.Tensor:
        return weight[out // 16, into // group, offset + 0 * out].long()

    def half(start: int) -> torch.Tensor:
        bits = byte(start + 2 * (out % 16)) + 256 * byte(start + 2 * (out % 16) + 1)
        return bits.to(torch.uint16).view(torch.float16).double()

    level = (byte(heading + within // 8 * 64 + out % 16 * 4 + within % 4) // 16 ** (within % 8 // 4) % 16).double()
    weights = (level - 8) * half(0) if heading == 32 else level * half(0) + half(32)
    rows = x.double().clone()
    if activation == "int8":
        for first in range(0, k, group):
            part = rows[..., first : first + group]
            # Step and quotients are fp32 by definition: a tie that is rounded to the other side would be off by a whole level.
            step = (part.abs().amax(-1, keepdim=True) / 127).float().double()
            part.copy_(torch.where(step > 0, (part / step).float().round().double() * step, 0.0))
    y = rows @ (weights * unit.double()[:, None]).T
    return y if bias is None else y + bias.double()


@int4_linear.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        shape: tuple[int, ...], n: int, dtype: torch.dtype, activation: str, bias: bool, group: int = 32, symmetric: bool = False
    ) -> tuple[Any, ...]:
        k = shape[-1]
        x = torch.randn(shape, generator=generator).to(dtype)
        levels = torch.randint(16, (n, k), generator=generator, dtype=torch.uint8)
        scale = torch.rand(n, -(-k // group), generator=generator) + 0.1
        minimum = -8 * scale + torch.randn(scale.shape, generator=generator) / 4
        packed = pack(levels, scale.half(), None if symmetric else minimum.half(), group)
        unit = 2.0 ** torch.randint(-8, -4, (n,), generator=generator)
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        return x.to(device), packed.to(device), unit.to(device), None if b is None else b.to(device), group, activation

    for activation in _PLANES:
        yield f"one row, {activation}", make((1, 256), 96, torch.float32, activation, bias=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in _PLANES:
            for number, (shape, n) in enumerate(
                (((1, 1, 64), 64), ((5, 67), 33), ((2, 3, 129), 1), ((1, 1), 7), ((16, 160), 48), ((9, 96), 17), ((0, 32), 16))
            ):
                for group in GROUPS:
                    symmetric = number % 2 == (group == 32)
                    form = f"groups of {group}{', symmetric' if symmetric else ''}"
                    made = make(shape, n, dtype, activation, n % 2 == 1, group, symmetric)
                    yield f"{tuple(shape)} x {n}, {dtype}, {activation}, {form}", made
    # Rows of very different size, a row of zeros, and products whose sum without the scales is far beyond what fp16 holds.
    x, *rest = make((4, 1280), 24, torch.float16, "float", bias=False)
    yield "rows from 0 to 6e4", (x * torch.tensor([[1e-4], [0.0], [1.0], [1e4]], device=device), *rest)


# -- CPU -------------------------------------------------------------------------------------------------------------------------
#
# "float" activations become 16-bit integers per token and group, as two bytes: 256 times finer than "int8", and 2e-5 of a group's
# largest value, far below the error of int4 weights. For one row both take the time of reading the weights.


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # Five addresses, rows, n, k, group, symmetric, planes, threads.
    return native.load("int4_linear", (ctypes.c_void_p,) * 5 + (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 4)


@functools.cache
def _level() -> int:
    return int(_kernel()[0](None, None, None, None, None, 0, 0, 0, 32, 0, 1, 1))


def _native_refuses(
    x: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor, bias: Any = None, group: int = 32, activation: str = "float"
) -> str | None:
    for tensor in (x, weight, unit) if bias is None else (x, weight, unit, bias):
        if (reason := not_on_cpu(tensor)) is not None:
            return reason
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    if group not in GROUPS:
        return f"groups of {group}: 32 and 128 are served"
    # The kernel takes the sizes of the weight for all.
    n, k = unit.shape[0], x.shape[-1]
    blocks, groups, block = weight.shape
    if blocks != -(-n // OUTPUTS) or groups != -(-k // group) or block not in (OUTPUTS * (2 + group // 2), OUTPUTS * (4 + group // 2)):
        return f"x {[*x.shape]}, weight {[*weight.shape]}, unit {[*unit.shape]}: no linear layer's shapes"
    if bias is not None and bias.shape != unit.shape:
        return f"bias {[*bias.shape]}, unit {[*unit.shape]}: no linear layer's shapes"
    if _kernel()[1] is None and _level() == _PLAIN and x.numel() > _MOST_PLAIN_ROWS * k:
        return f"{x.numel() // k} rows: without AVX-512 VNNI or AVX2 it is the faster one up to {_MOST_PLAIN_ROWS}"
    return _kernel()[1]


@int4_linear.backend("native", refuses=_native_refuses, rounding=5e-5)
def _(
    x: torch.Tensor, weight: torch.Tensor, unit: torch.Tensor, bias: torch.Tensor | None = None, group: int = 32, activation: str = "float"
) -> torch.Tensor:
    """C++ with AVX-512 VNNI or AVX2, any number of rows; a row's result does not depend on the other rows, nor on their number.

    `native/int4_linear.cpp` does quantisation, product and epilogue in one pass over the weights, and unpacks levels in registers.
    """
    n, k = unit.shape[0], x.shape[-1]
    # Named, so that they live until the call is over.
    rows, b = x.float().contiguous(), None if bias is None else bias.float().contiguous()
    # The kernel reads and writes fp32, whatever torch.set_default_dtype and the dtype of a converted model's units are.
    weight, unit = weight.contiguous(), unit.float().contiguous()
    y = rows.new_empty(*x.shape[:-1], n)
    addresses = rows.data_ptr(), weight.data_ptr(), unit.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr()
    options = group, is_symmetric(weight, group), _PLANES[activation], torch.get_num_threads()
    if _kernel()[0](*addresses, rows.numel() // k, n, k, *options):
        raise MemoryError("int4_linear: no memory for the quantised activations")
    return y if y.dtype is x.dtype else y.to(x.dtype)  # a call of `to` costs a microsecond
