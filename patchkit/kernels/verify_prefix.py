"""verify_prefix: the length of a draft's prefix that greedy decoding would have given.

Shapes: R rows, T positions of the target's forward, so at most T - 1 drafted tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels import triton
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu


@op
def verify_prefix(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Argmax of the logits at every position, and the length of the draft's prefix that agrees with it, per row.

    ``choice[r, t] = argmax_v logits[r, t, v]``; ``accepted[r] = max {n <= counts[r]: draft[r, i] = choice[r, i] for all i < n}``.
    The greedy case of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): row r continues with its first ``accepted[r]``
    drafted tokens and ``choice[r, accepted[r]]``, the tokens of plain greedy decoding.

    Args:
        logits: [R, T, V] floating point; position t holds the target's logits after the sequence and t drafted tokens. T = 1: no draft.
        draft: [R, T - 1] int64; filler from ``counts[r]`` on.
        counts: [R] int64, 0 .. T - 1: the number of drafted tokens.

    Returns:
        choice [R, T] int64: of equal logits the lowest index; a NaN counts as the largest. torch.argmax has these rules.
        accepted [R] int64.
    """
    choice = logits.argmax(-1)
    drafted = torch.arange(draft.shape[1], device=draft.device) < counts[:, None]
    return choice, ((draft == choice[:, :-1]) & drafted).cumprod(1).sum(1)


@verify_prefix.fake
def _(logits: Any, draft: Any, counts: Any) -> Any:
    return draft.new_empty(logits.shape[:2]), torch.empty_like(counts)


@verify_prefix.definition
def _(logits: Any, draft: Any, counts: Any) -> tuple[torch.Tensor, ...]:
    """Position by position."""
    indices = torch.arange(logits.shape[2], device=logits.device)
    choice = torch.where(logits == logits.amax(-1, keepdim=True), indices, len(indices)).amin(-1)
    accepted, agrees = torch.zeros_like(counts), torch.ones_like(counts, dtype=torch.bool)
    for i in range(draft.shape[1]):
        agrees &= (i < counts) & (draft[:, i] == choice[:, i])
        accepted += agrees
    return choice, accepted


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


@verify_prefix.backend("cpu", refuses=not_on_cpu)
def _(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NumPy's argmax, which uses vector instructions where torch's does not.

    In fp32, to which 16-bit logits convert exactly; in fp64 for fp64 logits.
    """
    exact = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    choice = exact.contiguous().numpy().argmax(-1)
    rows = zip(draft.tolist(), choice.tolist(), counts.tolist(), strict=True)
    accepted = [next((i for i in range(count) if tokens[i] != right[i]), count) for tokens, right, count in rows]
    return torch.from_numpy(choice), torch.tensor(accepted, dtype=torch.int64)


def triton_refuses(x: torch.Tensor, *rest: Any) -> str | None:
    """Reason why the Triton kernels of both verifications cannot serve logits or probabilities x, or None."""
    return "there is nothing to verify" if x.numel() == 0 else triton.refusal(x)


@verify_prefix.backend("triton", refuses=triton_refuses)
def _(logits: torch.Tensor, draft: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass over the logits, two launches."""
    from patchkit.kernels.triton.verify_prefix import run

    return run(logits, draft, counts)
