"""Scheme of int4 weights: groups of inputs; compressed-tensors on disk where they are symmetric."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.handle import Handle
from patchkit.int4.clipped import clipped
from patchkit.int4.error_feedback import influence_of, moments, with_feedback
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

    def adopted(self, weight: Any, module: Any) -> Int4Weight | None:
        """The weight of a layer that compressed-tensors has unpacked, if its values are levels of this form; None for any other."""
        return None if _compat.unpacked_weight(module) is None else self._kept(weight, transposed=False)

    def quantize(self, weight: torch.Tensor, transposed: bool = False, squares: torch.Tensor | None = None) -> Int4Weight:
        kept = self._kept(weight, transposed)
        if kept is not None:
            return kept
        importance = importance_of(squares, weight.shape[0 if transposed else 1], self.group, weight.device)
        return self._rounded(weight, transposed, functools.partial(clipped, importance=importance, symmetric=self.symmetric))

    def fit_layers(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        squares = mean_squares(target, {layer.name: layer.module for layer in linears}, calibration)
        for layer in linears:
            layer.squares = squares.get(layer.name)
        if self.fit == "gptq":
            self._feed_back(target, linears, calibration)

    def run_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: Experts, bias: torch.Tensor | None) -> torch.Tensor:
        return int4_experts_linear(x, experts, weights.values, weights.scale, bias, self.group, weights.activation)

    def saved(self, linear: Layer, model: Any) -> Callable[..., None] | None:
        if getattr(model, "hf_quantizer", None) is not None:  # a checkpoint has the form of one library
            return None
        return save_packed if isinstance(linear.weight, Int4Weight) and is_packable(linear.weight, self.symmetric) else None

    def make_saveable(self, model: Any, handle: Handle, linears: Sequence[Layer]) -> None:
        packed = [linear.name for linear in linears if self.saved(linear, model) is not None]
        if packed:
            handle.set_shared(model.config, "quantization_config", configuration(model, packed, self.group))

    def _feed_back(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        """Set the weights of all layers that are called on the calibration text."""
        left = []
        for layer in linears:
            kept = self._kept(layer.original, layer.transposed)
            if kept is not None:
                layer.weight = kept
            elif bool(layer.original.isfinite().all()):
                left.append(layer)
        for layer, moment in moments(target, left, calibration_ids(target, calibration)):
            if moment is not None and bool(moment.isfinite().all()):
                importance = importance_of(moment.diagonal(), len(moment), self.group, moment.device)
                influence = influence_of(F.pad(moment, (0, -len(moment) % self.group) * 2))
                fit = functools.partial(with_feedback, importance=importance, influence=influence, symmetric=self.symmetric)
                layer.weight = self._rounded(layer.original, layer.transposed, fit)

    def _kept(self, weight: torch.Tensor, transposed: bool) -> Int4Weight | None:
        """The weight by its own levels; None if it is not on such grids."""
        found = []
        for part, unit in self._parts(weight, transposed):
            own = on_a_grid(part, self.symmetric)
            if own is None:
                return None
            found.append((own, unit))
        return self._packed(weight, transposed, found)

    def _rounded(self, weight: torch.Tensor, transposed: bool, fit: Callable[[torch.Tensor], Grouped]) -> Int4Weight:
        return self._packed(weight, transposed, ((fit(part), unit) for part, unit in self._parts(weight, transposed)))

    def _parts(self, weight: torch.Tensor, transposed: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Groups [n, G, group] and units [n] of some outputs after the other."""
        rows = weight.detach().T if transposed else weight.detach()
        height = max(1, _AT_ONCE // rows.shape[1] // OUTPUTS) * OUTPUTS
        for part in rows.split(height):
            wide = part.float()
            unit = unit_of(wide)
            yield groups_of(wide, unit, self.group), unit

    def _packed(self, weight: torch.Tensor, transposed: bool, found: Iterable[tuple[Grouped, torch.Tensor]]) -> Int4Weight:
        """The weight of these levels and units, some outputs after the other."""
        packed, units = [], []
        for part, unit in found:
            packed.append(pack(part.levels.to(torch.uint8).flatten(1), part.scale, part.minimum, self.group))
            units.append(unit)
        inputs = weight.shape[0 if transposed else 1]
        return Int4Weight(torch.cat(packed), torch.cat(units), weight.dtype, transposed=transposed, inputs=inputs, group=self.group)
