"""verify_prefix and verify_prefix_sampled: how much of a draft stands, given what the target says about every position of it.

Shapes: R rows, T positions that the target was run on, so at most T - 1 drafted tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from patchkit.kernels import triton
from patchkit.kernels.op import op


@op
def verify_prefix(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``choice[r, t] = argmax_v logits[r, t, v]``; ``accepted[r] = max {n <= counts[r]: draft[r, i] = choice[r, i] for all i < n}``.

    The greedy case of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): row r goes on with its first ``accepted[r]``
    drafted tokens and ``choice[r, accepted[r]]``, which is what plain greedy decoding gives.

    Args:
        logits: [R, T, V] floating point; position t is what the target says after the text and t drafted tokens. T = 1: no draft.
        draft: [R, T - 1] int64; filler from ``counts[r]`` on.
        counts: [R] int64, 0 .. T - 1: how many tokens are drafted.

    Returns:
        choice [R, T] int64: of equal logits the lowest index, as torch.argmax gives; a NaN counts as the largest, as it does there.
        accepted [R] int64.
    """
    choice = logits.argmax(-1)
    drafted = torch.arange(draft.shape[1], device=draft.device) < counts[:, None]
    return choice, ((draft == choice[:, :-1]) & drafted).cumprod(1).sum(1)


@verify_prefix.fake
def _(logits: Any, draft: Any, counts: Any) -> Any:
    return draft.new_empty(logits.shape[:2]), torch.empty_like(counts)


@verify_prefix.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(r: int, t: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.randn(r, t, v, generator=generator).to(dtype)
        # Every row has another number of right tokens, none and all included.
        draft = logits[:, :-1].argmax(-1)
        wrong = torch.arange(r) % t
        for row in range(r):
            draft[row, wrong[row] : wrong[row] + 1] = (draft[row, wrong[row] : wrong[row] + 1] + 1) % v
        return logits.to(device), draft.to(device), torch.full((r,), t - 1, device=device)

    yield "typical", make(1, 5, 4096)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for r, t, v in ((1, 1, 7), (6, 5, 1000), (3, 2, 1), (1, 3, 50257), (2, 17, 130), (5, 4, 1024)):
            yield f"{r} x {t} x {v}, {dtype}", make(r, t, v, dtype)
    logits, draft, counts = make(6, 4, 333)
    yield "counts from 0 to 3", (logits, logits[:, :-1].argmax(-1), torch.arange(6, device=device) % 4)
    yield "logits that are not contiguous", (logits.transpose(0, 1).contiguous().transpose(0, 1), draft, counts)
    yield "a part of the logits", (make(3, 9, 333)[0][:, -4:], draft[:3], counts[:3])
    ties = torch.randint(0, 2, (4, 3, 5000), generator=generator).to(device).float()
    yield "ties", (ties, ties[:, :-1].argmax(-1), counts[:4].clamp(max=2))
    ties[:, :, :4990] = -torch.inf
    yield "ties at the end", (ties, ties[:, :-1].argmax(-1), counts[:4].clamp(max=2))
    yield "zeros of both signs", (torch.tensor([[[-1.0, -0.0, 0.0, -0.0]]], device=device), draft[:1, :0], counts[:1] * 0)
    yield "all logits -inf", (torch.full((1, 1, 9), -torch.inf, device=device), draft[:1, :0], counts[:1] * 0)


@op
def verify_prefix_sampled(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rejection rule, after which every token has exactly the target's distribution, whatever the draft's is.

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
        accepted [R] int64. A token with p = 0 never is; nothing is divided by q, so that q = 0 does no harm.
        next_token [R] int64, by the inverse CDF: the first index of positive weight at which the cumulative sum of the weights (float64)
        exceeds ``next_draws[r]`` times their total; the last index of positive weight if rounding leaves none; -1 if there is no
        positive weight, which only a target without any probability gives.

    Where the residual is zero everywhere the next token is drawn from p. In exact arithmetic a token is rejected with probability
    ``sum max(q - p, 0) = sum max(p - q, 0)``, so that none is where the residual is zero: rounding made q sum to more than p, the two
    agree up to rounding, and p itself is the distribution that is wanted.
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
    turned = (given.transpose(0, 1).contiguous().transpose(0, 1) for given in (target, q))
    yield "probabilities that are not contiguous", (*turned, draft, counts, accept, last)
    yield "tokens outside the vocabulary", (target, q, draft + torch.tensor([0, 333, -333], device=device), counts, accept, last)
    yield "a draft that is the target", (target, target[:, :-1], draft, counts, accept, last)
    one_hot = torch.nn.functional.one_hot(draft, 333).float()
    yield "a deterministic draft", (target, one_hot, draft, counts, accept, last)
    yield "no residual", (target, target[:, :-1] * (1 + 2e-7), draft, counts, torch.full_like(accept, 1 - 2**-24), last)
    sparse = torch.zeros(8, 4, 333, device=device)
    sparse[..., 7::50] = torch.tensor(1 / 7)
    yield "few tokens with any probability, draws at both ends", (sparse, q, draft, counts, accept, (last > 0.5) * (1 - 2**-24))


# -- CPU -------------------------------------------------------------------------------------------------------------------------
#
# NumPy's argmax uses vector instructions, torch's does not, and for a handful of tokens a call of it costs a fifth of a torch operator.


def _not_on_cpu(x: torch.Tensor, *rest: Any) -> str | None:
    return None if x.device.type == "cpu" else f"{x.device.type} tensors: it is for a CPU"


@verify_prefix.backend("cpu", refuses=_not_on_cpu)
def _(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NumPy's argmax in fp32, to which 16-bit logits convert exactly; fp64 as it is."""
    exact = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    choice = exact.contiguous().numpy().argmax(-1)
    rows = zip(draft.tolist(), choice.tolist(), counts.tolist(), strict=True)
    accepted = [next((i for i in range(count) if tokens[i] != right[i]), count) for tokens, right, count in rows]
    return torch.from_numpy(choice), torch.tensor(accepted, dtype=torch.int64)


@verify_prefix_sampled.backend("cpu", refuses=_not_on_cpu)
def _(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row: only the probabilities of the drafted tokens and of one position of every row are read."""
    # NumPy has no bfloat16, which converts exactly.
    given = target.detach(), draft_probabilities.detach(), accept_draws
    p, q, uniform = ((x.float() if x.dtype == torch.bfloat16 else x).numpy() for x in given)
    accepted, next_tokens = [], []
    for row, (tokens, count, draw) in enumerate(zip(draft.tolist(), counts.tolist(), next_draws.tolist(), strict=True)):
        stand = 0
        while stand < count:
            token = tokens[stand]
            # fp32 times fp32, as the definition has it
            if not (0 <= token < p.shape[2] and uniform[row, stand] * q[row, stand, token] < p[row, stand, token]):
                break
            stand += 1
        weights = p[row, stand]
        if stand < count:
            residual = np.maximum(weights - q[row, stand], 0)
            weights = residual if residual.any() else weights
        cumulative = weights.cumsum(dtype=np.float64)
        index = int(cumulative.searchsorted(draw * cumulative[-1], side="right"))
        if index == len(weights):
            index = int(max(np.flatnonzero(weights), default=-1))
        accepted.append(stand)
        next_tokens.append(index)
    return torch.tensor(accepted, dtype=torch.int64), torch.tensor(next_tokens, dtype=torch.int64)


# -- Triton -----------------------------------------------------------------------------------------------------------------------


def _triton_refuses(x: torch.Tensor, *rest: Any) -> str | None:
    return "there is nothing to verify" if x.numel() == 0 else triton.refusal(x)


@verify_prefix.backend("triton", refuses=_triton_refuses)
def _(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`patchkit.kernels.triton.verify_prefix`: one pass over the logits, two launches."""
    from patchkit.kernels.triton.verify_prefix import run

    return run(logits, draft, counts)


@verify_prefix_sampled.backend("triton", refuses=_triton_refuses)
def _(
    target: torch.Tensor,
    draft_probabilities: torch.Tensor,
    draft: torch.Tensor,
    counts: torch.Tensor,
    accept_draws: torch.Tensor,
    next_draws: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`patchkit.kernels.triton.verify_prefix`: one launch, one program per row."""
    from patchkit.kernels.triton.verify_prefix import run_sampled

    return run_sampled(target, draft_probabilities, draft, counts, accept_draws, next_draws)
