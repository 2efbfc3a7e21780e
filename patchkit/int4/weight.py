"""`Int4Weight`, a weight of 4 bits with a scale for each group of inputs, which runs as the op `int4_linear`."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.kernels.int4_layout import values
from patchkit.kernels.int4_linear import int4_linear
from patchkit.quantised.weight import QuantisedWeight


class Int4Weight(QuantisedWeight):
    """A weight [N, K] (or its transpose) as levels from 0 to 15, with a scale and a minimum in fp16 for each group of inputs.

    Attributes:
        qdata: uint8, packed by `patchkit.kernels.int4_layout.pack`.
        scale: fp32 [N], the unit of each output's scales and minima.
        inputs: K.
        group: inputs of a group.
    """

    kind = "int4"
    op = int4_linear

    inputs: int
    group: int

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        activation: str = "float",
        transposed: bool = False,
        inputs: int = 0,
        group: int = 32,
    ) -> Int4Weight:
        made: Int4Weight = cls._made(torch.Size((len(scale), inputs)), qdata, scale, dtype, activation, transposed)
        made.inputs, made.group = inputs, group
        return made

    def own_options(self) -> tuple[Any, ...]:
        return self.inputs, self.group

    def rows(self) -> torch.Tensor:
        return values(self.qdata, self.scale, self.inputs, self.group)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if x.shape[-1] != self.inputs:  # the op sees whole groups
            raise RuntimeError(f"inputs {[*x.shape]} and an int4 weight {[*self.shape]} cannot be multiplied: it has {self.inputs} inputs")
        return int4_linear(x, self.qdata, self.scale, bias, self.group, self.activation)
