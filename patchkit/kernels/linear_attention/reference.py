"""The op `linear_attention`: its reference, token by token, and the shapes of its outputs."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.kernels.linear_attention.inputs import Inputs, check, features
from patchkit.kernels.op import op


@op
def linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention through a state, ``out_t = f(q_t) S_t`` with ``S_t = S_{t-1} + f(k_t)^T v_t``, divided by ``f(q_t) . z_t`` if
    ``normalize``; f is elu + 1, relu or the identity; differentiable.

    ``z_t = z_{t-1} + f(k_t)``. Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236), equations 18 to 20. Everything is
    summed in fp32 (in fp64 for fp64 queries). Differentiable in q, k, v, state and normalizer.

    Args:
        q: [B, H, T, K] floating point, T >= 1.
        k: [B, G, T, K].
        v: [B, G, T, V].
        state: [B, G, F, V] float32, S before the first token; None for zeros.
        normalizer: [B, G, F] float32, z before the first token; None for zeros.
        mask: [B, T] bool, or None. Where it is False the features of the key are 0.
        feature_map: f, "elu1" (``elu(x) + 1``), "relu" or "identity".
        chunk: tokens per chunk in the chunked forms; it changes the rounding, nothing else.

    Returns:
        out [B, H, T, V] in q's dtype if ``normalize``, else float32; 0 where it would be divided by 0.
        denominator [B, H, T] float32, ``f(q_t) . z_t``.
        state [B, G, F, V] and normalizer [B, G, F] float32 after the last token.

    Raises:
        KernelError: an unknown feature map, shapes or devices that do not fit together, or chunk < 1.
    """
    fq, fk, values, state, normalizer = prepared(Inputs(q, k, v, state, normalizer, mask, feature_map, normalize, chunk))
    outs, denominators = [], []
    for t in range(q.shape[2]):
        state = state + fk[:, :, t, :, None] * values[:, :, t, None, :]
        normalizer = normalizer + fk[:, :, t]
        outs.append((fq[:, :, :, t, None] @ state[:, :, None]).squeeze(-2))
        denominators.append((fq[:, :, :, t] * normalizer[:, :, None]).sum(-1))
    out, denominator = torch.stack(outs, 3), torch.stack(denominators, 3)
    return (*finished(out, denominator, q, normalize), state, normalizer)


def prepared(x: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the queries [B, G, h, T, F] and of the keys, values, state and normalizer, in the dtype of the sums."""
    check(x)
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    groups, state, normalizer = x.k.shape[1], x.state, x.normalizer
    fq, fk = features(x.q.to(dtype), x.feature_map).unflatten(1, (groups, -1)), features(x.k.to(dtype), x.feature_map)
    if x.mask is not None:
        fk = fk.masked_fill(~x.mask[:, None, :, None], 0)
    if state is None:
        state = fk.new_zeros(*x.k.shape[:2], fk.shape[-1], x.v.shape[-1])
    if normalizer is None:
        normalizer = fk.new_zeros(*x.k.shape[:2], fk.shape[-1])
    return fq, fk, x.v.to(dtype), state.to(dtype), normalizer.to(dtype)


def finished(out: torch.Tensor, denominator: torch.Tensor, q: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, T, V] and denominator [B, H, T] as the op returns them, from out [B, G, h, T, V] and denominator [B, G, h, T]."""
    if normalize:
        out = torch.where(denominator[..., None] == 0, 0, out / denominator[..., None]).to(q.dtype)
    return out.flatten(1, 2), denominator.flatten(1, 2)


@linear_attention.fake
def _(*args: Any) -> Any:
    x = Inputs(*args)
    dtype = torch.promote_types(x.q.dtype, torch.float32)
    (batch, heads, tokens, width), groups, value_width = x.q.shape, x.k.shape[1], x.v.shape[-1]
    return (
        x.q.new_empty(batch, heads, tokens, value_width, dtype=x.q.dtype if x.normalize else dtype),
        x.q.new_empty(batch, heads, tokens, dtype=dtype),
        x.q.new_empty(batch, groups, width, value_width, dtype=dtype),
        x.q.new_empty(batch, groups, width, dtype=dtype),
    )
