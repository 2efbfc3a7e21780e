"""Triton kernels, one file per op. No file here is imported unless a backend "triton" runs: Triton is optional.

The function ``signatures() -> Iterator[Signature]`` of a file yields the argument types that its kernels are compiled for. A test finds
it by folder and compiles every one for compute capability 8.0 and 9.0, which needs no GPU, so a new kernel touches no list.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch

# Triton's names of the dtypes that the kernels take.
FLOAT_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@functools.cache  # to find a module takes longer than to launch a kernel
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def refusal(x: torch.Tensor) -> str | None:
    """Reason why Triton cannot run here on floating-point tensors of x's device and dtype, or None."""
    if not _installed():
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not interpreted:
        return f"{x.device.type} tensors, and TRITON_INTERPRET=1 is not set"
    if interpreted and x.dtype == torch.bfloat16:
        return "Triton's interpreter takes bfloat16 for integers"
    if x.dtype not in FLOAT_TYPES:
        return f"{x.dtype}: fp16, bf16 and fp32 are served"
    return None


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **constants, **options)``. Constants are tl.constexpr parameters, options are of the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Signature(NamedTuple):
    """One kernel with the argument types that it is compiled for.

    Attributes:
        label: name of the case, for a test.
        launch: kernel, constants and options; the grid is not used.
        types: Triton's name of the type of every parameter that is not a constant, {"x": "*fp16", "K": "i32"}; "none" for None.
        aligned: pointers and sizes are multiples of 16, as those of all usual models are: loads of 16 bytes.
    """

    label: str
    launch: Launch
    types: dict[str, str]
    aligned: bool = True
