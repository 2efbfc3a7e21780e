# ruff: noqa: E402  (the path is set before patchkit is imported: nothing has to be installed)
"""Every check and benchmark that needs a GPU, in one command of at most twelve minutes, what matters most first.

    python3 evals/gpu.py                               # on one H100 or H200
    python3 evals/gpu.py --sections correctness        # a part of it
    python3 evals/gpu.py --device cpu --tiny           # every part at sizes that say nothing, to try the script itself

It needs torch, transformers and triton, and takes patchkit from this folder. One JSON, gpu_<device>.json, goes to the folder that
the environment variable OUT names, else to evals/results/, after each row; a table is printed. Sections that a run leaves out
stay in the JSON as they were.

correctness    every backend of every op against float64 arithmetic on the device, with unwritten memory set to NaN; int8_linear also
               on the shapes of the feed-forward blocks of Llama-3-8B; a row of one token alone and among 4 must have the same bits, and
               so must five rows alone and among 16
decode         one token after another through the shape of Pythia-2.8b with random fp16 weights at context 1024, in turns. The share is
               (bytes of weights and of keys and values / that copy bandwidth) / time
smollm2        a real pretrained model, where it is installed: see evals/gpu_smollm2.py
bandwidth      int8_linear on those shapes, weight-only, and F.linear beside it. Each pass goes over a gigabyte of different weights,
               so that they come from memory. "graph" times the kernels alone, "launched" the calls as Python makes them.
               A share is (bytes of the int8 weights / time) / (bytes read + bytes written / time of a copy on the device)
linear         linear_attention in bf16 from 512 to 65536 tokens, beside SDPA (causal) and, where flash-linear-attention is installed, its
               chunked kernel. The share is (8 bytes for every element of q / that copy bandwidth) / time; two replays of a CUDA
               graph must give the same bits, and those of a plain call
verification   verify_prefix, verify_prefix_sampled and kv_append on the shapes of Llama-3-8B and of a vocabulary of 50304, and torch's own
               operators beside them, which must agree

Exit status 1 if any row failed: a wrong result or an exception. A bar that was missed is reported, and is no failure.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import re
import signal
import statistics
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from evals import gpu_smollm2
from patchkit import _compat, patch_model, report
from patchkit.int8.weight import Int8Weight
from patchkit.kernels import Op, available_ops
from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.linear_attention import linear_attention
from patchkit.kernels.verify_prefix import verify_prefix, verify_prefix_sampled
from patchkit.measure.environment import environment, version_of
from patchkit.measure.latency import Stream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.models import SMOLLM2, ModelUnavailable, load_model, smollm2_gguf
from patchkit.testing import TOLERANCES, logit_error
from patchkit.views import twin

# Seconds; what a section leaves unused goes to the next.
LIMITS = {"correctness": 160, "decode": 200, "smollm2": 180, "bandwidth": 80, "linear": 60, "verification": 30}
PASSED, FAILED, NOT_MEASURED, NO_TIME = "passed", "failed", "not measured", "no time"
LEAST_SHARE, MOST_MS = 0.75, 2.2
DTYPES = (torch.float16, torch.bfloat16)
SINKS = 4

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]


@dataclass(frozen=True, eq=False)
class Sizes:
    """What is measured; the defaults are the real thing.

    Attributes:
        shapes: (N, K) of int8_linear.
        verified: (R, T, V) of verify_prefix.
        appended: (B, G, T, C, K) of kv_append, V = K.
        attended: (B, H, T, K) of linear_attention, V = K.
        model: of the decoded model's config.
        compiler: further options of the patch `compile`.
        smollm2_tokens: None for the real model and the real lengths; else a stand-in, and so many tokens.
    """

    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (4096, 14336))
    rows: tuple[int, ...] = (1, 4, 16, 17, 256)
    timed_rows: tuple[int, ...] = (1, 4, 16, 256, 2048)
    group: int = 128
    bytes_copied: int = 2**30
    bytes_of_weights: int = 2**30
    verified: tuple[tuple[int, int, int], ...] = ((1, 5, 50304), (1, 5, 128256), (8, 5, 128256), (8, 17, 128256))
    appended: tuple[tuple[int, int, int, int, int], ...] = ((1, 8, 5, 4096, 128), (8, 8, 5, 4096, 128), (8, 8, 17, 4096, 128))
    attended: tuple[tuple[int, int, int, int], ...] = tuple((1, 32, 2**n, 128) for n in range(9, 17))
    warmup_seconds: float = 0.1
    repeats: int = 20
    model: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=10240,
            vocab_size=50304,
            max_position_embeddings=2048,
        )
    )
    window: int = 1020
    rounds: int = 40
    greedy_tokens: int = 64
    compiler: tuple[str, ...] = ()
    smollm2_tokens: int | None = None


TINY = Sizes(
    shapes=((96, 64), (64, 96)),
    rows=(1, 16, 17),
    timed_rows=(1, 16, 32),
    group=32,
    bytes_copied=2**20,
    bytes_of_weights=2**14,
    verified=((1, 5, 33), (3, 2, 64)),
    appended=((1, 2, 3, 16, 8), (3, 2, 5, 16, 8)),
    attended=((1, 2, 40, 16),),
    warmup_seconds=0.0,
    repeats=2,
    model=dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=128, max_position_embeddings=512
    ),
    window=28,
    rounds=4,
    greedy_tokens=8,
    compiler=("backend=aot_eager",),
    smollm2_tokens=8,
)


class NotMeasured(Exception):
    """A case that cannot be run here, and why."""


class TimedOut(BaseException):
    """The time of a section is used up; no Exception, so that no library handler swallows it."""


# -- correctness -----------------------------------------------------------------------------------------------------------------


def exact_int8_linear(x: Any, weight: Any, scale: Any, bias: Any = None, activation: str = "float") -> torch.Tensor:
    """The definition of the op int8_linear in float64, [..., N]."""
    rows = x.double()
    if activation == "int8":
        # Step and quotients are fp32 by definition: a tie decided the other way would be off by a whole level.
        step = (rows.abs().amax(-1, keepdim=True) / 127).float().double()
        rows = torch.where(step > 0, (rows / step).float().round().double() * step, 0.0)
    per_output = scale.double().reshape(len(weight), -1)
    y = rows @ (weight.double() * per_output.repeat_interleave(weight.shape[1] // per_output.shape[1], 1)).T
    return y if bias is None else y + bias.double()


def exact_int8_experts_linear(x: Any, experts: Any, weights: Any, scale: Any, bias: Any = None, activation: str = "float") -> torch.Tensor:
    """The definition of the op int8_experts_linear in float64, [S, N]."""
    y = torch.zeros(len(x), scale.shape[1], dtype=torch.float64, device=x.device)
    for e, weight in enumerate(weights):
        mine = experts == e
        y[mine] = exact_int8_linear(x[mine], weight, scale[e], None if bias is None else bias[e], activation)
    return y


def exact_verify_prefix(logits: Any, draft: Any, counts: Any) -> tuple[torch.Tensor, ...]:
    """The definition of the op verify_prefix, position by position."""
    indices = torch.arange(logits.shape[2], device=logits.device)
    choice = torch.where(logits == logits.amax(-1, keepdim=True), indices, len(indices)).amin(-1)
    accepted, stands = torch.zeros_like(counts), torch.ones_like(counts, dtype=torch.bool)
    for i in range(draft.shape[1]):
        stands &= (i < counts) & (draft[:, i] == choice[:, i])
        accepted += stands
    return choice, accepted


def exact_verify_prefix_sampled(
    target: Any, draft_probabilities: Any, draft: Any, counts: Any, accept_draws: Any, next_draws: Any
) -> tuple[torch.Tensor, ...]:
    """The definition of the op verify_prefix_sampled in float64, row by row. The products are fp32 by definition."""
    accepted, next_token = torch.zeros_like(counts), torch.zeros_like(counts)
    for row, count in enumerate(counts.tolist()):
        p, q, stand = target[row].double(), draft_probabilities[row].double(), 0
        while stand < count:
            token = int(draft[row, stand])
            if not (0 <= token < p.shape[1] and (accept_draws[row, stand].double() * q[stand, token]).float() < p[stand, token]):
                break
            stand += 1
        weights = (p[stand] - q[stand]).float().double() if stand < count else p[stand]
        weights = weights.clamp(min=0) if (weights > 0).any() else p[stand]
        share = float(next_draws[row]) * float(weights.sum())
        cumulative = weights.cpu().cumsum(0)  # one by one, so that it never falls
        positive = weights.cpu().nonzero()[:, 0].tolist()
        accepted[row] = stand
        next_token[row] = next((index for index in positive if cumulative[index] > share), positive[-1])
    return accepted, next_token


def exact_kv_append(
    keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any, cos: Any = None, sin: Any = None
) -> tuple[torch.Tensor, ...]:
    """The definition of the op kv_append in float64, row by row: the cache that it leaves."""
    keys, values, new_keys = keys.double(), values.double(), new_keys.double()  # copies: no sample is float64
    if cos is not None:
        (low, high), rest = new_keys[..., : cos.shape[-1]].chunk(2, -1), new_keys[..., cos.shape[-1] :]
        (cos_low, cos_high), (sin_low, sin_high) = (x.double().unsqueeze(1).chunk(2, -1) for x in (cos, sin))
        new_keys = torch.cat((low * cos_low - high * sin_low, high * cos_high + low * sin_high, rest), -1)
    for row, first in enumerate(offsets.tolist()):
        for t in range(new_keys.shape[2]):
            keys[row, :, first + t], values[row, :, first + t] = new_keys[row, :, t], new_values[row, :, t].double()
    return keys, values


def exact_linear_attention(
    q: Any,
    k: Any,
    v: Any,
    state: Any = None,
    normalizer: Any = None,
    mask: Any = None,
    kind: str = "elu1",
    normalize: bool = True,
    *rest: Any,
) -> tuple[torch.Tensor, ...]:
    """The definition of the op linear_attention in float64, by the matrix of all weights."""
    maps = {"elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": lambda x: x.clamp(min=0), "identity": lambda x: x}
    shared, (fq, fk), values = q.shape[1] // k.shape[1], (maps[kind](x.double()) for x in (q, k)), v.double()
    if mask is not None:
        fk = torch.where(mask[:, None, :, None], fk, 0.0)
    weights = (fq @ fk.repeat_interleave(shared, 1).mT).tril()
    out, denominator = weights @ values.repeat_interleave(shared, 1), weights.sum(-1)
    after, sums = fk.mT @ values, fk.sum(2)
    if state is not None:
        out, after = out + fq @ state.double().repeat_interleave(shared, 1), after + state.double()
    if normalizer is not None:
        denominator = denominator + (fq * normalizer.double().repeat_interleave(shared, 1)[:, :, None]).sum(-1)
        sums = sums + normalizer.double()
    if normalize:
        out = torch.where(denominator[..., None] == 0, 0.0, out / denominator[..., None])
    return out, denominator, after, sums


def exact_mesa(
    q: Any, k: Any, v: Any, regularizer: Any, state: Any = None, moments: Any = None, mask: Any = None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    """The definition of the op mesa in float64, all tokens at once."""
    keys = k.double() if mask is None else torch.where(mask[:, None, :, None], k.double(), 0.0)
    to_state, to_moments = ((keys[..., None] * x.double()[..., None, :]).cumsum(2) for x in (v, keys))
    to_state = to_state if state is None else to_state + state.double()[:, :, None]
    to_moments = to_moments if moments is None else to_moments + moments.double()[:, :, None]
    readout = torch.linalg.inv(to_moments + torch.diag_embed(regularizer.double())[:, None]) @ to_state
    out = q.double()[..., None, :] @ readout.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out.squeeze(-2), to_state[:, :, -1], to_moments[:, :, -1]


def exact_log_linear_attention(
    q: Any, k: Any, v: Any, weights: Any, states: Any = None, past: int = 0, mask: Any = None, *rest: Any
) -> tuple[torch.Tensor, ...]:
    """The definition of the op log_linear_attention in float64, token by token and level by level, each span summed anew.

    A span from before the first token is known by its sum alone, which stands at the place of its first token.
    """
    keys = k.double() if mask is None else torch.where(mask[:, None, :, None], k.double(), 0.0)
    sums = torch.cat([keys.new_zeros(*k.shape[:2], past, k.shape[-1], v.shape[-1]), keys[..., None] * v.double()[..., None, :]], 2)
    first = 0
    for bit in reversed(range(past.bit_length())):
        if past >> bit & 1:
            sums[:, :, first] = 0.0 if states is None else states[:, :, bit + 1].double()
            first += 1 << bit
    shared, tokens = q.shape[1] // k.shape[1], past + q.shape[2]

    def spans(t: int) -> list[tuple[int, torch.Tensor]]:
        found, first = [], 0
        for bit in reversed(range(t.bit_length())):
            if t >> bit & 1:
                found.append((bit + 1, sums[:, :, first : first + (1 << bit)].sum(2)))
                first += 1 << bit
        return found

    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for t in range(past, tokens):
        for level, span in [(0, sums[:, :, t]), *spans(t)]:
            read = q[:, :, t - past, None].double() @ span.repeat_interleave(shared, 1)
            out[:, :, t - past] += weights[:, :, t - past, level, None].double() * read.squeeze(-2)
    last = sums.new_zeros(*k.shape[:2], weights.shape[-1], k.shape[-1], v.shape[-1])
    for level, span in spans(tokens):
        last[:, :, level] = span
    return out, last


# Forms that share no code with the op. Another op is held to its own reference on float64 arguments, and its rows say so.
EXACT: dict[str, Callable[..., Any]] = {
    "int8_linear": exact_int8_linear,
    "int8_experts_linear": exact_int8_experts_linear,
    "verify_prefix": exact_verify_prefix,
    "verify_prefix_sampled": exact_verify_prefix_sampled,
    "kv_append": exact_kv_append,
    "linear_attention": exact_linear_attention,
    "linear_attention_step": exact_linear_attention,
    "log_linear_attention": exact_log_linear_attention,
    "mesa": exact_mesa,
}


def correctness(sizes: Sizes, device: torch.device) -> Cases:
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
    """A label and the arguments of int8_linear, for every shape, dtype and form. The last of several rows is zero."""
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
    """A backend against float64: the RMSE relative to the RMS of the exact output; of integers the share that are others."""
    if found.name in EXACT:
        exact, against = EXACT[found.name](*args), "float64"
        exact = exact if isinstance(exact, tuple) else (exact,)
    else:
        exact, against = found.results(found.reference, *map(widened, args)), "the op's reference on float64 arguments"
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that nobody has written is NaN
    try:
        got = found.results(found.backends[backend].run, *args)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    return {"op": found.name, "backend": backend, "against": against, **compared(got, exact, found.backends[backend].rounding)}


def compared(got: tuple[torch.Tensor, ...], right: tuple[torch.Tensor, ...], rounding: float = 0.0) -> Row:
    """The worst of several outputs: error, bound, and a message if the one is above the other."""
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


def widened(value: Any) -> Any:
    """Floating-point tensors as float64."""
    if isinstance(value, list | tuple):
        return [widened(item) for item in value]
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


@torch.no_grad()
def check_alone(found: Op, few: int, x: torch.Tensor, *rest: Any) -> Row:
    """Every ``few`` rows of x by themselves against the same rows among the others, bit by bit."""
    backend = found.choose(x, *rest)
    if backend == "reference":
        raise NotMeasured("no backend serves it here")
    together, starts = found(x, *rest), range(0, len(x) - few + 1, few)
    unequal = [i for i in starts if not torch.equal(found(x[i : i + few], *rest), together[i : i + few])]
    row: Row = {"op": found.name, "backend": backend, "rows": len(x)}
    return {**row, "message": f"rows from {unequal} are others alone than together"} if unequal else row


def refused_on(device: torch.device, backend: str, reason: str) -> Row:
    """A matter of course, but for Triton on a GPU."""
    if device.type == "cuda" and backend == "triton":
        return {"message": f"refused on a GPU: {reason}"}
    raise NotMeasured(reason)


# -- bandwidth -------------------------------------------------------------------------------------------------------------------


def bandwidth(sizes: Sizes, device: torch.device) -> Cases:
    yield f"copy of {sizes.bytes_copied / 2**30:.3g} GiB", lambda: {"gb_per_second": copy_bandwidth(sizes, device) / 1e9}
    for rows in sizes.timed_rows:
        for n, k in sizes.shapes:
            for dtype in DTYPES:
                label = f"int8_linear, {rows} x {k} -> {n}, {dtype}"
                yield label, functools.partial(int8_against_linear, sizes, device, rows, n, k, dtype)


@functools.cache
def copy_bandwidth(sizes: Sizes, device: torch.device) -> float:
    """Bytes per second of a copy on the device: those read and those written, added up."""
    source = torch.randint(256, (sizes.bytes_copied,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * sizes.bytes_copied / milliseconds(lambda: target.copy_(source), sizes, device) * 1e3


@torch.no_grad()
def int8_against_linear(sizes: Sizes, device: torch.device, rows: int, n: int, k: int, dtype: torch.dtype) -> Row:
    """Milliseconds per call of int8_linear and F.linear, each over as many weights as make up a gigabyte."""
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
        row[f"{name}_launched_ms"] = milliseconds(run, sizes, device) / calls
        row[f"{name}_graph_ms"] = milliseconds(captured(run), sizes, device) / calls if device.type == "cuda" else None
    if row["int8_graph_ms"] is not None:
        row["linear_over_int8"] = row["linear_graph_ms"] / row["int8_graph_ms"]
        row["int8_gb_per_second"] = n * k / row["int8_graph_ms"] / 1e6
        row["share"] = row["int8_gb_per_second"] * 1e9 / copy_bandwidth(sizes, device)
    return row


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The kernels that a function launches, as one CUDA graph."""
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
    """Median time of one call, by the device's own clock."""
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- verification ----------------------------------------------------------------------------------------------------------------


def verification(sizes: Sizes, device: torch.device) -> Cases:
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
        for rotation in (False, True):
            cache = [torch.randn(b, g, slots, k, device=device).to(torch.bfloat16) for slots in (c, c, t, t)]
            offsets = torch.arange(b, device=device) * ((c - t) // b)
            angles = torch.rand(b, t, k // 2, device=device).mul(6).repeat(1, 1, 2) if rotation else None
            given = *cache, offsets, *((None, None) if angles is None else (angles.cos(), angles.sin()))
            label = f"kv_append, {b} x {g} heads, {t} tokens into {c} slots of {k}{', rotated' if rotation else ''}"
            yield label, functools.partial(against_torch, kv_append, index_put, sizes, given)


def argmax_prefix(logits: Any, draft: Any, counts: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """verify_prefix as one writes it with torch's operators."""
    choice = logits.argmax(-1)
    drafted = torch.arange(draft.shape[1], device=draft.device) < counts[:, None]
    return choice, ((choice[:, :-1] == draft) & drafted).cumprod(1).sum(1)


def index_put(keys: Any, values: Any, new_keys: Any, new_values: Any, offsets: Any, cos: Any = None, sin: Any = None) -> None:
    """kv_append as one writes it with torch's operators."""
    if cos is not None:
        low, high = new_keys.chunk(2, -1)
        new_keys = (new_keys * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]).to(keys.dtype)
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

        row[f"{name}_launched_ms"] = milliseconds(run, sizes, device) / calls
        row[f"{name}_graph_ms"] = milliseconds(captured(run), sizes, device) / calls if device.type == "cuda" else None
    timed = "graph" if device.type == "cuda" else "launched"
    row["torch_over_op"] = row[f"torch_{timed}_ms"] / row[f"op_{timed}_ms"]
    return row


# -- linear ----------------------------------------------------------------------------------------------------------------------


def linear(sizes: Sizes, device: torch.device) -> Cases:
    for shape in sizes.attended:
        yield f"linear_attention, {' x '.join(map(str, shape))}", functools.partial(linear_against_softmax, sizes, device, shape)
    yield "linear_attention: two replays of a graph", functools.partial(replayed, sizes, device)


def attended(device: torch.device, shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
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
        row[f"{name}_launched_ms"] = milliseconds(run, sizes, device)
        row[f"{name}_graph_ms"] = milliseconds(captured(run), sizes, device) if device.type == "cuda" else None
    timed = "graph" if device.type == "cuda" else "launched"
    for name in forms.keys() - {"linear"}:
        row[f"{name}_over_linear"] = row[f"{name}_{timed}_ms"] / row[f"linear_{timed}_ms"]
    row["limit_ms"] = 8 * q.numel() / copy_bandwidth(sizes, device) * 1e3
    row["share"] = row["limit_ms"] / row[f"linear_{timed}_ms"]
    return row


@torch.no_grad()
def replayed(sizes: Sizes, device: torch.device) -> Row:
    """The bits of a plain call and of two replays."""
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


# -- decode ----------------------------------------------------------------------------------------------------------------------

UNPATCHED, STREAMING = "unpatched", "streaming"
COMPILED, INT8_COMPILED = "streaming + compile + cudagraphs", "streaming + int8 + compile + cudagraphs"


def decode(sizes: Sizes, device: torch.device) -> Cases:
    bench = Decode(sizes, device)
    for name in bench.specs:
        yield f"{name}: ms per token", functools.partial(bench.time, name)
        if name in bench.eager:
            yield f"{name}: greedy tokens", functools.partial(bench.compare, name)


class Decode:
    """Views of one model over the same weights, each patched in its own way and made when first wanted."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.context = SINKS + sizes.window
        streaming, int8 = f"streaming(sinks={SINKS}, window={sizes.window})", "mlp_int8(mode=weight_only)"
        compiled, graphed = (f"compile({', '.join([*options, *sizes.compiler])})" for options in ((), ("cudagraphs=True",)))
        # In order of interest, should the time run out.
        self.specs = {
            UNPATCHED: "",
            STREAMING: streaming,
            COMPILED: f"{streaming} + {graphed}",
            "streaming + int8": f"{streaming} + {int8}",
            INT8_COMPILED: f"{streaming} + {int8} + {graphed}",
            "streaming + compile": f"{streaming} + {compiled}",
        }
        # The view whose tokens a compiled one must give.
        self.eager = {COMPILED: STREAMING, INT8_COMPILED: "streaming + int8", "streaming + compile": STREAMING}
        self.streams: dict[str, Stream] = {}

    @functools.cached_property
    def model(self) -> Any:
        """Random weights, made where they are needed."""
        torch.manual_seed(0)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
        with torch.device(self.device):
            return AutoModelForCausalLM.from_config(GPTNeoXConfig(rope_parameters=rope, **self.sizes.model), dtype=self.dtype).eval()

    def stream(self, name: str) -> Stream:
        """The view and a cache that is full."""
        if "cudagraphs=True" in self.specs[name] and self.device.type != "cuda":
            raise NotMeasured("CUDA graphs need a GPU")
        if name == UNPATCHED:  # its context grows by a token per step: begin as far below as it will end above
            return Stream(self.model, filled_cache(self.model, self.context - self.sizes.rounds // 2))
        if name not in self.streams:
            view = patch_model(twin(self.model), self.specs[name], verbose=False)
            self.streams[name] = Stream(view, self.full_cache(view))
        return self.streams[name]

    def full_cache(self, view: Any) -> Any:
        """The same tokens for every view, a few more than it keeps."""
        torch.manual_seed(1)
        return prefilled_cache(view, self.context + 8)

    def time(self, name: str) -> Row:
        """Milliseconds per token, in turns with every view measured so far."""
        stream = self.stream(name)
        streams = {UNPATCHED: self.stream(UNPATCHED), **self.streams}
        timings = decode_latency(streams, rounds=self.sizes.rounds, warmup=8)
        limit_ms = self.bytes_read(stream.model) / copy_bandwidth(self.sizes, self.device) * 1e3
        row: Row = {"spec": self.specs[name], "ms": median_ms(timings, name), "limit_ms": limit_ms}
        row["share"] = limit_ms / row["ms"]
        row["back_to_back_ms"] = self.back_to_back(stream)
        row["other_over_this"] = {other: paired_ratio(timings, other, name) for other in streams if other != name}
        for patch in [] if name == UNPATCHED else report(stream.model).patches:
            row |= {key.replace(" ", "_"): patch.hits[key] for key in ("graphs compiled", "compile milliseconds") if key in patch.hits}
        return row

    @torch.no_grad()
    def back_to_back(self, stream: Stream) -> float:
        """Milliseconds per token where nobody waits for a token before asking for the next."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.sizes.rounds):
            stream.cache = _compat.cache_of(stream.model(input_ids=token, use_cache=True, **{_compat.CACHE: stream.cache}))
        synchronize(self.device)
        return 1000 * (time.perf_counter() - started) / self.sizes.rounds

    def bytes_read(self, view: Any) -> int:
        """Weights, without the embedding, of which a token reads one row, and keys and values of the whole context."""
        embedding = view.get_input_embeddings().weight
        held = [weight for weight in view.parameters() if weight is not embedding]
        weights = sum(weight.stored_bytes() if isinstance(weight, Int8Weight) else weight.nbytes for weight in held)
        config = view.config
        return weights + 2 * config.num_hidden_layers * self.context * config.hidden_size * self.dtype.itemsize

    @torch.no_grad()
    def compare(self, name: str) -> Row:
        """Greedy tokens of the eager view against the compiled one, which is given the eager one's tokens.

        Another token is a near tie where the eager logits of the two are no further apart than rounding may move them.
        """
        views = [self.stream(self.eager[name]).model, self.stream(name).model]
        caches = [self.full_cache(view) for view in views]
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        allowed, near_ties, worst, wrong = TOLERANCES[self.dtype].logits, 0, 0.0, []
        for index in range(self.sizes.greedy_tokens):
            expected, found = (
                view(input_ids=token, use_cache=True, **{_compat.CACHE: cache}).logits[0, -1].double()
                for view, cache in zip(views, caches, strict=True)
            )
            worst = max(worst, logit_error(found, expected))
            token = expected.argmax().view(1, 1)
            gap = float(expected.max() - expected[found.argmax()])
            if gap > 2 * allowed * max(1.0, float(expected.abs().max()) / 10) or not found.isfinite().all():
                wrong.append(index)
            elif gap > 0:
                near_ties += 1
        row: Row = {"tokens": self.sizes.greedy_tokens, "near_ties": near_ties, "largest_logit_error": worst}
        return {**row, "message": f"tokens {wrong} are others than the eager ones, and no near ties"} if wrong else row


# -- smollm2 ---------------------------------------------------------------------------------------------------------------------


def smollm2(sizes: Sizes, device: torch.device) -> Cases:
    """The cases of evals/gpu_smollm2.py; on the tiny sizes those of a model that is always there, in few tokens."""
    if sizes.smollm2_tokens is None:
        try:
            smollm2_gguf()
        except ModelUnavailable as error:
            yield "smollm2", functools.partial(not_measured, str(error).splitlines()[0])
            return
        yield from gpu_smollm2.cases(lambda: load_model(SMOLLM2), device)
    else:
        few = sizes.smollm2_tokens
        load = functools.partial(load_model, "stdlib-1m-draft")
        yield from gpu_smollm2.cases(load, device, ("speculative",), ("streaming(window=28)",), few, demo=False)


def not_measured(reason: str) -> Row:
    raise NotMeasured(reason)


# -- the report ------------------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Sizes, torch.device], Cases]] = {
    "correctness": correctness,
    "decode": decode,
    "smollm2": smollm2,
    "bandwidth": bandwidth,
    "linear": linear,
    "verification": verification,
}


def run_section(cases: Cases, until: float, done: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """Every case as a row with a status, whatever happens in it; ``done`` is called after each with all so far."""
    rows: list[Row] = []
    try:
        for name, case in cases:
            rows.append({"name": name, **outcome(case, until)})
            done(rows)
    except Exception as error:  # of the generator, between two cases
        rows.append({"name": "cases", **failure(error)})
        done(rows)
    return rows


def outcome(case: Callable[[], Row], until: float) -> Row:
    seconds = until - time.monotonic()
    if seconds <= 0:
        return {"status": NO_TIME, "message": "the time was used up before"}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        figures = case()
        return {"status": FAILED if "message" in figures else PASSED, **figures}
    except NotMeasured as reason:
        return {"status": NOT_MEASURED, "message": str(reason)}
    except TimedOut:
        return {"status": NO_TIME, "message": f"stopped after {seconds:.0f} s"}
    except Exception as error:
        return failure(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def failure(error: Exception) -> Row:
    traceback.print_exception(error)
    return {"status": FAILED, "message": f"{type(error).__name__}: {error}"}


def out_of_time(number: int, frame: Any) -> None:
    raise TimedOut


def bars(sections: dict[str, list[Row]], device_name: str) -> list[Row]:
    """What was asked for, with what was found: "met", "missed" or "not measured"."""
    found = {row["name"]: row for rows in sections.values() for row in rows if row["status"] == PASSED}
    statuses = [row["status"] for row in sections.get("correctness", [])]
    shares = [row["share"] for row in sections.get("bandwidth", []) if row.get("rows") == 1 and "share" in row]
    compiled, int8 = (found.get(f"{name}: ms per token", {}) for name in (COMPILED, INT8_COMPILED))
    wrong = statuses.count(FAILED) if statuses and NO_TIME not in statuses else None
    share = min(shares) if len(shares) == len(DTYPES) * len(Sizes().shapes) else None
    ms = compiled.get("ms") if "H100" in device_name else None
    ratio = int8.get("other_over_this", {}).get(COMPILED)
    attended = [row for row in sections.get("linear", []) if row["status"] == PASSED and row.get("tokens", 0) >= 2048]
    over_sdpa, over_fla = ([row[f"{name}_over_linear"] for row in attended if f"{name}_over_linear" in row] for name in ("sdpa", "fla"))
    table: list[tuple[str, str, Any, Callable[[Any], bool]]] = [
        ("wrong or failed rows of correctness", "0", wrong, lambda figure: figure == 0),
        ("int8_linear, 1 row: least share of the copy bandwidth", f">= {LEAST_SHARE}", share, lambda figure: figure >= LEAST_SHARE),
        (f"{COMPILED}: ms per token on an H100", f"<= {MOST_MS}", ms, lambda figure: figure <= MOST_MS),
        (f"{COMPILED} / {INT8_COMPILED}: ms per token", "> 1", ratio, lambda figure: figure > 1),
        ("SDPA / linear_attention, from 2048 tokens on: the least", "> 1", min(over_sdpa, default=None), lambda figure: figure > 1),
        ("fla / linear_attention, from 2048 tokens on: the least", ">= 1", min(over_fla, default=None), lambda figure: figure >= 1),
    ]
    return [
        {"bar": bar, "wanted": wanted, "figure": figure, "verdict": NOT_MEASURED if figure is None else "met" if met(figure) else "missed"}
        for bar, wanted, figure, met in table
    ]


def print_table(result: Row) -> None:
    for name, rows in result["sections"].items():
        counts = Counter(row["status"] for row in rows)
        print(f"\n{name}: {', '.join(f'{count} {status}' for status, count in counts.items())}")
        passed = [row for row in rows if row["status"] == PASSED]
        if name == "correctness":
            for op, backend in sorted({(row["op"], row["backend"]) for row in passed}):
                mine = [row for row in passed if (row["op"], row["backend"]) == (op, backend)]
                worst = max((row["error"] / row["bound"] for row in mine if row.get("bound")), default=0.0)
                print(f"  {op} {backend}: {len(mine)} passed, largest error {worst:.2g} of what is allowed")
        else:
            for row in passed:
                print(f"  {row['name']}: {', '.join(f'{key} {shown(value)}' for key, value in row.items() if key in SHOWN)}")
        alike: dict[tuple[str, str], list[str]] = {}
        for row in rows:
            if row["status"] != PASSED:
                alike.setdefault((row["status"], row["message"]), []).append(row["name"])
        for (status, message), names in alike.items():
            print(f"  {status.upper()} {names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {message[:400]}")
    print("\nbars")
    for bar in result["bars"]:
        print(f"  {bar['bar']}: {shown(bar['figure'])} (wanted {bar['wanted']}): {bar['verdict']}")


SHOWN = (
    "gb_per_second", "int8_graph_ms", "int8_launched_ms", "linear_over_int8", "share",
    "op_graph_ms", "op_launched_ms", "torch_graph_ms", "torch_launched_ms", "torch_over_op",
    "linear_graph_ms", "linear_launched_ms", "sdpa_graph_ms", "sdpa_over_linear", "fla_graph_ms", "fla_over_linear",
    "ms", "limit_ms", "back_to_back_ms", "other_over_this", "compile_milliseconds", "tokens", "near_ties", "largest_logit_error",
    "stories", "edits", "found",
)  # fmt: skip


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {shown(item)}" for key, item in value.items()) + ")"
    return NOT_MEASURED if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def described(device: torch.device) -> Row:
    """Machine and versions, as everywhere in evals/results/, and what only matters on a GPU."""
    facts = environment() | {name: version_of(name) for name in ("triton", "torchao")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return facts


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to try the script")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: --device cpu --tiny tries the script without one")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the real sizes are for a GPU")

    sizes, device = TINY if options.tiny else Sizes(), torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = Path(os.environ.get("OUT") or ROOT / "evals" / "results") / f"gpu_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python3 evals/gpu.py", *arguments])
    result: Row = {"device": name, "environment": described(device), "commands": {}, "sections": {}, "seconds": {}}
    if path.is_file():
        # What other commands found on the same device with the same versions stays.
        before_this = json.loads(path.read_text())
        if (before_this["device"], before_this["environment"]) == (name, result["environment"]):
            result = before_this

    before = signal.signal(signal.SIGALRM, out_of_time)
    until = time.monotonic()
    try:
        for section in options.sections:
            until += LIMITS[section]
            started = time.monotonic()
            print(f"{section} ...", flush=True)
            result["commands"][section] = command

            def write(rows: list[Row], section: str = section, started: float = started) -> None:
                result["sections"][section] = rows
                result["seconds"][section] = round(time.monotonic() - started, 1)
                result["bars"] = bars({} if options.tiny else result["sections"], name)
                path.write_text(json.dumps(result, indent=2) + "\n")

            run_section(SECTIONS[section](sizes, device), until, write)
    finally:
        signal.signal(signal.SIGALRM, before)

    print(f"\n{name}: {result['environment']}\n{command}")
    print_table(result)
    print(f"\nwritten to {path}")
    return int(any(row["status"] == FAILED for rows in result["sections"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
