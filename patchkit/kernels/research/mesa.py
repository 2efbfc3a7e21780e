"""mesa: linear attention whose readout is the least-squares solution over all tokens so far. No patch runs it.

Shapes: B batch, H heads, G kv heads (query head h reads kv head h // (H / G)), T tokens, K head dimension, V value dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import KernelError
from patchkit.kernels.linear_attention import Inputs, check
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@op
def mesa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    regularizer: torch.Tensor,
    state: torch.Tensor | None = None,
    moments: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ridge regression on all tokens so far, ``out_t = q_t (M_t + diag(regularizer))^-1 S_t``.

    ``S_t = sum_{i <= t} k_i^T v_i`` and ``M_t = sum_{i <= t} k_i^T k_i``: the ridge regression of all values so far on their keys
    predicts out_t for q_t. von Oswald et al. 2025, "MesaNet" (arXiv 2506.05233), equations 4 to 6, without forgetting (all gates 1) and
    solved exactly instead of by conjugate gradients. Everything is computed in fp32 (in fp64 for fp64 queries). It has no gradient.

    Args:
        q: [B, H, T, K] floating point, T >= 1.
        k: [B, G, T, K].
        v: [B, G, T, V].
        regularizer: [G, K], positive.
        state: [B, G, K, V] float32, S before the first token; None for zeros.
        moments: [B, G, K, K] float32, M before the first token; None for zeros.
        mask: [B, T] bool, or None. Where it is False the key counts as 0.
        chunk: tokens per chunk in the chunked form; it changes the rounding, nothing else.

    Returns:
        out [B, H, T, V] in q's dtype, state [B, G, K, V] and moments [B, G, K, K] float32 after the last token.

    Raises:
        KernelError: shapes or devices that do not fit together, or (on a CPU) a regularizer that is not positive.
    """
    queries, keys, values, state, moments = _prepared(q, k, v, regularizer, state, moments, mask, chunk)
    ridge = torch.diag_embed(regularizer.to(queries.dtype))
    outs = []
    for t in range(q.shape[2]):
        state = state + keys[:, :, t, :, None] * values[:, :, t, None, :]
        moments = moments + keys[:, :, t, :, None] * keys[:, :, t, None, :]
        outs.append(torch.linalg.solve(moments + ridge, queries[:, :, :, t].mT).mT @ state)
    return torch.stack(outs, 3).flatten(1, 2).to(q.dtype), state, moments


def _prepared(q: Any, k: Any, v: Any, regularizer: Any, state: Any, moments: Any, mask: Any, chunk: int) -> tuple[torch.Tensor, ...]:
    """Queries [B, G, h, T, K], keys, values, state and moments, in the dtype of the sums."""
    check(Inputs(q, k, v, mask=mask, feature_map="identity", chunk=chunk))
    if regularizer.device.type == "cpu" and not bool((regularizer > 0).all()):  # elsewhere the check would wait for the device
        raise KernelError("the regularizer has to be positive: a matrix of fewer keys than dimensions has no inverse without it")
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(dtype) if mask is None else k.to(dtype).masked_fill(~mask[:, None, :, None], 0)
    width = k.shape[-1]
    state = keys.new_zeros(*k.shape[:2], width, v.shape[-1]) if state is None else state.to(dtype)
    moments = keys.new_zeros(*k.shape[:2], width, width) if moments is None else moments.to(dtype)
    return q.to(dtype).unflatten(1, (k.shape[1], -1)), keys, v.to(dtype), state, moments


@mesa.fake
def _(q: Any, k: Any, v: Any, regularizer: Any, state: Any = None, moments: Any = None, mask: Any = None, chunk: int = 64) -> Any:
    dtype, width = torch.promote_types(q.dtype, torch.float32), k.shape[-1]
    return (
        q.new_empty(*q.shape[:3], v.shape[-1]),
        q.new_empty(*k.shape[:2], width, v.shape[-1], dtype=dtype),
        q.new_empty(*k.shape[:2], width, width, dtype=dtype),
    )


@mesa.definition
def _(
    q: Any, k: Any, v: Any, regularizer: Any, state: Any = None, moments: Any = None, mask: Any = None, chunk: int = 64
) -> tuple[torch.Tensor, ...]:
    """All tokens at once, by inverse matrices."""
    keys = k.double() if mask is None else torch.where(mask[:, None, :, None], k.double(), 0.0)
    to_state, to_moments = ((keys[..., None] * x.double()[..., None, :]).cumsum(2) for x in (v, keys))
    to_state = to_state if state is None else to_state + state.double()[:, :, None]
    to_moments = to_moments if moments is None else to_moments + moments.double()[:, :, None]
    readout = torch.linalg.inv(to_moments + torch.diag_embed(regularizer.double())[:, None]) @ to_state
    out = q.double()[..., None, :] @ readout.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return out.squeeze(-2), to_state[:, :, -1], to_moments[:, :, -1]


@mesa.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(b: int, h: int, g: int, t: int, k: int, v: int, *rest: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        drawn = (torch.randn(b, heads, t, width, generator=generator) for heads, width in ((h, k), (g, k), (g, v)))
        return *(x.to(device, dtype) for x in drawn), torch.rand(g, k, generator=generator).to(device) + 1, *rest

    yield "typical", make(1, 2, 2, 70, 16, 16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, h, g, t, k, v in ((1, 1, 1, 1, 8, 8), (2, 4, 2, 63, 12, 20), (1, 2, 1, 33, 32, 8)):
            yield f"{b} x {h}/{g} x {t} x {k}/{v}, {dtype}", make(b, h, g, t, k, v, dtype=dtype)
    mask = torch.tensor([[False] * 10 + [True] * 20, [True] * 25 + [False] * 5], device=device)
    yield "padding", make(2, 2, 2, 30, 16, 8, None, None, mask, 8)
    moments = torch.eye(16, device=device).expand(1, 2, 16, 16) * 5
    yield "resumed", make(1, 2, 2, 30, 16, 8, torch.ones(1, 2, 16, 8, device=device), moments, None, 16)


# In a chunk M_t = M + K_t^T K_t, K_t being its keys up to t. With A = (M + diag(regularizer))^-1, from the chunk's beginning, Woodbury's
# identity needs a system of the chunk's size for each token: (M_t + diag)^-1 q = A q - A K_t^T (1 + K_t A K_t^T)^-1 K_t A q. The matrix
# 1 + K A K^T = L L^T is factored once: the leading blocks of L are the factors of the leading blocks.


@mesa.backend("cpu", refuses=not_on_cpu, rounding=2e-5)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    regularizer: torch.Tensor,
    state: torch.Tensor | None = None,
    moments: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    chunk: int = 64,
) -> Three:
    """Two factorisations per chunk instead of a solution per token, in fp64.

    A small regularizer cancels in the difference, hence fp64.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values, state, moments = (x.double() for x in _prepared(q, k, v, regularizer, state, moments, mask, chunk))
    ridge = torch.diag_embed(regularizer.to(queries.dtype))
    out = queries.new_empty(*queries.shape[:4], v.shape[-1])
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        of_chunk, seen, new = queries[:, :, :, part], keys[:, :, part], values[:, :, part]
        solved = torch.cholesky_solve(torch.cat([of_chunk.flatten(2, 3), seen], 2).mT, torch.linalg.cholesky(moments + ridge)).mT
        a_q, a_k = solved[:, :, : -seen.shape[2]].unflatten(2, of_chunk.shape[2:4]), solved[:, :, -seen.shape[2] :]  # A is symmetric
        identity = torch.eye(seen.shape[2], dtype=seen.dtype, device=seen.device)
        factor = torch.linalg.cholesky(identity + seen @ a_k.mT)
        # What token t sees of L^-1 K A q_t are its first t entries, and likewise of L^-1 K A.
        reduced = torch.linalg.solve_triangular(factor[:, :, None], seen[:, :, None] @ a_q.mT, upper=False).mT.tril()
        x = a_q - reduced @ torch.linalg.solve_triangular(factor, a_k, upper=False)[:, :, None]
        out[:, :, :, part] = x @ state[:, :, None] + (x @ seen.mT[:, :, None]).tril() @ new[:, :, None]
        state = state + seen.mT @ new
        moments = moments + seen.mT @ seen
    return out.flatten(1, 2).to(q.dtype), state.to(dtype), moments.to(dtype)
