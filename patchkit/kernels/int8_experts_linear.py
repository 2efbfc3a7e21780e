"""int8_experts_linear: `int8_linear` with another weight for every row, for the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patchkit.kernels.by_expert import attach, defined_by, row_by_row
from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.op import op


@op
def int8_experts_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "float",
) -> torch.Tensor:
    """`int8_linear` with another weight for every row: ``y[s] = int8_linear(x[s], weights[e], scale[e], bias[e])`` with ``e = experts[s]``.

    Args:
        x: [S, K] fp32, fp16 or bf16.
        experts: [S] int64; a row whose expert is not in 0 .. E-1 gives zeros.
        weights: E tensors [N, K] int8.
        scale: [E, N] fp32.
        bias: [E, N] in x's dtype, or None.
        activation: "float" or "int8", described at `int8_linear`.
    """
    return row_by_row(int8_linear.reference, x, experts, weights, scale, bias, activation)


@int8_experts_linear.fake
def _(x: Any, experts: Any, weights: Any, scale: Any, bias: Any = None, activation: str = "float") -> Any:
    return x.new_empty(x.shape[0], scale.shape[1])


@int8_experts_linear.definition
def _(x: Any, experts: Any, weights: Any, scale: Any, bias: Any = None, activation: str = "float") -> torch.Tensor:
    return defined_by(int8_linear, x, experts, weights, scale, bias, activation)


@int8_experts_linear.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in ("float", "int8"):
            for rows, e, n, k in ((4, 8, 96, 64), (1, 1, 7, 33), (19, 3, 33, 130)):
                x = torch.randn(rows, k, generator=generator).to(device, dtype)
                experts = torch.randint(0, e, (rows,), generator=generator)
                experts[rows // 2] = e if rows > 4 else 0  # a row without an expert here
                weights = [torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8).to(device) for _ in range(e)]
                scale = (torch.rand(e, n, generator=generator) * 1e-3 + 1e-4).to(device)
                bias = torch.randn(e, n, generator=generator).to(device, dtype) if rows > 1 else None
                yield f"{rows} rows, {e} experts, {dtype}, {activation}", (x, experts.to(device), weights, scale, bias, activation)


attach(int8_experts_linear, int8_linear)
