"""Definition of modules with weights of eight bits, and what the definitions of all modules with rounded weights share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.definitions.forward import NoDefinition, hooks_removed, logits_at

if TYPE_CHECKING:
    from patchkit.record import PatchReport


# Steps by which an input of int8 layers, in units of its rounding, may differ between two computations: some last bits of float32.
_UNSURE_STEPS = 127 * 2.0**-21


# The same where inputs are not rounded, as a share of a row's largest: kernels take them as integers of 16 bits (docs/kernels.md).
_UNSURE_SHARE = 2.0**-16

# In which scales of checkpoints are, and in which their weights were dequantised.
_SCALE_DTYPES = (torch.bfloat16, torch.float16)

# (name of the module, weight, dimension along which it is multiplied) -> the rounded weight
_RoundWeight = Callable[[str, torch.Tensor, int], torch.Tensor]
# (inputs [..., K], generator of uncertainty or None) -> the rounded inputs
_RoundInput = Callable[[torch.Tensor, "torch.Generator | None"], torch.Tensor]


def rounded_logits(
    model: Any, ids: torch.Tensor, facts: PatchReport, *, at: torch.Tensor | None = None, unsure: torch.Generator | None = None
) -> torch.Tensor:
    """Logits with the weights of the patch's modules rounded to 255 levels per output channel; in mode "dynamic" inputs too, per token.

    Channels that were rounded to 8 bits before keep their levels.

    Args:
        unsure: if given, the inputs of these modules are moved at random by as much as two computations of them may differ. The effect on
            logits is the noise that no implementation can avoid.

    Raises:
        NoDefinition: fused experts that round their inputs, which is not visible from outside; or weights that were loaded in int8.
    """

    def round_weight(name: str, weight: torch.Tensor, across: int) -> torch.Tensor:
        return _rounded_once(weight, across)

    return logits_over(model, ids, facts, round_weight, lambda x, unsure: rounded(x, -1, unsure), at, unsure)


def logits_over(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    round_weight: _RoundWeight,
    round_input: _RoundInput,
    at: torch.Tensor | None,
    unsure: torch.Generator | None,
) -> torch.Tensor:
    """Logits with the weights of the patch's modules rounded by one function; in mode "dynamic" inputs too, by another.

    Raises:
        NoDefinition: as `rounded_logits`.
    """
    originals: list[tuple[nn.Module, str, Any]] = []
    hooks = []
    try:
        for name, about in facts.modules.items():
            module = model.get_submodule(name)
            dynamic, linear = about["mode"] == "dynamic", getattr(module, "weight", None) is not None
            if dynamic and not linear:
                raise NoDefinition(f"{name} rounds activations between its experts' layers, which cannot be done from outside")
            for key, parameter in list(_compat.parameters_of(module).items()):
                if parameter is None or parameter.ndim < 2 or (key != "weight" and parameter.ndim != 3):
                    continue
                if type(parameter) is not nn.Parameter:
                    raise NoDefinition(f"{name} had a weight of {type(parameter).__name__} before it was patched")
                across = parameter.ndim - 1
                if isinstance(module, _compat.Conv1D) or getattr(module, "is_transposed", False):
                    across -= 1
                originals.append((module, key, parameter))
                _compat.parameters_of(module)[key] = nn.Parameter(round_weight(name, parameter.detach(), across), requires_grad=False)
            if dynamic or unsure is not None:
                hooks.append(module.register_forward_pre_hook(functools.partial(_input_rounded, round_input if dynamic else None, unsure)))
        with hooks_removed(hooks):
            return logits_at(model, ids, at)
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, parameter in originals:
            _compat.parameters_of(module)[key] = parameter


def _input_rounded(
    round_input: _RoundInput | None, unsure: torch.Generator | None, module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The arguments with the first one rounded if there is a function for it, and moved at random by its uncertainty."""
    x = args[0]
    if round_input is not None:
        return round_input(x, unsure), *args[1:]
    moved = x.float() + _UNSURE_SHARE * x.float().abs().amax(-1, keepdim=True) * _noise(x, unsure)
    return moved.to(x.dtype), *args[1:]


def rounded(x: torch.Tensor, across: int, unsure: torch.Generator | None = None) -> torch.Tensor:
    """x on the 255 levels from -127 to 127 times max|x| / 127, the maximum being taken along one dimension; computed in float32."""
    step = x.float().abs().amax(across, keepdim=True).clamp(min=1e-30) / 127
    steps = x.float() / step
    if unsure is not None:
        steps = steps + _UNSURE_STEPS * _noise(x, unsure)
    return (steps.round() * step).to(x.dtype)


def _rounded_once(weight: torch.Tensor, across: int) -> torch.Tensor:
    """``weight`` rounded along one dimension, or there on the levels -128 to 127 of a step by which it was rounded before."""
    result, open_ = rounded(weight, across), torch.ones_like(weight.select(across, 0), dtype=torch.bool).unsqueeze(across)
    most = weight.float().abs().amax(across, keepdim=True).clamp(min=1e-30)
    for step in (most / 127, most / 128, (most / 127).bfloat16().float(), (most / 127).half().float()):
        level = (weight.float() / step).round()
        values = [(level * step).to(kind).to(weight.dtype) for kind in (weight.dtype, *_SCALE_DTYPES)]
        exact = [(value == weight).all(across, keepdim=True) for value in values]
        fits = open_ & torch.stack(exact).any(0) & (level <= 127).all(across, keepdim=True)
        result, open_ = torch.where(fits, (level * step).to(weight.dtype), result), open_ & ~fits
    return result


def _noise(x: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Uniform random numbers from -1 to 1, of x's shape."""
    return 2 * torch.rand(x.shape, generator=generator).to(x.device) - 1
