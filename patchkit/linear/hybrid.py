"""Hybrid attention: softmax over sinks and a window, linear attention over everything older, under one normaliser.

With scores ``s_j = scaling * q_i . k_j``, ``c`` the largest score that query i sees, old tokens ``o`` (those that are neither sinks nor
among the last W), ``n`` their number:

    y_i = (sum_visible exp(s_j - c) v_j + a_i sum_old (map(q_i) . map(k_j)) v_j)
        / (sum_visible exp(s_j - c)     + a_i sum_old  map(q_i) . map(k_j))

    a_i = exp(factor) * min(1, horizon / n)

This is the form of LoLCATs (Zhang et al. 2024, https://arxiv.org/abs/2410.10254, equation 6) while ``n <= horizon``. Beyond, the sum over
old tokens becomes their mean times the horizon. Otherwise their weight would grow without limit, past any length seen in training.
The linear part takes queries and keys without their rotation ("plain"), so it does not depend on positions.

Shapes: B batch, H heads, G kv heads (H = G * h), T tokens, K head dimension, V value dimension, F features, S sinks, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from patchkit.kernels.linear_attention import linear_attention
from patchkit.linear.feature_maps import make_feature_map

# Tokens that the chunked form takes at once.
CHUNK = 64


class HybridAttention(nn.Module):
    """Parameters of one layer's hybrid attention, in addition to the model's own projections.

    Attributes:
        query_map, key_map: feature maps of the H heads and of the G kv heads.
        factor: [H] log of the weight of old tokens; initially ``-log F``.
        readout: [H, V, V], maps each head's output, ``y @ readout``; None for the identity.
        horizon: number of old tokens at which their total weight stops growing; None for never.
    """

    def __init__(self, feature_map: str, heads: int, kv_heads: int, head_dim: int, value_dim: int, horizon: int | None = None) -> None:
        super().__init__()
        self.query_map = make_feature_map(feature_map, heads, head_dim)
        self.key_map = make_feature_map(feature_map, kv_heads, head_dim)
        self.factor = nn.Parameter(-torch.full((heads,), float(self.key_map.n_features)).log())
        self.readout: nn.Parameter | None = None
        self.value_dim = value_dim
        self.horizon = horizon

    def add_readout(self) -> None:
        """Add a readout, initially the identity."""
        self.readout = nn.Parameter(torch.eye(self.value_dim).repeat(len(self.factor), 1, 1))

    def combine(
        self,
        numerator: torch.Tensor,
        denominator: torch.Tensor,
        old_numerator: torch.Tensor,
        old_denominator: torch.Tensor,
        count: torch.Tensor,
    ) -> torch.Tensor:
        """Outputs [B, H, T, V] float32 of the softmax part and the linear part together.

        Args:
            numerator, denominator: [B, H, T, V] and [B, H, T] float32 of the softmax part, relative to its best score.
            old_numerator, old_denominator: [B, H, T, V] and [B, H, T] float32 of the linear part.
            count: [B or 1, T] number of old tokens of each query.
        """
        weight = self.factor.float().exp()[None, :, None]
        if self.horizon is not None:
            weight = weight * (self.horizon / count.float().clamp(min=self.horizon))[:, None]
        y = (numerator + weight[..., None] * old_numerator) / (denominator + weight * old_denominator)[..., None]
        return self.read(y)

    def read(self, y: torch.Tensor) -> torch.Tensor:
        """Apply the readout, if there is one, to outputs [B, H, T, V]."""
        return y if self.readout is None else y @ self.readout.float()


def softmax_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator [B, H, T, V] and denominator [B, H, T] (float32) of softmax attention, relative to each query's best score.

    Args:
        q: [B, H, T, K]; k, v: [B, G, N, K] and [B, G, N, V].
        visible: [B or 1, 1, T, N] bool, with at least one key for every query; None: every query sees all keys.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).float() * scaling  # [B, G, h, T, K]
    scores = grouped @ k.float().mT[:, :, None]
    if visible is not None:
        scores = scores.masked_fill(~visible[:, :, None], -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
    return (weights @ v.float()[:, :, None]).flatten(1, 2), weights.sum(-1).flatten(1, 2)


def banded_softmax_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, scaling: float, sinks: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator [B, H, T, V] and denominator [B, H, T] (float32) of softmax attention over a sliding window and sinks, in time O(T W).

    Args:
        q: [B, H, T, K].
        k, v: [B, G, P + T, K] and [B, G, P + T, V]; query t's own key is number P + t.
        window: W, number of last keys that a query sees, its own included. A window that reaches before key 0 is cut there.
        sinks: S; all later queries see the keys 0 .. S - 1.
    """
    tokens, reach = q.shape[2], window - 1 + q.shape[2]
    sinks = min(sinks, k.shape[2])
    if k.shape[2] > sinks + reach:  # nothing between the sinks and the first window is seen
        k, v = (torch.cat([x[:, :, :sinks], x[:, :, -reach:]], 2) for x in (k, v))
    past = k.shape[2] - tokens
    if tokens + past <= window or window >= tokens:
        own, keys = torch.arange(past, past + tokens, device=q.device)[:, None], torch.arange(past + tokens, device=q.device)
        seen = (keys <= own) & ((keys > own - window) | (keys < sinks))
        return softmax_part(q, k, v, seen[None, None], scaling)
    # Blocks of W queries; each sees keys of this block and of the one before.
    blocks = -(-tokens // window)
    behind = blocks * window - tokens
    grouped = F.pad(q.unflatten(1, (k.shape[1], -1)).float() * scaling, (0, 0, 0, behind)).unflatten(3, (blocks, window))
    front = window - past
    key_blocks, value_blocks = (F.pad(x.float(), (0, 0, front, behind)).unfold(2, 2 * window, window)[:, :, None] for x in (k, v))
    scores = grouped @ key_blocks  # [B, G, h, blocks, W, 2 W]
    query, key = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    number = key - front + window * torch.arange(blocks, device=q.device)[:, None, None]  # of the key; negative: no such key
    seen = (key > query) & (key <= query + window) & (number >= 0)
    scores = scores.masked_fill(~seen, -torch.inf)
    extra = None
    if sinks:
        extra = grouped @ k[:, :, None, None, :sinks].float().mT  # [B, G, h, blocks, W, S]
        own = past + query + window * torch.arange(blocks, device=q.device)[:, None, None]  # the query's own key
        behind_window = torch.arange(sinks, device=q.device) <= own - window
        extra = extra.masked_fill(~behind_window, -torch.inf)
    best = scores.amax(-1, keepdim=True) if extra is None else torch.maximum(scores.amax(-1, keepdim=True), extra.amax(-1, keepdim=True))
    best = best.detach()
    weights = (scores - best).exp()
    numerator, denominator = weights @ value_blocks.mT, weights.sum(-1)
    if extra is not None:
        extra = (extra - best).exp()
        numerator = numerator + extra @ v[:, :, None, None, :sinks].float()
        denominator = denominator + extra.sum(-1)
    return numerator.flatten(3, 4)[:, :, :, :tokens].flatten(1, 2), denominator.flatten(3, 4)[..., :tokens].flatten(1, 2)


def hybrid_attention(
    part: HybridAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plain_q: torch.Tensor,
    plain_k: torch.Tensor,
    window: int,
    scaling: float,
    sinks: int = 0,
) -> torch.Tensor:
    """Outputs [B, H, T, V] float32 of hybrid attention over whole sequences, from their first token on; differentiable.

    Args:
        q, k, v: [B, H, T, K], [B, G, T, K], [B, G, T, V] as the model's attention receives them.
        plain_q, plain_k: [B, H, T, K] and [B, G, T, K], these queries and keys without rotation.
        window, sinks: W and S, in tokens.
    """
    tokens = q.shape[2]
    numerator, denominator = banded_softmax_part(q, k, v, window, scaling, sinks)
    if tokens <= window:
        return part.read(numerator / denominator[..., None])
    # The key that leaves the window as query t arrives is number t - W: both streams advance together.
    features, old = part.query_map(plain_q), part.key_map(plain_k[:, :, : tokens - window])
    if sinks:
        old = torch.cat([torch.zeros_like(old[:, :, :sinks]), old[:, :, sinks:]], 2)
    late = features[:, :, window:]
    old_numerator, old_denominator, _, _ = linear_attention(
        late.contiguous(), old.contiguous(), v[:, :, : tokens - window].float().contiguous(), None, None, None, "identity", False, CHUNK
    )
    count = (torch.arange(1, tokens - window + 1, device=q.device) - sinks).clamp(min=0)[None]
    young = numerator[:, :, :window] / denominator[:, :, :window, None]
    mixed = part.combine(numerator[:, :, window:], denominator[:, :, window:], old_numerator, old_denominator, count)
    return torch.cat([part.read(young), mixed], 2)
