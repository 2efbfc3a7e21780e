"""Threads with which the model of a server computes on a CPU: `choose_threads`.

A server does other work beside the model's: for every token it makes an event of JSON, and sends it. Threads of OpenMP wait for each other
at the end of every product, so where one core is taken by that work, all wait. A small model then has more tokens per second with one
thread less.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from patchkit import _compat

_logger = logging.getLogger("patchkit")

# What the server does for one token of one text, in seconds: reading, events and system calls, measured on an AMD EPYC (Zen 4).
_EVENT = 0.4e-3
# A model whose round takes so many seconds needs every core, and should not be timed for long at each start.
_LARGE = 0.25
_TIMES = 4


def choose_threads(seconds_with: Callable[[int], float], threads: int, rows: int) -> int:
    """Return ``threads`` or one less, whichever gives the shorter rounds beside the work of the server.

    Args:
        seconds_with: times a round with a number of threads.
        threads: those that there are.
        rows: texts of a round.
    """
    if threads < 2:
        return threads
    seconds_with(threads)  # the first one warms up
    every = seconds_with(threads)
    if every > _LARGE:
        return threads
    fewer = seconds_with(threads - 1)
    for _ in range(_TIMES):
        every, fewer = min(every, seconds_with(threads)), min(fewer, seconds_with(threads - 1))
    return threads - 1 if fewer - every < rows * _EVENT else threads


def measured_threads(model: Any, rows: int) -> int:
    """Return the number of threads for ``model`` in a server of ``rows`` texts, by timing it; torch keeps its own number.

    What is timed is a forward of one token for each text, without keys: the products and the calls of a round.
    """
    threads = torch.get_num_threads()
    # Compiled steps cost what no eager forward tells.
    if model.device.type != "cpu" or _compat.COMPILED_CALL in vars(_compat.decoder_of(model)):
        return threads
    ids = torch.zeros(rows, 1, dtype=torch.int64)

    def seconds_with(count: int) -> float:
        torch.set_num_threads(count)
        started = time.perf_counter()
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        return time.perf_counter() - started

    try:
        chosen = choose_threads(seconds_with, threads, rows)
    finally:
        torch.set_num_threads(threads)
    _logger.info("patchkit: the model computes with %d of %d threads", chosen, threads)
    return chosen
