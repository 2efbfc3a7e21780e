"""linear_attention_step: `linear_attention` of one token, the state updated in place.

The patch `linear` takes its steps with torch's operators (`patchkit.linear.cache`), which a compiled step fuses with the rest.

Shapes: as in `patchkit.kernels.linear_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels.linear_attention import check_arguments, features, finished, linear_attention, not_on_cpu, triton_refuses
from patchkit.kernels.op import op


@op(mutates=("state", "normalizer"))
def linear_attention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`linear_attention` of one token, T = 1, whose state and normalizer are brought up to date in place; there is no gradient.

    Returns:
        out [B, H, 1, V] and denominator [B, H, 1], as `linear_attention` does.
    """
    out, denominator, after, sums = linear_attention.reference(q, k, v, state, normalizer, mask, feature_map, normalize, 1)
    state.copy_(after)
    normalizer.copy_(sums)
    return out, denominator


@linear_attention_step.fake
def _(q: Any, k: Any, v: Any, state: Any, normalizer: Any, mask: Any = None, feature_map: str = "elu1", normalize: bool = True) -> Any:
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = *q.shape[:3], v.shape[-1]
    return q.new_empty(shape, dtype=q.dtype if normalize else dtype), q.new_empty(q.shape[:3], dtype=dtype)


@linear_attention_step.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(b: int, h: int, g: int, k: int, v: int, *rest: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        new = (draw(b, heads, 1, width).to(dtype) for heads, width in ((h, k), (g, k), (g, v)))
        return *new, draw(b, g, k, v), draw(b, g, k).abs() * 5, *rest

    yield "typical", make(1, 8, 8, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, h, g, k, v in ((1, 1, 1, 8, 8), (2, 6, 2, 60, 44), (1, 4, 4, 256, 256), (3, 8, 1, 96, 128)):
            yield f"{b} x {h}/{g} x {k}/{v}, {dtype}", make(b, h, g, k, v, dtype=dtype)
    for kind, normalize in (("elu1", False), ("relu", True), ("relu", False), ("identity", False)):
        yield f"{kind}, normalize {normalize}", make(2, 4, 2, 24, 40, None, kind, normalize)
    mask = torch.tensor([[True], [False]], device=device)
    yield "a row of padding", make(2, 4, 2, 24, 40, mask, "elu1", True)


@linear_attention_step.backend("cpu", refuses=not_on_cpu)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state is updated where it lies and then read once, for all heads that share it."""
    check_arguments(q, k, v, mask, feature_map, 1, state, normalizer)
    dtype = state.dtype
    fq, fk = features(q.to(dtype), feature_map), features(k.to(dtype), feature_map)
    if mask is not None:
        fk = fk.masked_fill(~mask[:, None, :, None], 0)
    state.addcmul_(fk.mT, v.to(dtype))
    normalizer.add_(fk[:, :, 0])
    grouped = fq.unflatten(1, (k.shape[1], -1)).squeeze(3)
    out, denominator = grouped @ state, grouped @ normalizer[..., None]
    return finished(out[:, :, :, None], denominator, q, normalize)


def _triton_step_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: torch.Tensor, *rest: Any) -> str | None:
    return triton_refuses(q, k, v) or (None if state.is_contiguous() and rest[0].is_contiguous() else "the state is not contiguous")


@linear_attention_step.backend("triton", refuses=_triton_step_refuses)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    normalizer: torch.Tensor,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`patchkit.kernels.triton.linear_attention`: one launch."""
    from patchkit.kernels.triton.linear_attention import run_step

    check_arguments(q, k, v, mask, feature_map, 1, state, normalizer)
    return run_step(q, k, v, state, normalizer, mask, feature_map, normalize)
