"""Functions of torch that `patchkit.kernels` needs; nothing here needs transformers."""

from __future__ import annotations

import torch

from patchkit._compat.declared import Names

RELIED_ON: Names = {"torch:_int_mm": None, "torch.cpu:_is_vnni_supported": (), "torch._C:_len_torch_dispatch_stack": None}


def int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product [M, N] int32 of int8 matrices [M, K] and [K, N] (``torch._int_mm``). On a CPU it is wrong for K = 1 (torch 2.13)."""
    return torch._int_mm(left, right)


def has_vnni() -> bool:
    """Whether the processor has AVX-512 VNNI, products of bytes that are summed in int32 (``torch.cpu._is_vnni_supported``)."""
    return bool(torch.cpu._is_vnni_supported())


def is_dispatch_watched() -> bool:
    """Whether a mode of torch's dispatcher is active (``TorchDispatchMode``), which wants to see every op that runs."""
    return bool(torch._C._len_torch_dispatch_stack())
