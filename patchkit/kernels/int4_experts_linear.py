"""int4_experts_linear: `int4_linear` with another weight for every row, for the experts of a mixture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patchkit.kernels.by_expert import attach, defined_by, row_by_row
from patchkit.kernels.int4_layout import pack
from patchkit.kernels.int4_linear import int4_linear
from patchkit.kernels.op import op


@op
def int4_experts_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    unit: torch.Tensor,
    bias: torch.Tensor | None = None,
    group: int = 32,
    activation: str = "float",
) -> torch.Tensor:
    """`int4_linear` with another weight for every row: ``y[s] = int4_linear(x[s], weights[e], unit[e], bias[e])`` with ``e = experts[s]``.

    Args:
        x: [S, K] fp32, fp16 or bf16.
        experts: [S] int64; a row whose expert is not in 0 .. E-1 gives zeros.
        weights: E packed weights of N outputs and K inputs.
        unit: [E, N] fp32.
        bias: [E, N] in x's dtype, or None.
        group, activation: described at `int4_linear`.
    """
    return row_by_row(int4_linear.reference, x, experts, weights, unit, bias, group, activation)


@int4_experts_linear.fake
def _(x: Any, experts: Any, weights: Any, unit: Any, bias: Any = None, group: int = 32, activation: str = "float") -> Any:
    return x.new_empty(x.shape[0], unit.shape[1])


@int4_experts_linear.definition
def _(x: Any, experts: Any, weights: Any, unit: Any, bias: Any = None, group: int = 32, activation: str = "float") -> torch.Tensor:
    return defined_by(int4_linear, x, experts, weights, unit, bias, group, activation)


@int4_experts_linear.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for activation in ("float", "int8"):
            for rows, e, n, k, group in ((4, 8, 96, 64, 32), (1, 1, 7, 33, 32), (19, 3, 33, 130, 128)):
                x = torch.randn(rows, k, generator=generator).to(device, dtype)
                experts = torch.randint(0, e, (rows,), generator=generator)
                experts[rows // 2] = e if rows > 4 else 0  # a row without an expert here
                scales = (torch.rand(e, n, -(-k // group), generator=generator) + 0.1).half()
                levels = torch.randint(16, (e, n, k), generator=generator, dtype=torch.uint8)
                weights = [pack(levels[i], scales[i], -7 * scales[i], group).to(device) for i in range(e)]
                unit = (2.0 ** torch.randint(-6, -3, (e, n), generator=generator)).to(device)
                bias = torch.randn(e, n, generator=generator).to(device, dtype) if rows > 1 else None
                yield f"{rows} rows, {e} experts, {dtype}, {activation}", (x, experts.to(device), weights, unit, bias, group, activation)


attach(int4_experts_linear, int4_linear)
