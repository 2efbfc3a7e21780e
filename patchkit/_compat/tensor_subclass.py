"""Subclasses of torch's tensors."""

from __future__ import annotations

from typing import Any

import torch

from patchkit._compat.declared import Names

RELIED_ON: Names = {
    "torch:Tensor._make_wrapper_subclass": None,
    "torch._C:DisableTorchFunctionSubclass": None,
    "torch:ops.aten._to_copy.default": None,
}

MAY_BE_MISSING = {"_is_param": "torch sets it on the parameters made of such tensors, which is how isinstance knows them"}

# The op behind `Tensor.to`.
TO_COPY = torch.ops.aten._to_copy.default


def wrapper_tensor(cls: type[Any], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Any:
    """A tensor of the subclass ``cls`` with shape, dtype and device, and no memory (``Tensor._make_wrapper_subclass``)."""
    return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)


def is_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor of a subclass was made a parameter: `nn.Parameter` keeps its class, and marks it (``_is_param``)."""
    return hasattr(tensor, "_is_param")


def without_torch_function() -> Any:
    """Context in which functions of torch do not call ``__torch_function__`` of tensor subclasses."""
    return torch._C.DisableTorchFunctionSubclass()
