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
from patchkit.int4.importance import importance_of, mean_squares
from patchkit.int4.saving import configuration, is_packable, save_packed
from patchkit.int4.weight import Int4Weight
from patchkit.kernels.int4_experts_linear import int4_experts_linear
from patchkit.kernels.int4_layout import OUTPUTS, pack
from patchkit.kernels.int4_linear import int4_linear
from patchkit.kernels.op import Op
from patchkit.quantised.calibration import calibration_ids
from patchkit.quantised.scheme import Experts, Layer

Fit = Literal["clip", "gptq"]
# Weights that are rounded at once: some hundred megabytes of intermediate results.
_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Int4Scheme:
    """Weights of 4 bits with a scale, and a minimum unless they are symmetric, for each group of inputs.

    A weight whose groups all are on such grids already keeps its values, whatever `fit` is.

    Attributes:
        group: inputs of a group, 32 or 128.
        symmetric: levels stand for -8 to 7 times the scale.
        fit: "clip", the width of the grid with the smallest squared error, in which inputs that are large count more; "gptq", with error
            feedback on calibration text for linear layers, and "clip" for experts.
    """

    kind: ClassVar[str] = "int4"
    op: ClassVar[Op] = int4_linear

    group: int = 32
    symmetric: bool = False
    fit: Fit = "clip"

    @property
    def follows(self) -> bool:
        return self.fit != "gptq"

    def adopted(self, weight: Any) -> None:
        """Return None: weights of other libraries in 4 bits are taken over once they are dense, by their values."""

    def quantize(self, weight: torch.Tensor, transposed: bool = False, squares: torch.Tensor | None = None) -> Int4Weight:
        rows = (weight.detach().T if transposed else weight.detach()).float()
        unit, importance = unit_of(rows), importance_of(squares, rows.shape[1], self.group, rows.device)
        height = max(1, _AT_ONCE // rows.shape[1] // OUTPUTS) * OUTPUTS
        parts = [groups_of(part, its_unit, self.group) for part, its_unit in zip(rows.split(height), unit.split(height), strict=True)]
        found = self._own_levels(parts) or [clipped(part, importance, self.symmetric) for part in parts]
        return self._packed(found, unit, rows.shape[1], weight.dtype, transposed)

    def fit_layers(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        squares = mean_squares(target, {layer.name: layer.module for layer in linears}, calibration)
        for layer in linears:
            layer.squares = squares.get(layer.name)
        if self.fit == "gptq":
            for layer, moment in moments(target, linears, calibration_ids(target, calibration)):
                if moment is not None and bool(moment.isfinite().all()):
                    layer.weight = self._fed_back(layer, moment)

    def run_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: Experts, bias: torch.Tensor | None) -> torch.Tensor:
        return int4_experts_linear(x, experts, weights.values, weights.scale, bias, self.group, weights.activation)

    def saved(self, linear: Layer) -> Callable[..., None] | None:
        return save_packed if isinstance(linear.weight, Int4Weight) and is_packable(linear.weight, self.symmetric) else None

    def make_saveable(self, model: Any, handle: Handle, linears: Sequence[Layer]) -> None:
        packed = [linear.name for linear in linears if self.saved(linear) is not None]
        if packed and getattr(model, "hf_quantizer", None) is None:
            handle.set_shared(model.config, "quantization_config", configuration(model, packed, self.group))

    def _own_levels(self, parts: list[torch.Tensor]) -> list[Grouped]:
        """Levels of a weight that is on such grids already; none for other weights."""
        found: list[Grouped] = []
        for part in parts:
            own = on_a_grid(part, self.symmetric)
            if own is None:
                return []
            found.append(own)
        return found

    def _fed_back(self, layer: Layer, moment: torch.Tensor) -> Int4Weight:
        weight = layer.original.detach()
        rows = (weight.T if layer.transposed else weight).float()
        unit, k = unit_of(rows), rows.shape[1]
        groups, importance = groups_of(rows, unit, self.group), importance_of(moment.diagonal(), k, self.group, rows.device)
        found = on_a_grid(groups, self.symmetric)
        if found is None and bool(groups.isfinite().all()):
            found = with_feedback(groups, importance, F.pad(moment, (0, -k % self.group) * 2), self.symmetric)
        if found is None:
            found = clipped(groups, importance, self.symmetric)
        return self._packed([found], unit, k, weight.dtype, layer.transposed)

    def _packed(self, found: list[Grouped], unit: torch.Tensor, k: int, dtype: torch.dtype, transposed: bool) -> Int4Weight:
        packed = [pack(part.levels.to(torch.uint8).flatten(1), part.scale, part.minimum, self.group) for part in found]
        return Int4Weight(torch.cat(packed), unit, dtype, transposed=transposed, inputs=k, group=self.group)
