"""Linear layers whose weights are quantised."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchkit import _compat
from patchkit.handle import Handle
from patchkit.quantised.calibration import decibels
from patchkit.quantised.saving import Original, save_plain
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.weight import QuantisedWeight


class QuantisedLinear:
    """One `nn.Linear` or `Conv1D` and its quantised weight.

    Attributes:
        transposed: the module is a `Conv1D`, which keeps its weight as [in, out].
        is_head: the module is the model's LM head.
        shared: the original weight is the embeddings' too, which stay as they are.
        squares: mean square [K] of each input on the calibration text, if the scheme uses it.
        fixed: the kind of activation of a weight that another library has quantised; None for other weights.
    """

    def __init__(self, name: str, module: Any, scheme: Scheme, is_head: bool = False, shared: bool = False) -> None:
        self.name, self.module, self.scheme, self.is_head, self.shared = name, module, scheme, is_head, shared
        self.transposed = isinstance(module, _compat.Conv1D)
        self.original: nn.Parameter = module.weight
        self.squares: torch.Tensor | None = None
        self._weight = scheme.adopted(module.weight, module)
        self.fixed = None if self._weight is None else self._weight.activation

    @property
    def weight(self) -> QuantisedWeight:
        """The quantised weight, made at the first use."""
        if self._weight is None:
            self._weight = self.scheme.quantize(self.original, self.transposed, self.squares)
        return self._weight

    @weight.setter
    def weight(self, value: QuantisedWeight) -> None:
        self._weight = value

    @property
    def activation(self) -> str:
        """The kind of activation, "float" or "int8"; see the scheme's op."""
        return self.weight.activation

    @activation.setter
    def activation(self, value: str) -> None:
        self.weight.activation = value

    @property
    def held(self) -> nn.Parameter:
        """A parameter that another view of the model holds too, by which timings are shared."""
        return self.original

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original weight, [out, in] or, transposed, [in, out]."""
        return tuple(self.original.shape)

    @property
    def signature(self) -> Any:
        """A hashable value; blocks with equal signatures take the same time."""
        return self.shape, self.original.dtype, self.original.device, self.transposed

    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        """One random input [rows, in]."""
        inputs = self.shape[0] if self.transposed else self.shape[1]
        return (torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).to(self.original.device, self.original.dtype),)

    def run_original(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out] of the unpatched layer for x [..., in]."""
        bias = self.module.bias
        if not self.transposed:
            return F.linear(x, self.original, bias)
        return x @ self.original if bias is None else torch.addmm(bias, x.reshape(-1, x.shape[-1]), self.original)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Outputs [..., out] over the quantised weight for x [..., in]."""
        return self.weight.linear(x, self.module.bias)

    def signal_to_noise(self, inputs: tuple[Any, ...] | None) -> float | None:
        """Signal-to-noise ratio in dB of the outputs on ``inputs``; None without inputs."""
        if inputs is None:
            return None
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        return decibels(self.run_original(x), self.run(x))

    def changed_choices(self, inputs: tuple[Any, ...]) -> tuple[int, int]:
        """Of the rows of ``inputs``, the number whose largest output is another one over the quantised weight, and the number of rows."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        return int((self.run_original(x).argmax(-1) != self.run(x).argmax(-1)).sum()), len(x)

    def install(self, handle: Handle, originals: list[Original], keep_original: bool) -> None:
        """Put the quantised weight into the module, and append the replaced parameter to ``originals``."""
        handle.record.describe(self.name, weight_bytes=self.weight.stored_bytes(), original_bytes=self.original.nbytes)
        originals.append(Original(self.module, "weight", self.original, self.squares))
        _compat.parameters_of(self.module)["weight"] = nn.Parameter(self.weight, requires_grad=False)
        if _compat.is_wrapped(self.module):
            # Its own forward, over which compressed-tensors has put one that writes to the weight.
            handle.set_attribute(self.module, "forward", functools.partial(nn.Linear.forward, self.module))
        saved = None if self.transposed or self.is_head else self.scheme.saved(self, handle.model)
        if saved is None:
            # Of a shared weight a checkpoint has one copy, which is the embeddings'.
            saved = functools.partial(save_plain, "weight", self.original if keep_original or self.shared else None, self.weight)
        handle.state_dict_hook(self.module, saved)
