"""linear_attention in float64, by the matrix of all weights ``f(q_i) . f(k_j)``, j <= i."""

from __future__ import annotations

from typing import Any

import torch

from patchkit.kernels.linear_attention.inputs import Inputs
from patchkit.kernels.linear_attention.reference import linear_attention

_MAPS = {"elu1": lambda x: torch.where(x > 0, x + 1, x.exp()), "relu": lambda x: x.clamp(min=0), "identity": lambda x: x}


@linear_attention.definition
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    q, k, v, state, normalizer, mask, feature_map, normalize, _ = Inputs(*args)
    shared, (fq, fk), values = q.shape[1] // k.shape[1], (_MAPS[feature_map](x.double()) for x in (q, k)), v.double()
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
