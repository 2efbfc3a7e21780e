"""Functions of torch that `patchkit.kernels` needs; nothing here needs transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from patchkit._compat.declared import Names

RELIED_ON: Names = {
    "torch:_int_mm": None,
    "torch.cpu:_is_vnni_supported": (),
    "torch._C:_len_torch_dispatch_stack": None,
    "torch._C:_functorch.peek_interpreter_stack": None,
    "torch._C:_is_tracing": None,
    "torch.autograd.forward_ad:_current_level": None,
    "os:environ._data": None,
}

# The dict behind `os.environ`, by `os.environ.encodekey`: what traced code asks of it is checked again at every call, as for any dict,
# while `os.environ` itself is read once.
ENVIRONMENT: dict[Any, Any] = os.environ._data  # type: ignore[attr-defined]


def int8_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The product [M, N] int32 of int8 matrices [M, K] and [K, N] (``torch._int_mm``). On a CPU it is wrong for K = 1 (torch 2.13)."""
    return torch._int_mm(left, right)


def has_vnni() -> bool:
    """Whether the processor has AVX-512 VNNI, products of bytes that are summed in int32 (``torch.cpu._is_vnni_supported``)."""
    return bool(torch.cpu._is_vnni_supported())


def is_dispatch_watched() -> bool:
    """Whether something wants to see every op that runs: a mode of torch's dispatcher (``TorchDispatchMode``), or a transform."""
    return bool(torch._C._len_torch_dispatch_stack()) or is_transformed()


def is_transformed() -> bool:
    """Whether calls are being transformed: by ``torch.func`` (vmap, jvp), forward-mode differentiation, or ``torch.jit.trace``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0 or torch._C._is_tracing()


def has_tangent(tensor: torch.Tensor) -> bool:
    """Whether forward-mode differentiation goes through ``tensor``."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory holds its values, dense and by strides: no subclass, not sparse, not nested, no sign to be applied yet."""
    return (
        (type(tensor) is torch.Tensor or type(tensor) is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_neg()
        and not tensor.is_nested
    )
