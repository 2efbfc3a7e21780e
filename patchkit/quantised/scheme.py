"""Scheme: how weights are rounded, the ops that run them, and their form on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from patchkit.anatomy.target import Target
from patchkit.handle import Handle
from patchkit.kernels.op import Op
from patchkit.quantised.weight import QuantisedWeight


class Layer(Protocol):
    """A linear layer, as schemes see it: `patchkit.quantised.linears.QuantisedLinear`.

    Attributes:
        squares: mean square [K] of each of its inputs on the calibration text, for schemes that use it; None if it is not known.
    """

    name: str
    module: Any
    original: nn.Parameter
    transposed: bool
    squares: torch.Tensor | None

    @property
    def activation(self) -> str: ...
    @property
    def weight(self) -> QuantisedWeight: ...
    @weight.setter
    def weight(self, value: QuantisedWeight) -> None: ...


class Experts(Protocol):
    """The weights of fused experts, as schemes see them: `patchkit.quantised.experts.ExpertWeights`."""

    values: list[torch.Tensor]
    scale: torch.Tensor
    activation: str


class Scheme(Protocol):
    """A way to quantise weights. A scheme is a frozen dataclass: copies and pickles of a patched model take it along.

    Attributes:
        kind: name of the form, such as "int8".
        op: that linear layers run.
        follows: weights depend on the originals alone, so that they can be made again from those.
    """

    @property
    def kind(self) -> str: ...
    @property
    def op(self) -> Op: ...
    @property
    def follows(self) -> bool: ...

    def adopted(self, weight: Any, module: Any) -> QuantisedWeight | None:
        """The ``weight`` of ``module`` in this form, if another library has loaded it in a form of the same values."""

    def quantize(self, weight: torch.Tensor, transposed: bool = False, squares: torch.Tensor | None = None) -> QuantisedWeight:
        """Round ``weight`` [N, K], or ``transposed`` [K, N].

        Args:
            squares: mean square [K] of each input, or None.
        """

    def fit_layers(self, target: Target, linears: Sequence[Layer], calibration: Any) -> None:
        """Set the weights of ``linears`` where they depend on more than the originals; others are rounded when first used."""

    def run_experts(self, x: torch.Tensor, experts: torch.Tensor, weights: Experts, bias: torch.Tensor | None) -> torch.Tensor:
        """Outputs [S, N] for rows x [S, K] of the ``experts`` [S] int64; bias is [E, N] or None."""

    def saved(self, linear: Layer, model: Any) -> Callable[..., None] | None:
        """The state-dict hook that writes a layer's weight in this form, or None where that has no form in checkpoints of ``model``."""

    def make_saveable(self, model: Any, handle: Handle, linears: Sequence[Layer]) -> None:
        """Let `save_pretrained` write a checkpoint of the weights of ``linears``, and `from_pretrained` find its configuration in it."""
