"""Times of calls and of CUDA graphs, and the bandwidth of a copy."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import torch

from evals.gpu.rows import Row
from evals.gpu.sizes import Sizes


@functools.cache
def copy_bandwidth(sizes: Sizes, device: torch.device) -> float:
    """Bytes read plus bytes written per second of a copy on the device."""
    source = torch.randint(256, (sizes.bytes_copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.bytes_copied / milliseconds(lambda: target.copy_(source), sizes, device) * 1e3


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """Replay of a CUDA graph of the kernels that a function launches."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run: Callable[[], object], sizes: Sizes, device: torch.device) -> float:
    """Median time of one call in milliseconds, by CUDA events on a GPU."""
    warm = time.perf_counter() + sizes.warmup_seconds
    run()
    synchronize(device)
    while time.perf_counter() < warm:
        run()
        synchronize(device)
    times = []
    for _ in range(sizes.repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_both(name: str, run: Callable[[], object], calls: int, sizes: Sizes, device: torch.device) -> Row:
    """``<name>_launched_ms`` and ``<name>_graph_ms`` per call of a function that makes ``calls`` calls; no graph on a CPU."""
    return {
        f"{name}_launched_ms": milliseconds(run, sizes, device) / calls,
        f"{name}_graph_ms": milliseconds(captured(run), sizes, device) / calls if device.type == "cuda" else None,
    }
