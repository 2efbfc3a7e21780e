"""Check of patches that round: nothing overflows in 16 bits."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import nn

from patchkit.patch import Patch
from patchkit.prove.checks.case import Case, NotJudged
from patchkit.prove.proof import Check

# Decibels by which a module's signal-to-noise ratio on loud inputs in float16 may be below the reported one.
_MOST_WORSE = 10.0
# Largest output of the original module on loud inputs, and how often inputs are doubled or halved at most to get there.
_LOUDEST = 2.0**14
_DOUBLINGS = 15


def no_overflow(case: Case) -> None:
    """Check that modules that round keep their reported signal-to-noise ratio on loud inputs in float16."""
    for patch in case.rounding:
        case.check(patch.spec, "no overflow in 16 bits", functools.partial(_loud, case, patch))


def _loud(case: Case, patch: Patch) -> Check:
    facts = case.facts(patch)
    inputs: dict[str, tuple[Any, ...]] = {}
    hooks = [
        case.plain.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, args) and None)
        for name in facts.modules
    ]
    try:
        case.plain(input_ids=case.sequence(32))
    finally:
        for hook in hooks:
            hook.remove()
    worst = (math.inf, "")
    for name, args in inputs.items():
        decibels = _loud_snr(case.plain.get_submodule(name), case.full.get_submodule(name), args)
        margin = decibels - (facts.modules[name]["snr_db"] or 0)
        # Loudness changes the ratio of nonlinear modules (fused experts), so theirs only has to be finite.
        if getattr(case.plain.get_submodule(name), "weight", None) is None and math.isfinite(decibels):
            margin = 0.0
        worst = min(worst, (margin, name))
    if not inputs:
        raise NotJudged("none of its modules ran")
    detail = f"{len(inputs)} modules on loud inputs in float16; {worst[1]} is {worst[0]:+.1f} dB relative to its report"
    return Check(
        case.spec,
        patch.spec,
        "no overflow in 16 bits",
        "kept" if worst[0] > -_MOST_WORSE else "broken",
        max(0.0, -worst[0]),
        _MOST_WORSE,
        "dB below its report",
        detail,
    )


def _loud_snr(original: nn.Module, patched: nn.Module, args: tuple[Any, ...]) -> float:
    """Signal-to-noise ratio in dB of a patched module in float16, on inputs as loud as the original in float16 can take."""
    exact, plain, half = copy.deepcopy(original).float(), copy.deepcopy(original).half(), copy.deepcopy(patched).to(torch.float16)
    # Nonlinear modules may need less; some modules of large models are too loud for float16 without doubling.
    first = math.floor(math.log2(_LOUDEST / max(1e-30, exact(*_as(torch.float32, args)).abs().max().item())))
    for exponent in range(max(-_DOUBLINGS, min(_DOUBLINGS, first)), -_DOUBLINGS - 1, -1):
        loudest = (args[0].float() * 2.0**exponent).half(), *args[1:]
        if bool(plain(*_as(torch.float16, loudest)).abs().max() <= _LOUDEST):  # finite, and a number
            break
    else:
        raise NotJudged("the outputs of a module do not fit into float16 on any inputs")
    y, rounded = exact(*_as(torch.float32, loudest)), half(*_as(torch.float16, loudest)).float()
    noise = (y - rounded).norm()
    return 20 * math.log10(max(y.norm().item(), 1e-30) / max(noise.item(), 1e-30)) if noise.isfinite() else -math.inf


def _as(dtype: torch.dtype, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(each.to(dtype) if torch.is_tensor(each) and each.is_floating_point() else each for each in args)
