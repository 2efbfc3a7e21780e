"""int8_linear: a linear layer over int8 weights, with the scales applied in the epilogue in fp32, so that nothing overflows."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from patchkit._compat.products import has_vnni, int8_product
from patchkit.kernels import native, triton
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

# Largest magnitude of an activation of 8 bits, and of one that is the sum of 256 * (a byte - 128) and (a byte - 128).
_LEVELS = {"int8": 127, "float": 256 * 127 + 127}
# Features whose sum fits into int32: of unsigned bytes times signed bytes (oneDNN, VNNI), and of signed bytes (tensor cores).
_MOST_FEATURES = (2**31 - 1) // (255 * 128)
_MOST_SIGNED = (2**31 - 1) // (127 * 128)
# Rows times bytes per activation up to which the native kernel, which is bound by memory, beats oneDNN, which is not.
_MOST_NATIVE_ROWS = 10


@op
def int8_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "float"
) -> torch.Tensor:
    """Linear layer over int8 weights, ``y = (x W^T) * scale + bias``, with one scale per output channel or group; activations as they are,
    or rounded to int8 per token.

    ``y[..., n] = scale[n] * sum_k x[..., k] * weight[n, k] + bias[n]``, summed and scaled in fp32, returned in x's dtype.

    Args:
        x: [..., K] fp32, fp16 or bf16.
        weight: [N, K] int8, contiguous.
        scale: [N] fp32, one per output channel; or [N, K // g] fp32, one per group of g input channels.
        bias: [N] in x's dtype, or None.
        activation: "float" leaves x as it is (weight-only quantisation). "int8" first rounds every token (row of K) to
            ``round(x / s) * s`` with ``s = max|x| / 127``: dynamic quantisation, symmetric, per token.

    A row with an inf or a NaN gives infs and NaNs. There is no gradient.
    """
    rows = x.float()
    weights = weight.float()
    step = None
    if activation == "int8":
        step = rows.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        rows = (rows / step).round()
    if scale.ndim == 2:
        weights = weights * scale.repeat_interleave(weights.shape[1] // scale.shape[1], 1)
        y = rows @ weights.T
    else:
        y = (rows @ weights.T) * scale
    if step is not None:
        y = y * step
    if bias is not None:
        y = y + bias
    return y.to(x.dtype)


@int8_linear.fake
def _(x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "float") -> Any:
    return x.new_empty(*x.shape[:-1], scale.shape[0])


@int8_linear.direct
def _(x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "float") -> bool:
    few = 0 < x.numel() <= _MOST_NATIVE_ROWS // (1 if activation == "int8" else 2) * weight.shape[-1]
    return few and x.is_cpu and x.dtype is torch.float32


@int8_linear.definition
def _(x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "float") -> torch.Tensor:
    rows = x.double()
    if activation == "int8":
        # Step and quotients are fp32 by definition: a tie that is rounded to the other side would be off by a whole level.
        step = (rows.abs().amax(-1, keepdim=True) / 127).float().double()
        rows = torch.where(step > 0, (rows / step).float().round().double() * step, 0.0)
    per_output = scale.double().reshape(len(weight), -1)
    y = rows @ (weight.double() * per_output.repeat_interleave(weight.shape[1] // per_output.shape[1], 1)).T
    return y if bias is None else y + bias.double()


@int8_linear.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], n: int, dtype: torch.dtype, activation: str, bias: bool, group: int | None = None) -> tuple[Any, ...]:
        k = shape[-1]
        x = torch.randn(shape, generator=generator).to(dtype)
        weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
        scale = torch.rand((n,) if group is None else (n, k // group), generator=generator) * 1e-3 + 1e-4
        b = torch.randn(n, generator=generator).to(dtype) if bias else None
        return x.to(device), weight.to(device), scale.to(device), None if b is None else b.to(device), activation

    for activation in ("float", "int8"):
        yield f"one row, {activation}", make((1, 256), 512, torch.float32, activation, bias=True)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in ("float", "int8"):
            for shape, n in (
                ((1, 1, 64), 64),
                ((5, 67), 33),
                ((2, 3, 129), 1),
                ((1, 1), 7),
                ((16, 1000), 48),
                ((17, 96), 130),
                ((0, 32), 16),
            ):
                yield f"{tuple(shape)} x {n}, {dtype}, {activation}", make(shape, n, dtype, activation, bias=n % 2 == 1)
        for group in (32, 128):
            yield f"groups of {group}, {dtype}", make((3, 256), 40, dtype, "float", bias=True, group=group)
    # Rows of very different size, a row of zeros, and products whose integer sum is far beyond what fp16 holds.
    x, *rest = make((4, 2560), 96, torch.float16, "float", bias=False)
    yield "rows from 0 to 6e4", (x * torch.tensor([[1e-4], [0.0], [1.0], [1e4]], device=device), *rest)


# -- CPU -------------------------------------------------------------------------------------------------------------------------
#
# Both backends multiply integers. "float" activations become 16-bit integers per token, as two rows of bytes: 256 times finer than
# "int8", 2e-5 of a row's largest value, far below the error of int8 weights. That is twice the arithmetic, which costs nothing for a
# few rows, because they are bound by reading the weights. The two give equal bits, so a token's result does not depend on the batch.


@functools.cache
def _multiplies_bytes() -> bool:
    # Without these instructions oneDNN adds pairs of products in 16 bits, which overflow.
    return torch.backends.mkldnn.is_available() and has_vnni()


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # Five addresses, rows, n, k, planes, threads.
    return native.load("int8_linear", (ctypes.c_void_p,) * 5 + (ctypes.c_int64,) * 3 + (ctypes.c_int,) * 2)


def _integers_refuse(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float") -> str | None:
    if (reason := not_on_cpu(x)) is not None:
        return reason
    if not _multiplies_bytes():
        return "the processor has no int8 dot product (AVX-512 VNNI or AMX), or torch no oneDNN"
    if scale.ndim != 1:
        return "scales per group: only one scale per output channel is served"
    if x.shape[-1] > _MOST_FEATURES:
        return f"{x.shape[-1]} input features could overflow an int32 sum: at most {_MOST_FEATURES}"
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    # The kernel takes the sizes of the weight for all. The reference says what is wrong with others.
    if not x.ndim or x.shape[-1] != weight.shape[-1] or scale.shape != weight.shape[:1] or (bias is not None and bias.shape != scale.shape):
        return f"x {[*x.shape]}, weight {[*weight.shape]}, bias {None if bias is None else [*bias.shape]}: no linear layer's shapes"
    return None


def _native_refuses(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float") -> str | None:
    reason = _integers_refuse(x, weight, scale, bias, activation)
    if reason is not None:
        return reason
    most = _MOST_NATIVE_ROWS // (1 if activation == "int8" else 2)
    if x.numel() > most * x.shape[-1]:
        return f"{x.numel() // x.shape[-1]} rows: it is the faster one up to {most}"
    return _kernel()[1]


@int8_linear.backend("native", refuses=_native_refuses, rounding=5e-5)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "float"
) -> torch.Tensor:
    """C++ with AVX-512 VNNI, up to 5 rows (10 with int8 activations).

    `native/int8_linear.cpp` does quantisation, product and epilogue in one pass over the weights.
    """
    n, k = weight.shape
    # Named, so that they live until the call is over.
    rows, b = x.float().contiguous(), None if bias is None else bias.float().contiguous()
    # The kernel reads and writes fp32, whatever torch.set_default_dtype and the dtype of a converted model's scales are.
    weight, scale = weight.contiguous(), scale.float().contiguous()
    y = rows.new_empty(*x.shape[:-1], n)
    addresses = rows.data_ptr(), weight.data_ptr(), scale.data_ptr(), None if b is None else b.data_ptr(), y.data_ptr()
    planes = 1 if activation == "int8" else 2
    if _kernel()[0](*addresses, rows.numel() // k, n, k, planes, torch.get_num_threads()):
        raise MemoryError("int8_linear: no memory for the quantised activations")
    return y if y.dtype is x.dtype else y.to(x.dtype)  # a call of `to` costs a microsecond


def _cpu_refuses(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float") -> str | None:
    if x.shape[-1] == 1:
        return "one input feature: torch._int_mm is wrong for it (torch 2.13)"
    return _integers_refuse(x, weight, scale, bias, activation)


@int8_linear.backend("cpu", refuses=_cpu_refuses, rounding=5e-5)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "float"
) -> torch.Tensor:
    """oneDNN's int8 product, any number of rows, with quantisation and epilogue in torch."""
    rows = x.reshape(-1, x.shape[-1]).float()
    step = rows.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny).div_(_LEVELS[activation])
    whole = (rows / step).round_()
    if activation == "int8":
        y = int8_product(whole.to(torch.int8), weight.T) * scale.float()
    else:
        high = ((whole + 128) / 256).floor_()  # so that both fit a signed byte
        planes = torch.cat([whole.sub_(high, alpha=256), high]).to(torch.int8)
        low, high = (int8_product(planes, weight.T) * scale.float()).chunk(2)
        y = low.add_(high, alpha=256)
    y = y.mul_(step)
    if bias is not None:
        y = y.add_(bias.float())
    return y.to(x.dtype).view(*x.shape[:-1], -1)


# -- Triton -----------------------------------------------------------------------------------------------------------------------


def _triton_refuses(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: Any = None, activation: str = "float") -> str | None:
    if (reason := triton.refusal(x)) is not None:
        return reason
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if x.numel() == 0 or weight.numel() == 0:
        return "x or weight is empty"
    if activation == "int8" and x.shape[-1] > _MOST_SIGNED:
        return f"{x.shape[-1]} input features could overflow an int32 sum: at most {_MOST_SIGNED}"
    group = 0 if scale.ndim == 1 else weight.shape[1] // scale.shape[1]
    if group % (32 if activation == "int8" else 16):
        return f"groups of {group}: a multiple of 16 is served, of 32 with int8 activations"
    return None


@int8_linear.backend("triton", refuses=_triton_refuses)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "float"
) -> torch.Tensor:
    """Weight-only for 1 to 16 rows, tiled for more, int8 times int8 for int8 activations."""
    from patchkit.kernels.triton.int8_linear import run

    return run(x, weight.contiguous(), scale, bias, activation)
