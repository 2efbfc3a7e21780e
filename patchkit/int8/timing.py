"""Which kind of activation is faster for a shape of weights, found by timing both."""

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

# By signature and number of threads: timed once in a process, so that two views of one model round alike.
# By the first weight of every shape, and the number of threads: views of one model (those that draft, prove or tune) choose alike, and
# no model goes by what another one was found to be.
_found_faster: Any = WeakIdKeyDictionary()


def choose_activations(mode: str, blocks: list[Int8Linear | Int8Experts]) -> None:
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
    """Time in all blocks for ``rows`` tokens, before and after: the least of interleaved passes over a few blocks of every shape.

    One pass goes over different weights, as a token does, so that they come from memory and not from a cache.
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
        # The least of several passes: other work on the machine only ever adds.
        before += min(passes[0]) / len(timed) * len(alike) * 1e3
        after += min(passes[1]) / len(timed) * len(alike) * 1e3
    return before, after


def _synchronize(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
