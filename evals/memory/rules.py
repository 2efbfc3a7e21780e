"""Rules of choice, as scores over a text that has been read: what a stream knows of a token when it leaves the window, and no more.

Shapes: B batch rows, G kv heads, T tokens, K key dim. A score is [B, G, T]; the higher, the rather a token is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def running_mean(x: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """Mean over tokens 0 .. j + delay of x [B, G, T, K], for every token j."""
    total = x.cumsum(2) / torch.arange(1, x.shape[2] + 1)[:, None]
    at = (torch.arange(x.shape[2]) + delay).clamp(max=x.shape[2] - 1)
    return total[:, :, at]


def keydiff(k: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """Minus the cosine of a key and the mean key (KeyDiff, 2504.15364)."""
    return -F.cosine_similarity(k, running_mean(k, delay), dim=-1)


def unit_keydiff(k: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """Minus the cosine of a key and the mean of the directions of keys."""
    return -F.cosine_similarity(k, running_mean(F.normalize(k, dim=-1), delay), dim=-1)


def centred(k: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """Distance of a key from the mean key, in units of the spread of each dimension (Mahalanobis with a diagonal)."""
    mean = running_mean(k, delay)
    var = (running_mean(k * k, delay) - mean * mean).clamp(min=1e-4)
    return ((k - mean) ** 2 / var).mean(-1)


def distance(k: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """Distance of a key from the mean key."""
    return (k - running_mean(k, delay)).norm(dim=-1)


def local(k: torch.Tensor, reach: int = 16) -> torch.Tensor:
    """Minus the cosine of a key and the mean key of its neighbours."""
    flat = k.transpose(2, 3).flatten(0, 1)
    mean = F.avg_pool1d(flat, 2 * reach + 1, 1, reach, count_include_pad=False).transpose(1, 2).view(k.shape)
    return -F.cosine_similarity(k, mean, dim=-1)


def lag(k: torch.Tensor, v: torch.Tensor, reach: int = 32) -> torch.Tensor:
    """LagKV (2504.04704): spread over channels, after scaling by the range of the tokens that follow."""
    total: Any = 0
    for x in (k, v):
        padded = F.pad(x.transpose(2, 3).flatten(0, 1), (0, reach), mode="replicate")
        high = F.max_pool1d(padded, reach, 1)[..., 1:].transpose(1, 2).view(x.shape)
        low = -F.max_pool1d(-padded, reach, 1)[..., 1:].transpose(1, 2).view(x.shape)
        total = total + ((x - low) / (high - low).clamp(min=1e-3)).std(-1)
    return total


def pooled(score: torch.Tensor, width: int = 7) -> torch.Tensor:
    return F.max_pool1d(score.flatten(0, 1)[:, None], width, 1, width // 2)[:, 0].view(score.shape)


def mean_pooled(score: torch.Tensor, width: int = 7) -> torch.Tensor:
    return F.avg_pool1d(score.flatten(0, 1)[:, None], width, 1, width // 2, count_include_pad=False)[:, 0].view(score.shape)


def z(score: torch.Tensor, delay: int = 32) -> torch.Tensor:
    """The score in standard deviations from its running mean, per head."""
    x = score[..., None]
    mean = running_mean(x, delay)
    return ((x - mean) / (running_mean(x * x, delay) - mean * mean).clamp(min=1e-6).sqrt())[..., 0]


def left(end: int, window: int, block: int) -> int:
    """Tokens below this have competed before token ``end``: at a border those that the coming block will push out of the window."""
    return max(0, end // block * block - window + block)


def top(score: torch.Tensor, gone: int, window: int, sinks: int, slots: int, joint: bool) -> torch.Tensor:
    """Mask [B, G, n] of tokens kept out of those before ``gone``, per head or, ``joint``, in one competition of the layer's heads."""
    _, groups, tokens = score.shape
    eligible = score.clone()
    eligible[..., :sinks] = -torch.inf
    eligible[..., gone:] = -torch.inf
    kept = torch.zeros_like(score, dtype=torch.bool)
    count = min(slots, gone - sinks)
    if joint:
        flat = eligible.flatten(1)
        kept = kept.flatten(1).scatter(1, flat.topk(count * groups, 1).indices, True).view(score.shape)
    else:
        kept = kept.scatter(2, eligible.topk(count, 2).indices, True)
    kept[..., :sinks] = True
    kept[..., tokens - window :] = True
    return kept
