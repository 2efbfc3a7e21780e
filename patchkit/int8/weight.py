"""`Int8Weight`, a weight of 8 bits with one scale per output, which runs as the op `int8_linear`."""

from __future__ import annotations

import torch

from patchkit.int8.levels import scales_of
from patchkit.kernels.int8_linear import int8_linear
from patchkit.quantised.weight import QuantisedWeight


class Int8Weight(QuantisedWeight):
    """A weight [N, K] (or its transpose) as int8 values with one fp32 scale per output channel.

    Attributes:
        qdata: int8 [N, K].
        scale: fp32 [N].
    """

    kind = "int8"
    op = int8_linear

    @staticmethod
    def __new__(
        cls,
        qdata: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype,
        activation: str = "float",
        transposed: bool = False,
    ) -> Int8Weight:
        made: Int8Weight = cls._made(qdata.shape, qdata, scale, dtype, activation, transposed)
        return made

    @classmethod
    def quantize(cls, weight: torch.Tensor, activation: str = "float", transposed: bool = False) -> Int8Weight:
        """Round ``weight`` [N, K] (transposed: [K, N]) to int8: symmetric, ``scale = max|row| / 127``, ties to even.

        Rows that were rounded to 8 bits before keep their integers: `patchkit.int8.levels`.
        """
        rows = (weight.detach().T if transposed else weight.detach()).float()
        scale = scales_of(rows, weight.dtype)
        qdata = (rows / scale[:, None]).round_().to(torch.int8).contiguous()
        return cls(qdata, scale, weight.dtype, activation, transposed)

    def rows(self) -> torch.Tensor:
        return self.qdata.float() * self.scale[:, None]

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return int8_linear(x, self.qdata, self.scale, bias, self.activation)
