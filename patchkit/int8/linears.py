"""Linear layers whose weights are quantised, and checkpoints of their models."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchkit import _compat
from patchkit.handle import Handle
from patchkit.int8.calibration import decibels
from patchkit.int8.saving import save_plain, save_torchao
from patchkit.int8.weight import Int8Weight


class Int8Linear:
    """One `nn.Linear` or `Conv1D` and its int8 weight.

    Attributes:
        transposed: the module is a `Conv1D`, which keeps its weight as [in, out].
        is_head: the module is the model's LM head.
        shared: the original weight is the embeddings' too, which stay as they are.
        fixed: the kind of activation of a weight that torchao has quantised; None for other weights.
    """

    def __init__(self, name: str, module: Any, is_head: bool = False, shared: bool = False) -> None:
        self.name, self.module, self.is_head, self.shared = name, module, is_head, shared
        self.transposed = isinstance(module, _compat.Conv1D)
        self.original: nn.Parameter = module.weight
        adopted = _compat.torchao_int8(module.weight)
        self.fixed = None if adopted is None else adopted[2]
        self._adopted = adopted

    @functools.cached_property
    def weight(self) -> Int8Weight:
        """The int8 weight, made at the first use."""
        if self._adopted is not None:
            values, scale, activation = self._adopted
            return Int8Weight(values, scale, self.original.dtype, activation)
        return Int8Weight.quantize(self.original, transposed=self.transposed)

    @property
    def activation(self) -> str:
        """The kind of activation, "float" or "int8"; see the op `int8_linear`."""
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
        """Outputs [..., out] over the int8 weight for x [..., in]."""
        return self.weight.linear(x, self.module.bias)

    def signal_to_noise(self, inputs: tuple[Any, ...] | None) -> float | None:
        """Signal-to-noise ratio in dB of the outputs on ``inputs``; None without inputs."""
        if inputs is None:
            return None
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        return decibels(self.run_original(x), self.run(x))

    def changed_choices(self, inputs: tuple[Any, ...]) -> tuple[int, int]:
        """Of the rows of ``inputs``, the number whose largest output is another one over the int8 weight, and the number of rows."""
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        return int((self.run_original(x).argmax(-1) != self.run(x).argmax(-1)).sum()), len(x)

    def install(self, handle: Handle, originals: list[tuple[nn.Module, str, nn.Parameter]], keep_original: bool) -> None:
        """Put the int8 weight into the module, and append the replaced parameter to ``originals``."""
        handle.record.describe(self.name, weight_bytes=self.weight.stored_bytes(), original_bytes=self.original.nbytes)
        originals.append((self.module, "weight", self.original))
        _compat.parameters_of(self.module)["weight"] = nn.Parameter(self.weight, requires_grad=False)
        saved: Any = save_torchao
        if self.transposed or self.is_head:
            # Of a shared weight a checkpoint has one copy, which is the embeddings'.
            saved = functools.partial(save_plain, "weight", self.original if keep_original or self.shared else None, self.weight)
        handle.state_dict_hook(self.module, saved)


def make_saveable(model: Any, handle: Handle, linears: list[Int8Linear]) -> None:
    """Let `save_pretrained` write a torchao checkpoint, and `from_pretrained` find its configuration in it."""
    if not linears or getattr(model, "hf_quantizer", None) is not None or not _compat.has_torchao():
        return
    dynamic = {block.name: block.activation == "int8" for block in linears}
    quantization, quantizer = _compat.torchao_quantizer(dynamic)
    handle.set_shared(model.config, "quantization_config", quantization)
    handle.set_attribute(model, "hf_quantizer", quantizer)
    handle.set_attribute(model, "is_quantized", True)
