"""Every backend of every op against its float64 definition on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from evals.gpu.rows import Cases, NotMeasured, Row
from evals.gpu.sizes import DTYPES, Sizes
from patchkit.kernels import Op, available_ops
from patchkit.kernels.int8_linear import int8_linear
from patchkit.testing import TOLERANCES


def correctness(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of every op, backend and sample."""
    for label, x, *rest in random_int8_linear(sizes, device, (4, 16)):
        few = 1 if len(x) == 4 else 5
        yield f"int8_linear, {label}: {few} at once", functools.partial(check_alone, int8_linear, few, x, *rest)
    for label, *given in random_int8_linear(sizes, device, sizes.rows):
        for name, reason in int8_linear.explain(*given).items():
            if reason is None:
                yield f"int8_linear {name}, {label}", functools.partial(check, int8_linear, name, *given)
            elif device.type == "cuda" and name == "triton":
                yield f"int8_linear {name}, {label}", functools.partial(refused_on, device, name, reason)
    for found in available_ops().values():
        refused: dict[str, str] = {}
        served: set[str] = set()
        for label, args in found.sample_inputs(device):
            for name, reason in found.explain(*args).items():
                if reason is None:
                    served.add(name)
                    yield f"{found.name} {name}, {label}", functools.partial(check, found, name, *args)
                else:
                    refused.setdefault(name, reason)
        for name in refused.keys() - served:
            yield f"{found.name} {name}", functools.partial(refused_on, device, name, refused[name])


def random_int8_linear(sizes: Sizes, device: torch.device, row_counts: tuple[int, ...]) -> Iterator[tuple[Any, ...]]:
    """Label and arguments of int8_linear, for every shape, dtype and form. The last of several rows is zero."""
    torch.manual_seed(0)
    for n, k in sizes.shapes:
        weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
        for dtype in (*DTYPES, torch.float32):
            bias = torch.randn(n, device=device).to(dtype)
            for activation, groups in (("float", 1), ("int8", 1), ("float", k // sizes.group)):
                scale = torch.rand((n, groups) if groups > 1 else (n,), device=device) * 1e-3 + 1e-4
                for rows in row_counts:
                    x = torch.randn(rows, k, device=device).to(dtype)
                    x[1:][-1:] = 0
                    form = f"groups of {sizes.group}" if groups > 1 else f"activation {activation}"
                    yield f"{rows} x {k} -> {n}, {dtype}, {form}", x, weight, scale, bias, activation


@torch.no_grad()
def check(found: Op, backend: str, *args: Any) -> Row:
    """Error of a backend against the op's definition: RMSE relative to the RMS of the exact output; of integers the share that differs."""
    exact = found.exact(*args)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    try:
        got = found.results(found.backends[backend].run, *args)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    return {"op": found.name, "backend": backend, "against": "float64", **compared(got, exact, found.backends[backend].rounding)}


def compared(got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], rounding: float = 0.0) -> Row:
    """Error and bound of the worst of several outputs, and a message if the error is above the bound."""
    rows = []
    for tensor, exact in zip(got, right, strict=True):
        if tensor.shape != exact.shape:
            return {"error": None, "bound": None, "message": f"shape {list(tensor.shape)}, {list(exact.shape)} is right"}
        if tensor.is_floating_point():
            error = float((tensor.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))
            rows.append((error, TOLERANCES[tensor.dtype].ratio + rounding, "relative RMSE"))
        else:
            rows.append((float((tensor != exact).double().mean()), 0.0, "share of other integers"))
    error, bound, measure = max(rows, key=lambda row: (not row[0] <= row[1], row[0]))
    row: Row = {"error": error, "bound": bound}
    return row if error <= bound else {**row, "message": f"{measure} {error:.3g}, allowed {bound:.3g}"}


@torch.no_grad()
def check_alone(found: Op, few: int, x: torch.Tensor, *rest: Any) -> Row:
    """Bits of every ``few`` rows of x alone, compared with those of the same rows among the others."""
    backend = found.choose(x, *rest)
    if backend == "reference":
        raise NotMeasured("no backend serves it here")
    together, starts = found(x, *rest), range(0, len(x) - few + 1, few)
    unequal = [i for i in starts if not torch.equal(found(x[i : i + few], *rest), together[i : i + few])]
    row: Row = {"op": found.name, "backend": backend, "rows": len(x)}
    return {**row, "message": f"rows from {unequal} are others alone than together"} if unequal else row


def refused_on(device: torch.device, backend: str, reason: str) -> Row:
    """Failure where Triton refuses on a GPU; any other refusal is a case that is not measured."""
    if device.type == "cuda" and backend == "triton":
        return {"message": f"refused on a GPU: {reason}"}
    raise NotMeasured(reason)
