"""verify_prefix_sampled: the length of a draft's prefix that the rejection rule accepts, and the token after it.

Shapes: R rows, T positions of the target's forward, so at most T - 1 drafted tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu
from patchkit.kernels.verify_prefix import triton_refuses


@op
def verify_prefix_sampled(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rejection rule of speculative sampling from given uniform draws: accepted length and next token, per row.

    Every token then has exactly the target's distribution, whatever the draft's is.

    With ``p_i = target[r, i]``, ``q_i = draft_probabilities[r, i]``, ``x_i = draft[r, i]``: x_i is accepted if all before it are and
    ``accept_draws[r, i] * q_i(x_i) < p_i(x_i)``. At the first rejection the next token is drawn from ``max(p_i - q_i, 0)``,
    normalised; after ``counts[r]`` accepted ones from p at position ``counts[r]``. Leviathan et al. 2023 (arXiv 2211.17192),
    algorithm 1; Chen et al. 2023 (arXiv 2302.01318), algorithm 2.

    Args:
        target: [R, T, V] float32 probabilities.
        draft_probabilities: [R, T - 1, V] float32, the distribution that each token was drawn from; one-hot where it was chosen.
        draft: [R, T - 1] int64; filler from ``counts[r]`` on. A token outside 0 .. V - 1 has probability 0 and is rejected.
        counts: [R] int64, 0 .. T - 1.
        accept_draws: [R, T - 1] float32, uniform on [0, 1).
        next_draws: [R] float32, uniform on [0, 1).

    Returns:
        accepted [R] int64. A token with p = 0 never is; nothing is divided by q, so q = 0 is allowed.
        next_token [R] int64, by the inverse CDF: the first index of positive weight at which the cumulative sum of the weights (float64)
        exceeds ``next_draws[r]`` times their total; the last index of positive weight if rounding leaves none; -1 if there is no
        positive weight, which only a target without any probability gives.

    Where the residual is zero everywhere the next token is drawn from p. In exact arithmetic a token is rejected with probability
    ``sum max(q - p, 0) = sum max(p - q, 0)``, so that none is rejected where the residual is zero: if it happens,
    rounding made q sum to more than p, the two agree up to rounding, and p itself is the distribution to draw from.
    """
    rows, positions = torch.arange(len(counts), device=counts.device), draft.shape[1]
    known = (draft >= 0) & (draft < target.shape[2]) & (torch.arange(positions, device=counts.device) < counts[:, None])
    tokens = torch.where(known, draft, 0)[..., None]
    p, q = target[:, :positions].gather(2, tokens)[..., 0], draft_probabilities.gather(2, tokens)[..., 0]
    accepted = (known & (accept_draws * q < p)).cumprod(1).sum(1)

    weights = target[rows, accepted]
    if positions:
        residual = (weights - draft_probabilities[rows, accepted.clamp(max=positions - 1)]).clamp(min=0)
        weights = torch.where(((accepted < counts) & residual.any(1))[:, None], residual, weights)
    cumulative = weights.double().cumsum(1)
    beyond = (cumulative > next_draws[:, None] * cumulative[:, -1:]) & (weights > 0)
    indices = torch.arange(weights.shape[1], device=counts.device)
    last = torch.where(weights > 0, indices, -1).amax(1)
    return accepted, torch.where(beyond.any(1), beyond.int().argmax(1), last)


@verify_prefix_sampled.fake
def _(target: Any, draft_probabilities: Any, draft: Any, counts: Any, accept_draws: Any, next_draws: Any) -> Any:
    return torch.empty_like(counts), torch.empty_like(counts)


@verify_prefix_sampled.definition
def _(target: Any, draft_probabilities: Any, draft: Any, counts: Any, accept_draws: Any, next_draws: Any) -> tuple[torch.Tensor, ...]:
    """Row by row. The products are fp32 by definition."""
    accepted, next_token = torch.zeros_like(counts), torch.zeros_like(counts)
    for row, count in enumerate(counts.tolist()):
        p, q, length = target[row].double(), draft_probabilities[row].double(), 0
        while length < count:
            token = int(draft[row, length])
            if not (0 <= token < p.shape[1] and (accept_draws[row, length].double() * q[length, token]).float() < p[length, token]):
                break
            length += 1
        weights = (p[length] - q[length]).float().double() if length < count else p[length]
        weights = weights.clamp(min=0) if (weights > 0).any() else p[length]
        share = float(next_draws[row]) * float(weights.sum())
        cumulative = weights.cpu().cumsum(0)  # one by one, so that it never falls
        positive = weights.cpu().nonzero()[:, 0].tolist()
        accepted[row] = length
        next_token[row] = next((index for index in positive if cumulative[index] > share), positive[-1])
    return accepted, next_token


@verify_prefix_sampled.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(r: int, t: int, v: int, noise: float = 1.0) -> list[torch.Tensor]:
        logits = torch.randn(r, t, v, generator=generator) * 2
        q = (logits[:, :-1] + noise * torch.randn(r, t - 1, v, generator=generator)).softmax(-1)
        draft = q.reshape(-1, v).multinomial(1, generator=generator).view(r, t - 1) if t > 1 else torch.zeros(r, 0, dtype=torch.int64)
        draws = torch.rand(r, t - 1, generator=generator), torch.rand(r, generator=generator)
        return [given.to(device) for given in (logits.softmax(-1), q, draft, torch.full((r,), t - 1), *draws)]

    yield "typical", tuple(make(1, 5, 4096))
    for r, t, v in ((1, 1, 7), (8, 5, 1000), (3, 2, 1), (2, 3, 50257), (4, 3, 1024), (12, 6, 33)):
        yield f"{r} x {t} x {v}", tuple(make(r, t, v))
    target, q, draft, counts, accept, last = make(8, 4, 333, noise=0.3)
    yield (
        "counts from 0 to 3, filler after them",
        (
            target,
            q,
            torch.where(torch.arange(3, device=device) < (torch.arange(8, device=device) % 4)[:, None], draft, -1),
            torch.arange(8, device=device) % 4,
            accept,
            last,
        ),
    )
    transposed = (given.transpose(0, 1).contiguous().transpose(0, 1) for given in (target, q))
    yield "probabilities that are not contiguous", (*transposed, draft, counts, accept, last)
    yield "tokens outside the vocabulary", (target, q, draft + torch.tensor([0, 333, -333], device=device), counts, accept, last)
    yield "a draft that is the target", (target, target[:, :-1], draft, counts, accept, last)
    one_hot = torch.nn.functional.one_hot(draft, 333).float()
    yield "a deterministic draft", (target, one_hot, draft, counts, accept, last)
    yield "no residual", (target, target[:, :-1] * (1 + 2e-7), draft, counts, torch.full_like(accept, 1 - 2**-24), last)
    sparse = torch.zeros(8, 4, 333, device=device)
    sparse[..., 7::50] = torch.tensor(1 / 7)
    yield "few tokens with any probability, draws at both ends", (sparse, q, draft, counts, accept, (last > 0.5) * (1 - 2**-24))


@verify_prefix_sampled.backend("cpu", refuses=not_on_cpu)
def _(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """NumPy, row by row: it reads the probabilities of the drafted tokens and of one position of every row, and no others.

    For a handful of tokens a call of NumPy costs a fifth of a torch operator.
    """
    # NumPy has no bfloat16, which converts exactly.
    given = target.detach(), draft_probabilities.detach(), accept_draws
    p, q, uniform = ((x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in given)
    accepted, next_tokens = [], []
    for row, (tokens, count, draw) in enumerate(zip(draft.tolist(), counts.tolist(), next_draws.tolist(), strict=True)):
        length = 0
        while length < count:
            token = tokens[length]
            # fp32 times fp32: the definition rounds this product
            if not (0 <= token < p.shape[2] and uniform[row, length] * q[row, length, token] < p[row, length, token]):
                break
            length += 1
        weights = p[row, length]
        if length < count:
            residual = np.maximum(weights - q[row, length], 0)
            weights = residual if residual.any() else weights
        cumulative = weights.cumsum(dtype=np.float64)
        index = int(cumulative.searchsorted(draw * cumulative[-1], side="right"))
        if index == len(weights):
            index = int(max(np.flatnonzero(weights), default=-1))
        accepted.append(length)
        next_tokens.append(index)
    return torch.tensor(accepted, dtype=torch.int64), torch.tensor(next_tokens, dtype=torch.int64)


@verify_prefix_sampled.backend("triton", refuses=triton_refuses)
def _(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch, one program per row."""
    from patchkit.kernels.triton.verify_prefix import run_sampled

    return run_sampled(target, draft_probabilities, draft, counts, accept_draws, next_draws)
