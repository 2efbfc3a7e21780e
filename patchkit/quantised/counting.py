"""Counters of quantised products, for the report."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.handle import Handle
from patchkit.quantised.experts import QuantisedExperts
from patchkit.quantised.linears import QuantisedLinear
from patchkit.quantised.weight import QuantisedWeight
from patchkit.record import Warnings


def record_products(handle: Handle, blocks: Sequence[QuantisedLinear | QuantisedExperts], linears: str) -> None:
    """Record the number of converted blocks and their modes.

    Args:
        linears: name of the linear layers among them.
    """
    for what, kind in ((linears, QuantisedLinear), ("layers of fused experts", QuantisedExperts)):
        count = sum(isinstance(block, kind) for block in blocks)
        if count:
            handle.record.changed(what, count)
    modes = Counter(str(facts["mode"]) for facts in handle.record.modules.values())
    handle.record.note("mode", " and ".join(f"{mode} ({count})" if len(modes) > 1 else mode for mode, count in sorted(modes.items())))


def count_products(decoder: nn.Module, handle: Handle, blocks: Sequence[QuantisedLinear | QuantisedExperts]) -> None:
    """Install a hook that counts forwards, and warns where layers run over another weight."""
    modules = [block.module for block in blocks if isinstance(block, QuantisedLinear)]
    counting = functools.partial(count_forward, handle.record.hits, handle.record.warnings, modules)
    handle.pre_hook(decoder, counting, with_kwargs=True)


def count_forward(hits: Counter[str], warnings: Warnings, modules: list[nn.Module], decoder: nn.Module, args: Any, kwargs: Any) -> None:
    """Count a forward, and warn where layers run over another weight. A forward pre-hook of the decoder."""
    if torch.compiler.is_compiling():  # by the user: a count that changes would need a new graph for every call
        return
    hits["forwards"] += 1
    replaced = sum(not isinstance(_compat.parameters_of(module).get("weight"), QuantisedWeight) for module in modules)
    if replaced:
        warnings.add(f"{replaced} of {len(modules)} layers were given another weight after they were patched, and use that")
