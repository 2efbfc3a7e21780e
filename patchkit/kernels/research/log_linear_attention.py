"""log_linear_attention: linear attention with a state for each of log T spans of the past, and a weight for each. No patch runs it.

Shapes: B batch, H heads, G kv heads (query head h reads kv head h // (H / G)), T tokens, K head dimension, V value dimension, L levels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import KernelError
from patchkit.kernels.linear_attention import Inputs, check
from patchkit.kernels.op import op
from patchkit.kernels.refusals import not_on_cpu


@op
def log_linear_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    states: torch.Tensor | None = None,
    past: int = 0,
    mask: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear attention with a state for each span of a Fenwick tree over the past, and a weight for each level and query.

    ``out_t = sum_l weights[t, l] q_t S_t^l``, ``S_t^l = sum k_i^T v_i`` over the tokens i that are at level l of token t.
    Level 0 is the token itself; the t tokens before it are the spans of a Fenwick tree: one span of 2^(l-1) tokens at level l for
    each bit l - 1 that is set in t, the largest span being the oldest. Guo et al. 2025, "Log-Linear Attention" (arXiv 2506.04761),
    equations 4 to 6, without gates on the states. Everything is summed in fp32 (in fp64 for fp64 queries). It has no gradient.

    Args:
        q: [B, H, T, K] floating point, T >= 1.
        k: [B, G, T, K].
        v: [B, G, T, V].
        weights: [B, H, T, L]; L is more than the number of bits of ``past + T``.
        states: [B, G, L, K, V] float32, those returned with the tokens before; None for none.
        past: the number of tokens before the first, which is token number ``past``.
        mask: [B, T] bool, or None. Where it is False the key counts as 0; the token still has its number.
        chunk: tokens per chunk in the chunked form, a power of two; it changes the rounding, nothing else.

    Returns:
        out [B, H, T, V] in q's dtype, and states [B, G, L, K, V] float32 after the last token: level l >= 1 holds the span of bit
        l - 1 of ``past + T``, level 0 is empty.

    Raises:
        KernelError: too few levels, or a chunk that is not a power of two.
    """
    queries, keys, values, levels, states = _prepared(q, k, v, weights, states, past, mask, chunk)
    outs = []
    for t in range(q.shape[2]):
        states = states.clone()
        states[:, :, 0] = keys[:, :, t, :, None] * values[:, :, t, None, :]
        per_level = queries[:, :, :, t, None, None] @ states[:, :, None]  # [B, G, h, L, 1, V]
        outs.append((levels[:, :, :, t, :, None] * per_level.squeeze(-2)).sum(3))
        ends = past + t + 1
        level = (ends & -ends).bit_length()  # of the span that ends here: all lower ones become one
        states[:, :, level] = states[:, :, :level].sum(2)
        states[:, :, :level] = 0
    return torch.stack(outs, 3).flatten(1, 2).to(q.dtype), states


def _prepared(q: Any, k: Any, v: Any, weights: Any, states: Any, past: int, mask: Any, chunk: int) -> tuple[torch.Tensor, ...]:
    """Queries [B, G, h, T, K], keys, values, weights [B, G, h, T, L] and states, in the dtype of the sums."""
    check(Inputs(q, k, v, mask=mask, feature_map="identity", chunk=chunk))
    needed = (past + q.shape[2]).bit_length() + 1
    if weights.shape[-1] < needed:
        raise KernelError(f"{past + q.shape[2]} tokens have {needed} levels, weights are given for {weights.shape[-1]}")
    if chunk & (chunk - 1):
        raise KernelError(f"chunk={chunk}: give a power of two")
    dtype, groups = torch.promote_types(q.dtype, torch.float32), k.shape[1]
    keys = k.to(dtype) if mask is None else k.to(dtype).masked_fill(~mask[:, None, :, None], 0)
    shape = *k.shape[:2], weights.shape[-1], k.shape[-1], v.shape[-1]
    if states is not None and tuple(states.shape) != shape:
        raise KernelError(f"states have shape {tuple(states.shape)}; with these weights, keys and values it has to be {shape}")
    states = keys.new_zeros(shape) if states is None else states.to(dtype).clone()
    return q.to(dtype).unflatten(1, (groups, -1)), keys, v.to(dtype), weights.to(dtype).unflatten(1, (groups, -1)), states


@log_linear_attention.fake
def _(q: Any, k: Any, v: Any, weights: Any, states: Any = None, past: int = 0, mask: Any = None, chunk: int = 64) -> Any:
    shape = *k.shape[:2], weights.shape[-1], k.shape[-1], v.shape[-1]
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


@log_linear_attention.definition
def _(
    q: Any, k: Any, v: Any, weights: Any, states: Any = None, past: int = 0, mask: Any = None, chunk: int = 64
) -> tuple[torch.Tensor, ...]:
    """Token by token and level by level, each span summed from its tokens.

    Of a span from before the first token only the sum is known; it takes the place of the span's first token.
    """
    keys = k.double() if mask is None else torch.where(mask[:, None, :, None], k.double(), 0.0)
    sums = torch.cat([keys.new_zeros(*k.shape[:2], past, k.shape[-1], v.shape[-1]), keys[..., None] * v.double()[..., None, :]], 2)
    first = 0
    for bit in reversed(range(past.bit_length())):
        if past >> bit & 1:
            sums[:, :, first] = 0.0 if states is None else states[:, :, bit + 1].double()
            first += 1 << bit
    shared, tokens = q.shape[1] // k.shape[1], past + q.shape[2]

    def spans(t: int) -> list[tuple[int, torch.Tensor]]:
        found, first = [], 0
        for bit in reversed(range(t.bit_length())):
            if t >> bit & 1:
                found.append((bit + 1, sums[:, :, first : first + (1 << bit)].sum(2)))
                first += 1 << bit
        return found

    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for t in range(past, tokens):
        for level, span in [(0, sums[:, :, t]), *spans(t)]:
            read = q[:, :, t - past, None].double() @ span.repeat_interleave(shared, 1)
            out[:, :, t - past] += weights[:, :, t - past, level, None].double() * read.squeeze(-2)
    last = sums.new_zeros(*k.shape[:2], weights.shape[-1], k.shape[-1], v.shape[-1])
    for level, span in spans(tokens):
        last[:, :, level] = span
    return out, last


@log_linear_attention.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int, h: int, g: int, t: int, k: int, v: int, levels: int, *rest: Any, dtype: torch.dtype = torch.float32
    ) -> tuple[Any, ...]:
        drawn = (torch.randn(b, heads, t, width, generator=generator) for heads, width in ((h, k), (g, k), (g, v)))
        return *(x.to(device, dtype) for x in drawn), torch.rand(b, h, t, levels, generator=generator).to(device), *rest

    yield "typical", make(1, 2, 2, 70, 16, 16, 8)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, h, g, t, k, v, levels in ((1, 1, 1, 1, 8, 8, 2), (2, 4, 2, 63, 12, 20, 7), (1, 2, 1, 200, 16, 8, 12)):
            yield f"{b} x {h}/{g} x {t} x {k}/{v}, {dtype}", make(b, h, g, t, k, v, levels, dtype=dtype)
    mask = torch.tensor([[False] * 10 + [True] * 20, [True] * 25 + [False] * 5], device=device)
    yield "padding", make(2, 2, 2, 30, 16, 8, 6, None, 0, mask, 8)
    for past in (13, 16):
        states = torch.randn(1, 2, 7, 16, 8, generator=generator).to(device)
        for level in range(7):
            states[:, :, level] *= level > 0 and past >> (level - 1) & 1
        yield f"resumed after {past}", make(1, 2, 2, 40, 16, 8, 7, states, past, None, 16)


@log_linear_attention.backend("cpu", refuses=not_on_cpu)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    states: torch.Tensor | None = None,
    past: int = 0,
    mask: torch.Tensor | None = None,
    chunk: int = 64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of torch operators, which end where spans of their size do: a masked product within, one with each earlier span."""
    queries, keys, values, levels, states = _prepared(q, k, v, weights, states, past, mask, chunk)
    out = queries.new_empty(*queries.shape[:4], v.shape[-1])
    start, tokens = 0, q.shape[2]
    while start < tokens:
        # From a token whose number is no multiple of the chunk, up to the next multiple.
        number = past + start
        size = min(chunk - number % chunk, tokens - start)
        part = slice(start, start + size)
        of_chunk, seen, new, wanted = queries[:, :, :, part], keys[:, :, part], values[:, :, part], levels[:, :, :, part]
        numbers = torch.arange(number, number + size, device=q.device)
        level = _level_of(numbers[:, None], numbers, levels.shape[-1])  # [size, size]
        chosen = wanted.gather(-1, level.expand(*wanted.shape[:3], -1, -1)).tril()
        made = ((of_chunk @ seen.mT[:, :, None]) * chosen) @ new[:, :, None]
        # A span from before the chunk is at another level for each of its tokens: at that of the highest bit in which they differ.
        for held in [index for index in range(1, states.shape[2]) if number >> (index - 1) & 1]:
            first = (number >> held) << held  # where the span begins
            now = _level_of(numbers, torch.full_like(numbers[:1], first), levels.shape[-1])
            scale = wanted.gather(-1, now[:, None].expand(*wanted.shape[:4], 1))
            made += scale * (of_chunk @ states[:, :, None, held])
        out[:, :, :, part] = made
        states = _advanced(states, seen, new, number)
        start += size
    return out.flatten(1, 2).to(q.dtype), states


def _level_of(token: torch.Tensor, other: torch.Tensor, levels: int) -> torch.Tensor:
    """Level of ``other`` for ``token``: the number of bits up to the highest in which they differ."""
    return (((token ^ other)[..., None] >> torch.arange(levels, device=token.device)) > 0).sum(-1)


def _advanced(states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, number: int) -> torch.Tensor:
    """States after further keys and values, given those of ``number`` tokens."""
    after, ends = torch.zeros_like(states), number + keys.shape[2]
    for level in range(1, states.shape[2]):
        if not ends >> (level - 1) & 1:
            continue
        first = ends >> level << level
        last = first + (1 << (level - 1))
        for held in range(1, states.shape[2]):
            if number >> (held - 1) & 1 and first <= number >> held << held < last:
                after[:, :, level] += states[:, :, held]
        if last > number:
            part = slice(max(first - number, 0), last - number)
            after[:, :, level] += keys[:, :, part].mT @ values[:, :, part]
    return after
