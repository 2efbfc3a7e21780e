"""Quantised weights beside the floating-point ones, which stay in their modules and can be trained: the option ``view=True``.

Reinforcement learning generates most of the time, and trains the weights that it generates with. A forward that only generates runs over
the quantised weights, any other one over those that are trained.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.derived import Derived, keep_fresh_on_request, refresh_if_due
from patchkit.errors import StaleWeights
from patchkit.handle import Handle
from patchkit.quantised.linears import QuantisedLinear
from patchkit.quantised.requantize import overwrite
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.weight import QuantisedWeight
from patchkit.record import Warnings
from patchkit.training_mode import is_in_force, off_policy

_FORWARDS = (nn.Linear.forward, _compat.Conv1D.forward)


def view_obstacle(module: Any, scheme: Scheme) -> str | None:
    """The reason why a linear layer cannot run over quantised weights that it does not hold; None if it can."""
    if scheme.adopted(module.weight, module) is not None:
        return "another library has quantised its weight, so that there is none to train: leave view out"
    if type(module).forward not in _FORWARDS:
        return f"it is a {type(module).__name__}, which may compute something else"
    return "it has its own forward (accelerate's hooks, say)" if "forward" in vars(module) else None


@dataclass(eq=False)
class Switch:
    """Tells the layers of one model over which weights the present forward runs.

    Attributes:
        on: over the quantised ones.
    """

    on: bool = False


@dataclass(eq=False)
class WeightView:
    """The quantised weight of one layer, beside its own.

    Attributes:
        source: the layer's own weight; another one that the layer is given later is not this patch's.
        weight: made of it.
        squares: mean square [K] of each input on the calibration text; None if the scheme does not use it.
        serves: the layer holds ``source``.
    """

    source: nn.Parameter
    weight: QuantisedWeight
    squares: torch.Tensor | None = None
    serves: bool = True

    def renew(self, scheme: Scheme) -> bool:
        """Quantise the layer's weight again, in place where its form is the same. Returns whether anything differs from before.

        Raises:
            StaleWeights: the weight is no longer in memory.
        """
        if self.source.device.type == "meta":
            raise StaleWeights(
                f"a weight that {scheme.kind} has a view of is no longer in memory: load it and call patchkit.refresh(model), "
                "or unpatch_model(model) and patch it again"
            )
        new = scheme.quantize(self.source.detach(), self.weight.transposed, self.squares)
        if (new.shape, new.dtype, new.device) == (self.weight.shape, self.weight.dtype, self.weight.device):
            return overwrite(self.weight, new)
        new.activation = self.weight.activation
        self.weight = new
        return True


@dataclass(eq=False)
class Views:
    """State of the hook of one patched model."""

    layers: list[tuple[nn.Module, WeightView]]
    switch: Switch
    derived: Derived
    name: str
    hits: Counter[str]
    warnings: Warnings


def install_views(target: Target, handle: Handle, name: str, linears: Sequence[QuantisedLinear], scheme: Scheme) -> None:
    """Let each layer run over its quantised weight where that is in force, and renew that when the layer's own has changed.

    Args:
        name: of the patch, for warnings.
    """
    switch = Switch()
    layers: list[tuple[nn.Module, WeightView]] = []
    for block in linears:
        handle.record.describe(block.name, weight_bytes=block.weight.stored_bytes(), original_bytes=block.original.nbytes)
        view = WeightView(block.original, block.weight, block.squares)
        handle.set_attribute(block.module, "forward", functools.partial(_forward, switch, view, block.module))
        layers.append((block.module, view))
    decoder = _compat.decoder_of(target.model)
    renew = functools.partial(_renew, [view for _, view in layers], scheme, handle.record.hits)
    derived = Derived([view.source for _, view in layers], renew)
    views = Views(layers, switch, derived, name, handle.record.hits, handle.record.warnings)
    keep_fresh_on_request(handle, derived)
    handle.pre_hook(decoder, functools.partial(_before_forward, views), with_kwargs=True)


def _forward(switch: Switch, view: WeightView, module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """The forward of a linear layer: over the quantised weight where that is in force, else the layer's own."""
    if switch.on and view.serves and not torch.is_grad_enabled():
        return view.weight.linear(input, module.bias)  # type: ignore[arg-type]
    own: torch.Tensor = type(module).forward(module, input)
    return own


def _before_forward(views: Views, decoder: nn.Module, args: Any, kwargs: Any) -> None:
    """Choose the weights of this forward. A pre-hook of the decoder."""
    if torch.compiler.is_compiling():  # of the user's own: the choice of the last forward would be compiled in
        views.switch.on = False
        return
    named = _compat.by_name(decoder, args, kwargs) if args else kwargs
    cache = _compat.cache_given(named)
    views.switch.on = not torch.is_grad_enabled() and is_in_force(decoder, cache)
    if not views.switch.on:
        views.hits["forwards over the trained weights"] += 1
        return
    views.hits["forwards"] += 1
    refresh_if_due(views.derived, decoder, args, kwargs)
    if decoder.training and not cache.get_seq_length():
        views.warnings.add(off_policy(views.name))
    for module, view in views.layers:
        view.serves = _compat.parameters_of(module).get("weight") is view.source
    replaced = sum(not view.serves for _, view in views.layers)
    if replaced:
        views.warnings.add(f"{replaced} of {len(views.layers)} layers were given another weight after they were patched, and use that")


def _renew(views: Sequence[WeightView], scheme: Scheme, hits: Counter[str]) -> bool:
    with torch.no_grad():
        differs = any([view.renew(scheme) for view in views])
    hits["requantised"] += differs
    return differs
