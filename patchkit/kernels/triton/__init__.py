"""Triton kernels, one file per op. No file here is imported unless a backend "triton" runs: Triton is optional.

A file declares what its kernels are compiled for in a function ``signatures() -> Iterator[Signature]``. A test finds it by folder and
compiles every one for compute capability 8.0 and 9.0, which needs no GPU, so a new kernel touches no list.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import Any, NamedTuple

import torch


def refusal(x: torch.Tensor) -> str | None:
    """Why Triton cannot run here on floating-point tensors like x, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if x.device.type != "cuda" and not interpreted:
        return f"{x.device.type} tensors, and TRITON_INTERPRET=1 is not set"
    # To find a module takes longer than to launch a kernel.
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted and x.dtype == torch.bfloat16:
        return "Triton's interpreter takes bfloat16 for integers"
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{x.dtype}: fp16, bf16 and fp32 are served"
    return None


class Launch(NamedTuple):
    """``kernel[grid](*arguments, **constants, **options)``. Constants are tl.constexpr parameters, options are of the compiler."""

    kernel: Any
    grid: tuple[int, ...]
    constants: dict[str, Any]
    options: dict[str, Any]


class Signature(NamedTuple):
    """A kernel as it is compiled for arguments of given types.

    Attributes:
        label: what the case is, for a test's name.
        launch: its grid plays no part.
        types: Triton's name of every other parameter's type, {"x": "*fp16", "K": "i32"}; "none" where None is passed.
        aligned: pointers and sizes are multiples of 16, as those of all usual models are: loads of 16 bytes.
    """

    label: str
    launch: Launch
    types: dict[str, str]
    aligned: bool = True
