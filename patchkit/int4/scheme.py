"""Scheme of int4 weights: groups of inputs; compressed-tensors on disk where they are symmetric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from patchkit.anatomy.target import Target
from patchkit.handle import Handle
from patchkit.int4.clipped import clipped
from patchkit.int4.error_feedback import moments, with_feedback
from patchkit.int4.grid import on_a_grid
from patchkit.int4.grouped import Grouped, groups_of, unit_of
from patchkit.int4.half_quadratic import half_quadratic
from patchkit.int4.saving import configuration, is_packable, save_packed
from patchkit.int4.weight import Int4Weight
from patchkit.kernels.int4_experts_linear import int4_experts_linear
from patchkit.kernels.int4_linear import int4_linear
from patchkit.kernels.op import Op
from patchkit.kernels.int4_layout import OUTPUTS, pack
from patchkit.quantised.scheme import Experts, Layer

Fit = Literal["clip", "hqq", "gptq"]
# Weights that are rounded at once: some hundred megabytes of intermediate results.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Int4Scheme:
    """Weights of 4 bits with a scale, and a minimum unless they are symmetric, for each group of inputs.

    A weight whose groups all are on such grids already keeps its values, whatever `fit` is.

    Attributes:
        group: inputs of a group, 32 or 128.
        symmetric: levels stand for -8 to 7 times the scale.
        fit: "clip", the width of the grid with the smallest squared error; "hqq", half-quadratic; "gptq", with error feedback on
            calibration text for linear layers, and "clip" for experts.
    """

    kind: ClassVar[str] = "int4"
    op: ClassVar[Op] = int4_linear

    group: int = 32
    symmetric: bool = False
    fit: Fit = "clip"

    @property
    def follows(self) -> bool:
        """Weights depend on the originals alone, so that they can be made again from those."""
        return self.fit != "gptq"

    def adopted(self, weight: Any) -> None:
        """Return None: weights of other libraries in 4 bits are taken over once they are dense, by their values."""

    def quantize(self, weight: torch.Tensor, transposed: bool = False) -> Int4Weight:
        rows = (weight.detach().T if transposed else weight.detach()).float()
        return self._rounded(rows, weight.dtype, transposed, half_quadratic if self.fit == "hqq" else clipped)

    def fit_layers(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        if self.fit != "gptq":
            return
        ids = torch.as_tensor(calibration)
        ids = ids.reshape(-1, ids.shape[-1]).to(target.model.device)
        for layer, moment in moments(target, linears, ids):
            if moment is not None and bool(moment.isfinite().all()):
                layer.weight = self._fed_back(layer.original.detach(), moment, layer.transposed)

    def run_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: Experts, bias: torch.Tensor | None) -> torch.Tensor:
        return int4_experts_linear(x, experts, weights.values, weights.scale, bias, self.group, weights.activation)

    def saved(self, linear: Layer) -> Callable[..., None] | None:
        return save_packed if isinstance(linear.weight, Int4Weight) and is_packable(linear.weight, self.symmetric) else None

    def make_saveable(self, model: Any, handle: Handle, linears: Sequence[Layer]) -> None:
        packed = [linear.name for linear in linears if self.saved(linear) is not None]
        if packed and getattr(model, "hf_quantizer", None) is None:
            handle.set_shared(model.config, "quantization_config", configuration(model, packed, self.group))

    def _rounded(self, rows: torch.Tensor, dtype: torch.dtype, transposed: bool, fit: Callable[..., Grouped]) -> Int4Weight:
        """Round ``rows`` [N, K] by ``fit``, or keep their own levels if all groups have some."""
        unit = unit_of(rows)
        height = max(1, _AT_ONCE // rows.shape[1] // OUTPUTS) * OUTPUTS
        parts = [groups_of(part, its_unit, self.group) for part, its_unit in zip(rows.split(height), unit.split(height), strict=True)]
        found: list[Grouped] = []
        for part in parts:
            own = on_a_grid(part, self.symmetric)
            if own is None:
                found = [fit(part, self.symmetric) for part in parts]
                break
            found.append(own)
        return self._packed(found, unit, rows.shape[1], dtype, transposed)

    def _fed_back(self, weight: torch.Tensor, moment: torch.Tensor, transposed: bool) -> Int4Weight:
        rows = (weight.T if transposed else weight).float()
        unit, (n, k) = unit_of(rows), rows.shape
        groups = groups_of(rows, unit, self.group)
        found = on_a_grid(groups, self.symmetric)
        if found is None:
            padded = F.pad(moment, (0, -k % self.group) * 2)
            found = with_feedback(groups.view(n, -1), padded, self.group, self.symmetric) if groups.isfinite().all() else None
        if found is None:
            found = clipped(groups, self.symmetric)
        return self._packed([found], unit, k, weight.dtype, transposed)

    def _packed(self, found: list[Grouped], unit: torch.Tensor, k: int, dtype: torch.dtype, transposed: bool) -> Int4Weight:
        groups = -(-k // self.group)
        packed = [
            pack(
                part.levels.to(torch.uint8).view(-1, groups * self.group),
                part.scale.view(-1, groups),
                None if part.minimum is None else part.minimum.view(-1, groups),
                self.group,
            )
            for part in found
        ]
        return Int4Weight(torch.cat(packed), unit, dtype, transposed=transposed, inputs=k, group=self.group)
