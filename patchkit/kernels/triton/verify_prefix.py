"""Triton kernels of the ops `verify_prefix` and `verify_prefix_sampled`.

Shapes: R rows, T positions, V tokens in the vocabulary. logits and target [R, T, V], draft [R, T - 1].

* `largest_of_part` is bound by reading the logits, R * T * V of them, once. A handful of positions is too few for all multiprocessors, so
  every position is divided among SPLITS programs, each of which stores the largest logit of its part and the index of it.
* `count_prefix`, one program per row, finds the largest of the parts and compares it with the draft.
* `accept_or_resample`, one program per row, reads the drafted tokens' probabilities, then one position, twice: for the total of the
  weights, and for the index at which their cumulative sum exceeds a share of it.

An argmax must not depend on the order of comparisons. Logits are therefore compared as integers in the order of the floats, in which both
zeros are equal, a NaN is the largest, and the value of an empty lane the smallest; of equal ones the lowest index is taken, explicitly.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from patchkit.kernels.triton import FLOAT_TYPES, Launch, Signature

BLOCK = 2048
# Not fused: a product is rounded before it is compared, as torch's are.
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
_NOTHING = tl.constexpr(-(2**31))
_LARGEST = tl.constexpr(2**31 - 1)


def run(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `verify_prefix` on logits that are not empty."""
    r, t, v = logits.shape
    if logits.stride(2) != 1:
        logits = logits.contiguous()
    choice, accepted = draft.new_empty(r, t), draft.new_empty(r)
    scan, count = plan(r, t, v)
    splits = scan.grid[1]
    largest, where = (torch.empty(r, t, splits, dtype=torch.int32, device=logits.device) for _ in range(2))
    # Triton launches on the current device, which is not the logits' where a model is spread over several.
    with torch.cuda.device_of(logits):
        scan.kernel[scan.grid](logits, largest, where, t, v, logits.stride(0), logits.stride(1), **scan.constants, **scan.options)
        count.kernel[count.grid](
            largest, where, draft.contiguous(), counts.contiguous(), choice, accepted, t, **count.constants, **count.options
        )
    return choice, accepted


def run_sampled(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op `verify_prefix_sampled` on a target that is not empty."""
    (r, t, v), accepted, next_token = target.shape, torch.empty_like(counts), torch.empty_like(counts)
    given = [tensor.contiguous() for tensor in (target, draft_probabilities, draft, counts, accept_draws, next_draws)]
    launch = _plan_sampled(r, t, v)
    with torch.cuda.device_of(target):
        launch.kernel[launch.grid](*given, accepted, next_token, t, v, **launch.constants, **launch.options)
    return accepted, next_token


def plan(r: int, t: int, v: int) -> tuple[Launch, Launch]:
    """The two launches of `verify_prefix`: 512 programs or more, where there are as many blocks of logits."""
    blocks = triton.cdiv(v, BLOCK)
    splits = min(triton.next_power_of_2(blocks), triton.next_power_of_2(triton.cdiv(512, r * t)))
    scan = Launch(largest_of_part, (r * t, splits), dict(PART=triton.cdiv(blocks, splits) * BLOCK, BLOCK=BLOCK), _OPTIONS)
    return scan, Launch(count_prefix, (r,), dict(BLOCK_T=triton.next_power_of_2(t), SPLITS=splits), _OPTIONS)


def _plan_sampled(r: int, t: int, v: int) -> Launch:
    constants = dict(BLOCK_T=triton.next_power_of_2(t), BLOCK=min(BLOCK, max(32, triton.next_power_of_2(v))))
    return Launch(accept_or_resample, (r,), constants, {**_OPTIONS, "num_warps": 8})


def signatures() -> Iterator[Signature]:
    """Every kernel for the usual sizes and dtypes, and for a vocabulary that no power of two divides."""
    for dtype, name in FLOAT_TYPES.items():
        for r, t, v in ((1, 5, 50257), (8, 5, 128256)):
            types = dict(logits=f"*{name}", largest="*i32", where="*i32", T="i32", V="i32", stride_row="i32", stride_position="i32")
            yield Signature(f"{r} x {t} x {v}, {dtype}", plan(r, t, v)[0], types, aligned=v % 16 == 0)
    for r, t, v in ((1, 5, 50257), (64, 17, 50304), (1, 1024, 50304)):
        types = dict(largest="*i32", where="*i32", draft="*i64", counts="*i64", choice="*i64", accepted="*i64", T="i32")
        yield Signature(f"{r} x {t} x {v}", plan(r, t, v)[1], types, aligned=False)
    for r, t, v in ((1, 5, 50257), (64, 17, 50304)):
        tensors = dict(target="*fp32", draft_probabilities="*fp32", draft="*i64", counts="*i64", accept_draws="*fp32", next_draws="*fp32")
        types = dict(**tensors, accepted="*i64", next_token="*i64", T="i32", V="i32")
        yield Signature(f"{r} x {t} x {v}", _plan_sampled(r, t, v), types, aligned=False)


@triton.jit
def _ordered(x):
    """An int32 for every float, in the same order."""
    x = x.to(tl.float32)
    x = tl.where(x == 0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(x != x, _LARGEST, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit(do_not_specialize=["T"])
def largest_of_part(logits, largest, where, T, V, stride_row, stride_position, PART: tl.constexpr, BLOCK: tl.constexpr):
    """Part ``program_id(1)`` of position ``program_id(0)``: its largest logit as an ordered integer, and the lowest index of it."""
    position, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    of_position = logits + position // T * stride_row + position % T * stride_position
    best = tl.full((BLOCK,), _NOTHING, tl.int32)
    at = tl.full((BLOCK,), _LARGEST, tl.int32)
    for start in range(part * PART, tl.minimum((part + 1) * PART, V), BLOCK):
        index = start + tl.arange(0, BLOCK)
        found = tl.where(index < V, _ordered(tl.load(of_position + index, mask=index < V, other=0)), _NOTHING)
        at = tl.where(found > best, index, at)
        best = tl.maximum(found, best)
    most = tl.max(best, 0)
    to = position * tl.num_programs(1) + part
    tl.store(largest + to, most)
    tl.store(where + to, tl.min(tl.where(best == most, at, _LARGEST), 0))


@triton.jit(do_not_specialize=["T"])
def count_prefix(largest, where, draft, counts, choice, accepted, T, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr):
    """choice [T] and accepted of row ``program_id(0)``, from the largest logits of SPLITS parts."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK_T)
    parts = (row * T + t)[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    best = tl.load(largest + parts, mask=t[:, None] < T, other=0)
    at = tl.load(where + parts, mask=t[:, None] < T, other=0)
    chosen = tl.min(tl.where(best == tl.max(best, 1)[:, None], at, _LARGEST), 1).to(tl.int64)
    tl.store(choice + row * T + t, chosen, mask=t < T)
    drafted = (t < T - 1) & (t < tl.load(counts + row))
    right = drafted & (tl.load(draft + row * (T - 1) + t, mask=drafted, other=-1) == chosen)
    # The last position has no draft, so that the first that is not right is at most T - 1.
    tl.store(accepted + row, tl.min(tl.where(right, BLOCK_T, t), 0).to(tl.int64))


@triton.jit(do_not_specialize=["T"])
def accept_or_resample(
    target, draft_probabilities, draft, counts, accept_draws, next_draws, accepted, next_token, T, V,
    BLOCK_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """accepted and next_token of row ``program_id(0)``."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    t = tl.arange(0, BLOCK_T)
    drafted = (t < T - 1) & (t < count)
    token = tl.load(draft + row * (T - 1) + t, mask=drafted, other=-1)
    known = drafted & (token >= 0) & (token < V)
    p = tl.load(target + (row * T + t) * V + token, mask=known, other=0)
    q = tl.load(draft_probabilities + (row * (T - 1) + t) * V + token, mask=known, other=0)
    draw = tl.load(accept_draws + row * (T - 1) + t, mask=known, other=0)
    length = tl.min(tl.where(known & (draw * q < p), BLOCK_T, t), 0)
    tl.store(accepted + row, length.to(tl.int64))

    weights = target + (row * T + length) * V
    subtracted = draft_probabilities + (row * (T - 1) + length) * V
    # Up to where there is something to subtract.
    limit = tl.where(length < count, V, 0)
    lane = tl.arange(0, BLOCK)
    of_target = tl.zeros((BLOCK,), tl.float64)
    of_residual = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, V, BLOCK):
        w = tl.load(weights + start + lane, mask=start + lane < V, other=0)
        s = tl.load(subtracted + start + lane, mask=start + lane < limit, other=0)
        of_target += w.to(tl.float64)
        of_residual += tl.maximum(w - s, 0.0).to(tl.float64)
    residual = tl.sum(of_residual, 0)
    total = tl.where(residual > 0, residual, tl.sum(of_target, 0))
    limit = tl.where(residual > 0, limit, 0)
    share = tl.load(next_draws + row).to(tl.float64) * total

    before = share * 0  # a zero in float64
    found = V
    last = -1
    start = 0
    while (start < V) & (found == V):
        index = start + lane
        w = tl.load(weights + index, mask=index < V, other=0)
        s = tl.load(subtracted + index, mask=index < limit, other=0)
        weight = tl.maximum(w - s, 0.0)
        cumulative = before + tl.cumsum(weight.to(tl.float64), 0)
        found = tl.min(tl.where((cumulative > share) & (weight > 0), index, V), 0)
        last = tl.maximum(last, tl.max(tl.where(weight > 0, index, -1), 0))
        before += tl.sum(weight.to(tl.float64), 0)
        start += BLOCK
    tl.store(next_token + row, tl.where(found < V, found, last).to(tl.int64))
