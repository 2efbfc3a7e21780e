"""linear_attention compared with SDPA and with flash-linear-attention."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F

from evals.gpu.rows import Cases, NotMeasured, Row
from evals.gpu.sizes import Sizes
from evals.gpu.timing import captured, copy_bandwidth, timed_both
from patchkit.kernels.linear_attention import linear_attention


def linear(sizes: Sizes, device: torch.device) -> Cases:
    """Cases of every length, and of graph replays."""
    for shape in sizes.attended:
        yield f"linear_attention, {' x '.join(map(str, shape))}", functools.partial(linear_against_softmax, sizes, device, shape)
    yield "linear_attention: two replays of a graph", functools.partial(replayed, sizes, device)


def attended(device: torch.device, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    """Queries, keys and values in bf16."""
    torch.manual_seed(0)
    return [torch.randn(shape, device=device).to(torch.bfloat16) for _ in range(3)]


@torch.no_grad()
def linear_against_softmax(sizes: Sizes, device: torch.device, shape: tuple[int, int, int, int]) -> Row:
    """Milliseconds per call of linear_attention, of SDPA and of flash-linear-attention's chunked kernel."""
    q, k, v = attended(device, shape)
    forms: dict[str, Callable[[], object]] = {
        "linear": lambda: linear_attention(q, k, v),
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    if device.type == "cuda" and importlib.util.find_spec("fla"):
        from fla.ops.linear_attn import chunk_linear_attn

        # It takes features, in the layout [B, T, H, K], and its normaliser is a cumulative sum: neither is timed.
        theirs = [x.transpose(1, 2).contiguous() for x in (F.elu(q) + 1, F.elu(k) + 1, v)]
        forms["fla"] = lambda: chunk_linear_attn(*theirs, normalize=False)
    row: Row = {"tokens": shape[2], "backend": linear_attention.choose(q, k, v)}
    for name, run in forms.items():
        row |= timed_both(name, run, 1, sizes, device)
    timed = "graph" if device.type == "cuda" else "launched"
    for name in forms.keys() - {"linear"}:
        row[f"{name}_over_linear"] = row[f"{name}_{timed}_ms"] / row[f"linear_{timed}_ms"]
    row["limit_ms"] = 8 * q.numel() / copy_bandwidth(sizes, device) * 1e3
    row["share"] = row["limit_ms"] / row[f"linear_{timed}_ms"]
    return row


@torch.no_grad()
def replayed(sizes: Sizes, device: torch.device) -> Row:
    """Bits of two replays of a CUDA graph, compared with those of a plain call."""
    if device.type != "cuda":
        raise NotMeasured("CUDA graphs need a GPU")
    q, k, v = attended(device, sizes.attended[len(sizes.attended) // 2])
    results: list[tuple[torch.Tensor, ...]] = [()]

    def run() -> None:
        results[0] = linear_attention(q, k, v)

    run()
    plain = [x.clone() for x in results[0]]
    replay = captured(run)
    unequal = 0
    for _ in range(2):
        for x in results[0]:
            x.fill_(torch.nan)
        replay()
        unequal += sum(not torch.equal(x, y) for x, y in zip(results[0], plain, strict=True))
    row: Row = {"op": "linear_attention", "replays": 2}
    return {**row, "message": f"{unequal} tensors of two replays are not those of a plain call"} if unequal else row
