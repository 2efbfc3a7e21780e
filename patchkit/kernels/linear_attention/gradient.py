"""Gradient of linear_attention, which consists of linear attentions.

With N = f(q) S and d = f(q) . z, and dN and dd their gradients, the gradients of the features are linear attentions themselves, one
forward in time and two backward: df(q)_t = dN_t S_t^T + dd_t z_t, df(k)_t = R_t v_t + r_t and dv_t = f(k)_t R_t, in which
R_t = dS_T + sum_{i >= t} f(q_i)^T dN_i and r_t = dz_T + sum_{i >= t} dd_i f(q_i). A cumulative sum is one with a single feature.
"""

from __future__ import annotations

from typing import Any

import torch

from patchkit.kernels.linear_attention.inputs import Inputs, features, slope
from patchkit.kernels.linear_attention.reference import linear_attention


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, state, normalizer, mask, ctx.feature_map, ctx.normalize, ctx.chunk = Inputs(*inputs)
    ctx.save_for_backward(q, k, v, state, normalizer, mask, output[0], output[1])


def _backward(ctx: Any, d_out: Any, d_denominator: Any, d_state: Any, d_normalizer: Any) -> Any:
    q, k, v, state, normalizer, mask, out, denominator = ctx.saved_tensors
    dtype = denominator.dtype
    q_raw, k_raw, values = q.to(dtype), k.to(dtype), v.to(dtype)
    fq, fk = features(q_raw, ctx.feature_map), features(k_raw, ctx.feature_map)
    if mask is not None:
        fk = fk.masked_fill(~mask[:, None, :, None], 0)
    d_out = d_out.to(dtype)
    if ctx.normalize:
        d_out = torch.where(denominator[..., None] == 0, 0, d_out / denominator[..., None])
        d_denominator = d_denominator - (d_out * out.to(dtype)).sum(-1)
    d_denominator = d_denominator[..., None]
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]

    def attention(queries: Any, keys: Any, values: Any, initial: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        out, _, last, _ = linear_attention(
            queries.contiguous(), keys.contiguous(), values.contiguous(), initial, None, None, "identity", False, ctx.chunk
        )
        return out, last

    ones = fk.new_ones(*fk.shape[:3], 1)
    d_q = attention(d_out, values, fk, None if state is None else state.mT.contiguous())[0]
    d_q = d_q + attention(d_denominator, ones, fk, None if normalizer is None else normalizer[:, :, None].contiguous())[0]

    def backward_in_time(queries: Any, keys: Any, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        repeated = queries.repeat_interleave(shared, 1)
        out, last = attention(*(x.flip(2) for x in (repeated, keys, values)))
        return out.flip(2).unflatten(1, (groups, shared)).sum(2), last.unflatten(1, (groups, shared)).sum(2)

    d_v, to_state = backward_in_time(fk, fq, d_out)
    d_k, to_normalizer = backward_in_time(ones, d_denominator, fq)
    d_k = d_k + backward_in_time(values, d_out, fq)[0] + values @ d_state.mT + d_normalizer[:, :, None]
    d_v = d_v + fk @ d_state
    d_k = d_k * slope(k_raw, ctx.feature_map)
    if mask is not None:
        d_k = d_k.masked_fill(~mask[:, None, :, None], 0)
    return (
        (d_q * slope(q_raw, ctx.feature_map)).to(q.dtype),
        d_k.to(k.dtype),
        d_v.to(v.dtype),
        None if state is None else (d_state + to_state).to(state.dtype),
        None if normalizer is None else (d_normalizer + to_normalizer.squeeze(2)).to(normalizer.dtype),
        *(None,) * 4,
    )


linear_attention.autograd(_backward, _setup_context)
