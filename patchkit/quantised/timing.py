"""The choice between weight-only and dynamic products, by timing both for each shape of weights."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from patchkit.module_timing import TIMED_MODULES, milliseconds
from patchkit.quantised.experts import QuantisedExperts
from patchkit.quantised.linears import QuantisedLinear

ACTIVATIONS = {"weight_only": "float", "dynamic": "int8"}

# A weight-only product that costs at most this much more than a dynamic one is preferred: it is 5 to 8 dB more accurate.
_PREFER_WEIGHT_ONLY = 1.30

# By the first weight of every shape, then the scheme and the number of threads. So views of one model (those that draft, prove or
# tune) make the same choice, and no choice depends on other models of the process.
_found_faster: Any = WeakIdKeyDictionary()


def choose_activations(mode: str, blocks: list[QuantisedLinear | QuantisedExperts]) -> None:
    """Set the kind of activation of all blocks by the option ``mode``; "auto" times both kinds for every signature."""
    for signature in dict.fromkeys(block.signature for block in blocks):
        alike = [block for block in blocks if block.signature == signature]
        if mode == "auto":
            known = _found_faster.setdefault(alike[0].held, {})
            key = alike[0].scheme, torch.get_num_threads()
            if key not in known:
                known[key] = _faster(alike)
            activation = known[key]
        else:
            activation = ACTIVATIONS[mode]
        for block in alike:
            block.activation = block.fixed if mode == "auto" and block.fixed else activation


def _faster(alike: list[QuantisedLinear | QuantisedExperts]) -> str:
    timed = alike[:TIMED_MODULES]
    cost = {}
    for activation in ("float", "int8"):
        for block in timed:
            block.activation = activation
        cost[activation] = milliseconds(timed, 1)[1]
    return "float" if cost["float"] <= _PREFER_WEIGHT_ONLY * cost["int8"] else "int8"
