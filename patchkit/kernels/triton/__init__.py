"""Triton kernels, one file per op. Nothing here is imported unless a backend "triton" runs: Triton is optional.

A file declares what its kernels are compiled for in a function ``signatures() -> Iterator[Signature]``. A test finds it by folder and
compiles every one for compute capability 8.0 and 9.0, which needs no GPU, so a new kernel touches no list.
"""

from __future__ import annotations

from typing import Any, NamedTuple


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
