"""gemv: linear layers of few rows at the speed of memory, on a CPU.

A step of decoding multiplies each weight matrix with one row, or with a few where drafts are verified or texts are decoded in a batch.
Such a product takes the time of reading the weights. The libraries that torch calls are made for many rows: on a processor without AMX
they read the weights of one row at a half of what memory gives, and take twice that time for two rows.

The op `gemv` reads the weights once for up to 16 rows (6 in 16 bits). More rows, calls under autograd, autocast or a transform (vmap, jvp,
`torch.jit.trace`), and tensors that are not dense or do not fit each other go to the module's own forward.

Each output is one sum in a fixed order, whatever else is in the batch. So a token's linear layers give the same bits alone, in a batch,
and among drafts that are verified.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit._compat.products import is_plain, is_transformed
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.handle import Handle
from patchkit.kernels.gemv import gemv, most_rows, why_not
from patchkit.module_timing import patterns_of, report_speed, selected
from patchkit.patch import Facts, Patch, Stage, register_patch


@register_patch("gemv")
@dataclass(frozen=True)
class Gemv(Patch):
    """Linear layers of few rows in one pass over their weights, on a CPU, in fp32, bf16 or fp16.

    Args:
        modules: names of the linear layers, or patterns such as "*.down_proj"; None for all, the head included.
        strict: raise `SlowerPatch` where one row is slower than in the original; False warns.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.KERNELS
    exact = True
    acts = ("products of few rows",)
    facts = Facts(
        goal="faster decoding and verification of drafts on a CPU, with the weights as they are",
        cost="CPU with AVX-512 or AVX2 only; patching times itself, and warns where it is slower. Prompts run as before",
        source="a product of few rows is bound by memory",
    )

    modules: tuple[str, ...] | None = None
    strict: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", patterns_of(self.modules))
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict={self.strict!r}: give True or False")

    def check(self, target: Target) -> None:
        self._linears(target)

    def apply(self, target: Target, handle: Handle) -> None:
        linears, left = self._linears(target)
        if (reason := gemv.load_direct()) is not None:
            left["calls of gemv without Python"] = reason
        report_speed("gemv", [_Timed(module) for module in linears.values()], handle.record, self.strict, (1,), "leave the patch out")
        for module in linears.values():
            handle.set_attribute(module, "forward", functools.partial(_forward, handle.record.hits, module))
        handle.record.changed("linear layers", len(linears))
        for what, why in left.items():
            handle.record.left_alone(what, why)

    def _linears(self, target: Target) -> tuple[dict[str, nn.Linear], dict[str, str]]:
        """The linear layers by name, and why others are left alone; every refusal is raised here."""
        model, name = target.model, type(target.model).__name__
        if model.device.type != "cpu":
            raise UnsupportedModel(f"{name} is on {model.device.type}, and gemv is for a CPU: leave it out, or move the model first")
        found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        wanted = selected(self.modules, list(found), "linear layer", name)
        linears: dict[str, nn.Linear] = {}
        left: dict[str, str] = {}
        for path in [path for path in found if path in wanted]:
            weight = found[path].weight
            row = torch.empty(1, weight.shape[-1], dtype=weight.dtype, device=weight.device) if type(weight) is nn.Parameter else None
            why = f"its weight is a {type(weight).__name__}" if row is None else why_not(row, weight)
            if type(found[path]) is not nn.Linear:
                why = f"it is a {type(found[path]).__name__}, which may compute something else"
            elif "forward" in vars(found[path]):
                why = f"it has its own forward ({'compressed-tensors' if _compat.is_wrapped(found[path]) else 'accelerate'} sets one, say)"
            if why is None:
                linears[path] = found[path]
            else:
                left[path] = why
        if not linears:
            reasons = "; ".join(f"{what}: {why}" for what, why in list(left.items())[:3]) or "it has no nn.Linear"
            raise NothingMatched(f"{name} has no linear layer that gemv can serve ({reasons}){_compat.loaded_by(model)}")
        return linears, left


@dataclass(frozen=True)
class _Timed:
    """A linear layer as `report_speed` times it."""

    module: nn.Linear

    @property
    def signature(self) -> Any:
        return self.module.weight.shape, self.module.weight.dtype

    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        weight = self.module.weight
        return (torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype),)

    def run_original(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.module.weight, self.module.bias)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return gemv(x, self.module.weight, self.module.bias)


def _forward(hits: Counter[str], module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """`nn.Linear.forward`, through `gemv` where there are few rows."""
    weight: Any = module.weight
    bias: Any = module.bias
    compiling = torch.compiler.is_compiling()
    served = (compiling or _is_plain_call(input, weight)) and _is_served(input, weight, bias)
    if not compiling:  # a count that changes would be its own graph for every call
        hits["products of few rows" if served else "products left to torch"] += 1
    return gemv(input, weight, bias) if served else nn.Linear.forward(module, input)


def _is_plain_call(x: torch.Tensor, weight: Any) -> bool:
    return type(weight) is nn.Parameter and not is_transformed() and is_plain(x) and is_plain(weight)


def _is_served(x: torch.Tensor, weight: Any, bias: Any) -> bool:
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or type(weight) is not nn.Parameter or x.dtype is not weight.dtype:
        return False
    if not (x.ndim and weight.ndim == 2 and x.shape[-1] == weight.shape[1] and (bias is None or _fits(bias, weight))):
        return False  # torch says what is wrong with them
    few = 0 < x.numel() <= most_rows(weight.dtype) * weight.shape[1]
    return few and x.is_cpu and weight.is_cpu and weight.is_contiguous()


def _fits(bias: torch.Tensor, weight: torch.Tensor) -> bool:
    return bias.shape == weight.shape[:1] and bias.dtype is weight.dtype and bias.device == weight.device
