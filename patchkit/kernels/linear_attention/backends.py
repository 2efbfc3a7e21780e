"""Backends of linear_attention: C++, chunks of torch operators, and Triton."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

from patchkit.kernels import native, triton
from patchkit.kernels.linear_attention.inputs import FEATURE_MAPS, MOST_FEATURES, Inputs, check
from patchkit.kernels.linear_attention.reference import finished, linear_attention, prepared
from patchkit.kernels.refusals import not_on_cpu

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # q, k, v, mask, first state and normalizer, out, denominator, state, normalizer, sizes, strides; map, normalize, threads.
    return native.load("linear_attention", (ctypes.c_void_p,) * 12 + (ctypes.c_int,) * 3)


def _kernel_refuses(q: torch.Tensor, v: torch.Tensor) -> str | None:
    """Reason of any kernel written for this op."""
    if q.numel() == 0 or v.numel() == 0:
        return "q or v is empty"
    return f"{q.shape[-1]} features: at most {MOST_FEATURES}" if q.shape[-1] > MOST_FEATURES else None


def _native_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    reason = not_on_cpu(q)
    if reason is None and torch.float64 in (q.dtype, k.dtype, v.dtype):
        reason = "float64: it sums in fp32"
    return reason or _kernel_refuses(q, v) or _kernel()[1]


@linear_attention.backend("native", refuses=_native_refuses)
def _(*args: Any) -> Four:
    """C++, one pass over the tokens.

    `native/linear_attention.cpp` takes 64 tokens at a time, whatever ``chunk`` is.
    """
    x = Inputs(*args)
    check(x)
    (batch, heads, tokens, width), groups, value_width = x.q.shape, x.k.shape[1], x.v.shape[-1]
    # Named, so that they live until the call is over.
    q32, k32, v32 = (y.float() if y.stride(-1) == 1 else y.float().contiguous() for y in (x.q, x.k, x.v))
    before = [None if y is None else y.float().contiguous() for y in (x.state, x.normalizer)]
    seen = None if x.mask is None else x.mask.to(torch.uint8).contiguous()
    # The kernel writes fp32, whatever torch.set_default_dtype is.
    empty = functools.partial(torch.empty, dtype=torch.float32, device=x.q.device)
    out, denominator = empty(batch, heads, tokens, value_width), empty(batch, heads, tokens)
    after, sums = empty(batch, groups, width, value_width), empty(batch, groups, width)
    tensors = q32, k32, v32, seen, *before, out, denominator, after, sums
    sizes = (ctypes.c_int64 * 6)(batch, heads, groups, tokens, width, value_width)
    strides = (ctypes.c_int64 * 9)(*(step for y in (q32, k32, v32) for step in y.stride()[:3]))
    addresses = [None if y is None else y.data_ptr() for y in tensors]
    options = FEATURE_MAPS.index(x.feature_map), int(x.normalize), torch.get_num_threads()
    if _kernel()[0](*addresses, ctypes.addressof(sizes), ctypes.addressof(strides), *options):
        raise MemoryError("linear_attention: no memory for a chunk")
    return out.to(x.q.dtype) if x.normalize else out, denominator, after, sums


@linear_attention.backend("cpu", refuses=not_on_cpu)
def _(*args: Any) -> Four:
    """Chunks of torch operators: masked products within a chunk, the state for the tokens before it."""
    x = Inputs(*args)
    fq, fk, values, state, normalizer = prepared(x)
    state, normalizer = state.clone(), normalizer.clone()
    out, denominator = fq.new_empty(*fq.shape[:4], x.v.shape[-1]), fq.new_empty(fq.shape[:4])
    for start in range(0, x.q.shape[2], x.chunk):
        part = slice(start, start + x.chunk)
        queries, keys, chunk_values = fq[:, :, :, part], fk[:, :, part], values[:, :, part]
        weights = (queries @ keys.mT[:, :, None]).tril()
        out[:, :, :, part] = weights @ chunk_values[:, :, None] + queries @ state[:, :, None]
        denominator[:, :, :, part] = weights.sum(-1) + (queries @ normalizer[:, :, None, :, None]).squeeze(-1)
        state += keys.mT @ chunk_values
        normalizer += keys.sum(2)
    return (*finished(out, denominator, x.q, x.normalize), state, normalizer)


def triton_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    """Reason why the Triton kernels cannot serve these tensors, or None."""
    return _kernel_refuses(q, v) or next((reason for reason in map(triton.refusal, (q, k, v)) if reason), None)


# Products on tensor cores: features, weights and state are rounded to bf16 for bf16 inputs, to TF32 for others.
@linear_attention.backend("triton", refuses=triton_refuses, rounding=3e-3)
def _(*args: Any) -> Four:
    """Three launches.

    `patchkit.kernels.triton.linear_attention` has tiles of its own, whatever ``chunk`` is.
    """
    from patchkit.kernels.triton.linear_attention import run

    x = Inputs(*args)
    check(x)
    return run(*x[:-1])
