"""linear_attention_step: `linear_attention` of one token, the state updated in place.

No patch runs it: `linear` decodes with torch's operators (`patchkit.linear.cache`), which a compiled step fuses with the rest.

Shapes: B batch, H heads, G kv heads (query head h reads kv head h // (H / G)), K head dimension, V value dimension, F = K features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.kernels.linear_attention import Inputs, check, features, finished, linear_attention
from patchkit.kernels.linear_attention.backends import triton_refuses
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu


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
    """`linear_attention` of one token, whose state and normalizer are updated in place; no gradient.

    Args:
        q: [B, H, 1, K] floating point.
        k: [B, G, 1, K].
        v: [B, G, 1, V].
        state: [B, G, F, V] float32, updated.
        normalizer: [B, G, F] float32, updated.
        mask: [B, 1] bool, or None. Where it is False the features of the key are 0.
        feature_map: "elu1", "relu" or "identity".

    Returns:
        out [B, H, 1, V] in q's dtype if ``normalize``, else float32, and denominator [B, H, 1] float32.
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


@linear_attention_step.definition
def _(*args: Any) -> tuple[torch.Tensor, ...]:
    return linear_attention.exact(*args)


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
    """Torch operators in place; the state is read once for all heads that share it."""
    check(Inputs(q, k, v, state, normalizer, mask, feature_map))
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
    """One launch."""
    from patchkit.kernels.triton.linear_attention import run_step

    check(Inputs(q, k, v, state, normalizer, mask, feature_map))
    return run_step(q, k, v, state, normalizer, mask, feature_map, normalize)
