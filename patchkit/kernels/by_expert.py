"""Products with another weight for every row, made of an op that multiplies all rows with one weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from patchkit.kernels.op import Op


def row_by_row(run: Callable[..., torch.Tensor], x: Any, experts: Any, weights: Any, scale: Any, bias: Any, *options: Any) -> torch.Tensor:
    """``y[s] = run(x[s], weights[e], scale[e], bias[e], *options)`` with ``e = experts[s]``; zeros for an e that there is not."""
    y: torch.Tensor = x.new_zeros(x.shape[0], scale.shape[1])
    for row, expert in enumerate(experts.tolist()):
        if 0 <= expert < len(weights):
            y[row] = run(x[row], weights[expert], scale[expert], None if bias is None else bias[expert], *options)
    return y


def defined_by(single: Op, x: Any, experts: Any, weights: Any, scale: Any, bias: Any, *options: Any) -> torch.Tensor:
    """`row_by_row` by the definition of ``single``, in float64."""
    y = torch.zeros(len(x), scale.shape[1], dtype=torch.float64, device=x.device)
    for e, weight in enumerate(weights):
        rows = experts == e
        y[rows] = single.exact(x[rows], weight, scale[e], None if bias is None else bias[e], *options)[0]
    return y


def attach(op: Op, single: Op) -> None:
    """Give ``op`` the backends of ``single``, on all rows of one expert together."""
    for name, backend in single.backends.items():

        def refuses(x: Any, experts: Any, weights: Any, scale: Any, bias: Any = None, *options: Any, backend: str = name) -> str | None:
            if x.numel() == 0:
                return "x is empty"
            return single.explain(x, weights[0], scale[0], None if bias is None else bias[0], *options)[backend]

        def run(x: Any, experts: Any, weights: Any, scale: Any, bias: Any = None, *options: Any) -> torch.Tensor:
            y: torch.Tensor = x.new_zeros(x.shape[0], scale.shape[1])
            for expert in experts.unique().tolist():
                if 0 <= expert < len(weights):
                    rows = (experts == expert).nonzero()[:, 0]
                    y[rows] = single(x[rows], weights[expert], scale[expert], None if bias is None else bias[expert], *options)
            return y

        run.__doc__ = f"`{single.name}` on all rows of one expert together."
        op.backend(name, refuses, backend.rounding)(run)
