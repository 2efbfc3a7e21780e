"""verify_prefix, verify_prefix_sampled and kv_append compared with torch's own operators."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from evals.gpu.correctness import compared
from evals.gpu.rows import Cases, Row
from evals.gpu.sizes import Sizes
from evals.gpu.timing import timed_both
from patchkit.kernels import Op
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.verify_prefix import verify_prefix
from patchkit.kernels.verify_prefix_sampled import verify_prefix_sampled


def verification(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of the three ops for every shape."""
    torch.manual_seed(0)
    for r, t, v in sizes.verified:
        for dtype in (torch.bfloat16, torch.float32):
            logits = torch.randn(r, t, v, device=device).to(dtype)
            given = logits, logits[:, :-1].argmax(-1), torch.arange(r, device=device) % t
            yield f"verify_prefix, {r} x {t} x {v}, {dtype}", functools.partial(against_torch, verify_prefix, argmax_prefix, sizes, given)
        p, q = (torch.randn(r, positions, v, device=device).mul(2).softmax(-1) for positions in (t, t - 1))
        draft = q.flatten(0, 1).multinomial(1).view(r, t - 1)
        draws = torch.rand(r, t - 1, device=device), torch.rand(r, device=device)
        given = p, q, draft, torch.full((r,), t - 1, device=device), *draws
        case = functools.partial(against_torch, verify_prefix_sampled, verify_prefix_sampled.reference, sizes, given)
        yield f"verify_prefix_sampled, {r} x {t} x {v}", case
    for b, g, t, c, k in sizes.appended:
        cache = [torch.randn(b, g, slots, k, device=device).to(torch.bfloat16) for slots in (c, c, t, t)]
        given = *cache, torch.arange(b, device=device) * ((c - t) // b)
        label = f"kv_append, {b} x {g} heads, {t} tokens into {c} slots of {k}"
        yield label, functools.partial(against_torch, kv_append, index_put, sizes, given)


def argmax_prefix(logits: Any, draft: Any, counts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """verify_prefix with torch's operators."""
    choice = logits.argmax(-1)
    drafted = torch.arange(draft.shape[1], device=draft.device) < counts[:, None]
    return choice, ((choice[:, :-1] == draft) & drafted).cumprod(1).sum(1)


def index_put(keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any) -> None:
    """kv_append with torch's operators."""
    rows = torch.arange(len(offsets), device=offsets.device)[:, None]
    slots = offsets[:, None] + torch.arange(new_keys.shape[2], device=offsets.device)
    keys[rows, :, slots], values[rows, :, slots] = new_keys.transpose(1, 2), new_values.transpose(1, 2)


@torch.no_grad()
def against_torch(found: Op, plain: Callable[..., Any], sizes: Sizes, args: tuple[Any, ...]) -> Row:
    """Milliseconds per call of an op and of torch's operators, which must agree."""
    device, calls = args[0].device, 4
    row: Row = {"op": found.name, "backend": found.choose(*args), **compared(found.results(found, *args), found.results(plain, *args))}
    for name, function in (("op", found), ("torch", plain)):

        def run(function: Callable[..., Any] = function) -> None:
            for _ in range(calls):
                function(*args)

        row |= timed_both(name, run, calls, sizes, device)
    timed = "graph" if device.type == "cuda" else "launched"
    row["torch_over_op"] = row[f"torch_{timed}_ms"] / row[f"op_{timed}_ms"]
    return row
