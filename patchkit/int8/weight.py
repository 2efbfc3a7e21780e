"""`Int8Weight`, which replaces a linear layer's floating-point weight and runs as the op `int8_linear`; and the weight of freed memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from patchkit._compat.tensor_subclass import TO_COPY, is_parameter, without_torch_function, wrapper_tensor
from patchkit.errors import KernelError
from patchkit.kernels.int8_linear import int8_linear

_aten = torch.ops.aten
_TRANSPOSITIONS = (torch.Tensor.T.__get__, torch.Tensor.t, torch.t)  # type: ignore[attr-defined]
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class Int8Weight(torch.Tensor):
    """A weight [N, K] (or its transpose) as int8 values with one fp32 scale per output channel.

    Other code sees a tensor of the original's shape, dtype and device, without a gradient. `F.linear` with it, products of the form
    ``x @ w.T``, and `torch.addmm` with its transpose (transformers' `Conv1D`) run `int8_linear`. It can be moved, copied and pickled.
    Any other use raises KernelError, because it would be slow or wrong without notice.

    Attributes:
        qdata: int8 [N, K].
        scale: fp32 [N].
        activation: the option of that name of `int8_linear`.
        transposed: the shape that other code sees is [K, N].
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    activation: str
    transposed: bool
    # What compiled code was traced for is settled when a weight is made; see `_compat.kept_guards`.
    fixed_context = True

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        activation: str = "float",
        transposed: bool = False,
    ) -> Int8Weight:
        shape = torch.Size(reversed(qdata.shape)) if transposed else qdata.shape
        made = wrapper_tensor(cls, shape, dtype, scale.device)
        made.qdata, made.scale, made.activation, made.transposed = qdata, scale, activation, transposed
        return made

    @classmethod
    def quantize(cls, weight: torch.Tensor, activation: str = "float", transposed: bool = False) -> Int8Weight:
        """Round ``weight`` [N, K] (transposed: [K, N]) to int8: symmetric, ``scale = max|row| / 127``, ties to even."""
        rows = (weight.detach().T if transposed else weight.detach()).float()
        scale = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        qdata = (rows / scale[:, None]).round_().to(torch.int8).contiguous()
        return cls(qdata, scale, weight.dtype, activation, transposed)

    def dequantize(self) -> torch.Tensor:
        """Return the rounded weight as an ordinary tensor of this shape and dtype."""
        rows = (self.qdata.float() * self.scale[:, None]).to(self.dtype)
        return rows.T.contiguous() if self.transposed else rows

    def stored_bytes(self) -> int:
        """Bytes of the int8 values and the scales."""
        return self.qdata.nbytes + self.scale.nbytes

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``x @ W.T + bias`` [..., N] for x [..., K]; bias is [N] or None."""
        return int8_linear(x, self.qdata, self.scale, bias, self.activation)

    def _rebuilt(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Int8Weight:
        device = device or self.device
        return Int8Weight(self.qdata.to(device), self.scale.to(device), dtype or self.dtype, self.activation, self.transposed)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["qdata", "scale"], (self.dtype, self.activation, self.transposed)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any) -> Int8Weight:
        return Int8Weight(inner["qdata"], inner["scale"], *context)

    def _stable_hash_for_caching(self) -> str:
        """A string of everything that compiled code may depend on, for torch's cache on disk."""
        form = int8_linear.form  # which op the traced code calls
        return str((type(self).__name__, tuple(self.shape), self.dtype, self.device, self.activation, self.transposed, form))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, activation={self.activation!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Weight:
        copied = _unpickled(*self.__reduce_ex__(4)[1])
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = self.qdata.clone(), self.scale.clone(), self.dtype, self.activation, self.transposed, is_parameter(self)
        return _unpickled, parts

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        weight = args[-1]
        if not kwargs and isinstance(weight, Int8Weight):
            if func in _TRANSPOSITIONS:
                return Int8Weight(weight.qdata, weight.scale, weight.dtype, weight.activation, not weight.transposed)
            if func in _PRODUCTS and len(args) == 2 and weight.transposed:
                return weight.linear(args[0], None)
            if func is torch.addmm and len(args) == 3 and weight.transposed:
                return weight.linear(args[1], args[0])
        with without_torch_function():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default, _aten.clone.default):
            return args[0]._rebuilt()
        if func is TO_COPY:
            return args[0]._rebuilt(kwargs.get("device"), kwargs.get("dtype"))
        raise KernelError(
            f"{func} is not available on an int8 weight: only the linear layer that holds it may use it. "
            "Leave this module out with modules=, or unpatch_model(model) first"
        )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, Int8Weight) or weight.transposed:
        raise KernelError("an int8 weight can only be the weight of a linear layer, not its input or bias")
    return weight.linear(input, bias)


def _unpickled(
    qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, activation: str, transposed: bool, is_parameter: bool
) -> Int8Weight:
    made = Int8Weight(qdata, scale, dtype, activation, transposed)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made  # type: ignore[return-value]


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
        raise KernelError(f"{func} is not available on a weight that runs as int8 elsewhere: unpatch_model(model) first")


def _freed_again(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> FreedWeight:
    return torch.nn.Parameter(FreedWeight(shape, dtype, device), requires_grad=False)  # type: ignore[return-value]
