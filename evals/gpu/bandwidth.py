"""int8_linear compared with F.linear, on weights that come from memory."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F

from evals.gpu.rows import Cases, Row
from evals.gpu.sizes import DTYPES, Sizes
from evals.gpu.timing import copy_bandwidth, timed_both
from patchkit.kernels.int8_linear import int8_linear


def bandwidth(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of a copy, and of int8_linear for every number of rows, shape and dtype."""
    yield f"copy of {sizes.bytes_copied / 2**30:.3g} GiB", lambda: {"gb_per_second": copy_bandwidth(sizes, device) / 1e9}
    for rows in sizes.timed_rows:
        for n, k in sizes.shapes:
            for dtype in DTYPES:
                label = f"int8_linear, {rows} x {k} -> {n}, {dtype}"
                yield label, functools.partial(int8_against_linear, sizes, device, rows, n, k, dtype)


@torch.no_grad()
def int8_against_linear(sizes: Sizes, device: torch.device, rows: int, n: int, k: int, dtype: torch.dtype) -> Row:
    """Milliseconds per call of int8_linear and F.linear, each over different weights of a gigabyte."""
    torch.manual_seed(0)
    x = torch.randn(rows, k, device=device).to(dtype)
    scale = torch.rand(n, device=device) * 1e-3 + 1e-4
    count = max(2, sizes.bytes_of_weights // (n * k))
    int8 = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device) for _ in range(count)]
    plain = [torch.randn(n, k, dtype=dtype, device=device) for _ in range(max(2, count // 2))]
    row: Row = {"rows": rows, "n": n, "k": k, "dtype": str(dtype), "backend": int8_linear.choose(x, int8[0], scale)}
    passes: dict[str, tuple[int, Callable[[], object]]] = {
        "int8": (4 * len(int8), lambda: [int8_linear(x, weight, scale) for _ in range(4) for weight in int8]),
        "linear": (4 * len(plain), lambda: [F.linear(x, weight) for _ in range(4) for weight in plain]),
    }
    for name, (calls, run) in passes.items():
        row |= timed_both(name, run, calls, sizes, device)
    if row["int8_graph_ms"] is not None:
        row["linear_over_int8"] = row["linear_graph_ms"] / row["int8_graph_ms"]
        row["int8_gb_per_second"] = n * k / row["int8_graph_ms"] / 1e6
        row["share"] = row["int8_gb_per_second"] * 1e9 / copy_bandwidth(sizes, device)
    return row
