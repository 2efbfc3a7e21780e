"""`FreedWeight`, the place of a weight whose values are kept elsewhere."""

from __future__ import annotations

from typing import Any

import torch

from patchkit._compat.tensor_subclass import TO_COPY, wrapper_tensor
from patchkit.errors import KernelError

_aten = torch.ops.aten


class FreedWeight(torch.Tensor):
    """A placeholder for a weight whose values are kept elsewhere: shape, dtype and device, and no memory. Any use raises KernelError."""

    @staticmethod
    def __new__(cls, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FreedWeight:
        return wrapper_tensor(cls, shape, dtype, device)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"FreedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> FreedWeight:
        memo[id(self)] = copied = _freed_again(self.shape, self.dtype, self.device)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _freed_again, (self.shape, self.dtype, self.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default, _aten.clone.default, TO_COPY):
            return cls(args[0].shape, kwargs.get("dtype") or args[0].dtype, kwargs.get("device") or args[0].device)
        raise KernelError(f"{func} is not available on a weight that runs quantised elsewhere: unpatch_model(model) first")


def _freed_again(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FreedWeight:
    return torch.nn.Parameter(FreedWeight(shape, dtype, device), requires_grad=False)  # type: ignore[return-value]
