"""`QuantisedWeight`, which replaces a linear layer's floating-point weight and runs as one op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from patchkit._compat.tensor_subclass import TO_COPY, is_parameter, without_torch_function, wrapper_tensor
from patchkit.errors import KernelError
from patchkit.kernels.op import Op

_aten = torch.ops.aten
_TRANSPOSITIONS = (torch.Tensor.T.__get__, torch.Tensor.t, torch.t)  # type: ignore[attr-defined]
_PRODUCTS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)


class QuantisedWeight(torch.Tensor):
    """A weight [N, K] (or its transpose) as integers with scales.

    Other code sees a tensor of the original's shape, dtype and device, without a gradient. `F.linear` with it, products of the form
    ``x @ w.T``, and `torch.addmm` with its transpose (transformers' `Conv1D`) run `linear`. It can be moved, copied and pickled.
    Any other use raises KernelError, because it would be slow or wrong without notice.

    A subclass sets `kind` and `op`, and defines `linear`, `rows` and, if it has options of its own, `own_options`.

    Attributes:
        kind: name of the form, such as "int8".
        op: that `linear` calls.
        qdata: the integers.
        scale: fp32 [N].
        activation: "float" or "int8": the option of that name of the op.
        transposed: the shape that other code sees is [K, N].
    """

    kind: ClassVar[str]
    op: ClassVar[Op]
    # What compiled code was traced for is settled when a weight is made; see `_compat.kept_guards`.
    fixed_context = True

    qdata: torch.Tensor
    scale: torch.Tensor
    activation: str
    transposed: bool

    @classmethod
    def _made(
        cls, shape: torch.Size, qdata: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, activation: str, transposed: bool
    ) -> Any:
        """A weight of this class whose rows are of ``shape`` [N, K]."""
        made = wrapper_tensor(cls, torch.Size(reversed(shape)) if transposed else shape, dtype, scale.device)
        made.qdata, made.scale, made.activation, made.transposed = qdata, scale, activation, transposed
        return made

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return ``x @ W.T + bias`` [..., N] for x [..., K]; bias is [N] or None."""
        raise NotImplementedError

    def rows(self) -> torch.Tensor:
        """Return the rounded weight [N, K] in fp32."""
        raise NotImplementedError

    def own_options(self) -> tuple[Any, ...]:
        """Arguments of the class behind ``transposed``."""
        return ()

    def dequantize(self) -> torch.Tensor:
        """Return the rounded weight as an ordinary tensor of this shape and dtype."""
        rows = self.rows().to(self.dtype)
        return rows.T.contiguous() if self.transposed else rows

    def stored_bytes(self) -> int:
        """Bytes of the integers and the scales."""
        return self.qdata.nbytes + self.scale.nbytes

    def _options(self) -> tuple[Any, ...]:
        return self.activation, self.transposed, *self.own_options()

    def _rebuilt(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Any:
        device = device or self.device
        made: Any = type(self)
        return made(self.qdata.to(device), self.scale.to(device), dtype or self.dtype, *self._options())

    def _turned(self) -> Any:
        made: Any = type(self)
        return made(self.qdata, self.scale, self.dtype, self.activation, not self.transposed, *self.own_options())

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        # With the form of the op, so that torch traces again where that changes.
        return ["qdata", "scale"], (self.op.form, self.dtype, *self._options())

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, outer_size: Any, outer_stride: Any) -> Any:
        made: Any = cls
        return made(inner["qdata"], inner["scale"], *context[1:])

    def _stable_hash_for_caching(self) -> str:
        """A string of everything that compiled code may depend on, for torch's cache on disk."""
        form = self.op.form  # which op the traced code calls
        return str((type(self).__name__, tuple(self.shape), self.dtype, self.device, *self._options(), form))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        about = f"shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, activation={self.activation!r}"
        return f"{type(self).__name__}({about})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = _unpickled(*self.__reduce_ex__(4)[1])
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (type(self), is_parameter(self), self.qdata.clone(), self.scale.clone(), self.dtype, *self._options())

    @classmethod
    def __torch_function__(cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        weight = args[-1]
        if not kwargs and isinstance(weight, QuantisedWeight):
            if func in _TRANSPOSITIONS:
                return weight._turned()
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
            f"{func} is not available on an {cls.kind} weight: only the linear layer that holds it may use it. "
            "Leave this module out with modules=, or unpatch_model(model) first"
        )


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, QuantisedWeight) or weight.transposed:
        kind = next(each.kind for each in (weight, input, bias) if isinstance(each, QuantisedWeight))
        raise KernelError(f"an {kind} weight can only be the weight of a linear layer, not its input or bias")
    return weight.linear(input, bias)


def _unpickled(cls: Any, is_parameter: bool, *parts: Any) -> Any:
    made = cls(*parts)
    return torch.nn.Parameter(made, requires_grad=False) if is_parameter else made
