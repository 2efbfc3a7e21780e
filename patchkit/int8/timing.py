"""The choice between weight-only and dynamic products, by timing both for each shape of weights."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from patchkit.int8.experts import Int8Experts
from patchkit.int8.linears import Int8Linear

ACTIVATIONS = {"weight_only": "float", "dynamic": "int8"}

# A weight-only product that costs at most this much more than a dynamic one is preferred: it is 5 to 8 dB more accurate.
_PREFER_WEIGHT_ONLY = 1.30

_TIMED_MODULES = 8

TIMED_ROWS = (1, 256)

# By the first weight of every shape, then the number of threads. So views of one model (those that draft, prove or tune) make the same
# choice, and no choice depends on other models of the process.
_found_faster: Any = WeakIdKeyDictionary()


def choose_activations(mode: str, blocks: list[Int8Linear | Int8Experts]) -> None:
    """Set the kind of activation of all blocks by the option ``mode``; "auto" times both kinds for every signature."""
    for signature in dict.fromkeys(block.signature for block in blocks):
        alike = [block for block in blocks if block.signature == signature]
        if mode == "auto":
            known = _found_faster.setdefault(alike[0].held, {})
            threads = torch.get_num_threads()
            if threads not in known:
                known[threads] = _faster(alike)
            activation = known[threads]
        else:
            activation = ACTIVATIONS[mode]
        for block in alike:
            block.activation = block.fixed if mode == "auto" and block.fixed else activation


def _faster(alike: list[Int8Linear | Int8Experts]) -> str:
    timed = alike[:_TIMED_MODULES]
    cost = {}
    for activation in ("float", "int8"):
        for block in timed:
            block.activation = activation
        cost[activation] = milliseconds(timed, 1)[1]
    return "float" if cost["float"] <= _PREFER_WEIGHT_ONLY * cost["int8"] else "int8"


@torch.no_grad()
def milliseconds(blocks: list[Int8Linear | Int8Experts], rows: int) -> tuple[float, float]:
    """Milliseconds in all blocks for ``rows`` tokens, original and converted, from interleaved passes over a few blocks of every shape.

    The fastest pass counts. One pass goes over different weights, as a token does, so that they come from memory and not from a cache.
    """
    before = after = 0.0
    for signature in dict.fromkeys(block.signature for block in blocks):
        alike = [block for block in blocks if block.signature == signature]
        timed = alike[: _TIMED_MODULES if rows == 1 else 1]
        inputs = timed[0].sample(rows)
        passes: list[list[float]] = [[], []]
        for repetition in range(7 if rows == 1 else 3):
            for times, run in zip(passes, ("run_original", "run"), strict=True):
                _synchronize(inputs[0])
                started = time.perf_counter()
                for block in timed:
                    getattr(block, run)(*inputs)
                _synchronize(inputs[0])
                if repetition:
                    times.append(time.perf_counter() - started)
        # The fastest of several passes, since other work on the machine only adds time.
        before += min(passes[0]) / len(timed) * len(alike) * 1e3
        after += min(passes[1]) / len(timed) * len(alike) * 1e3
    return before, after


def _synchronize(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
