"""linear_attention: causal attention through a state of constant size.

Shapes: B batch, H heads, G kv heads (query head h reads kv head h // (H / G)), T tokens, K head dimension, V value dimension,
F = K features.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from typing import Any

import torch

from patchkit.errors import KernelError
from patchkit.kernels import native, triton
from patchkit.kernels.op import op

FEATURE_MAPS = ("identity", "elu1", "relu")  # as `native/linear_attention.cpp` numbers them
_MOST_FEATURES = 256

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


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
    """``S_t = S_{t-1} + f(k_t)^T v_t``, ``z_t = z_{t-1} + f(k_t)``, ``out_t = f(q_t) S_t``, divided by ``f(q_t) . z_t`` if ``normalize``.

    Katharopoulos et al. 2020, "Transformers are RNNs" (arXiv 2006.16236), equations 18 to 20. Everything is summed in fp32 (in fp64
    for fp64 queries). Differentiable in q, k, v, state and normalizer.

    Args:
        q: [B, H, T, K] floating point, T >= 1.
        k: [B, G, T, K].
        v: [B, G, T, V].
        state: [B, G, F, V] float32, S before the first token; None for zeros.
        normalizer: [B, G, F] float32, z before the first token; None for zeros.
        mask: [B, T] bool, or None. Where it is False the features of the key are 0.
        feature_map: f, "elu1" (``elu(x) + 1``), "relu" or "identity".
        chunk: how many tokens the chunked forms take at once; it changes the rounding, nothing else.

    Returns:
        out [B, H, T, V] in q's dtype if ``normalize``, else float32; 0 where it would be divided by 0.
        denominator [B, H, T] float32, ``f(q_t) . z_t``.
        state [B, G, F, V] and normalizer [B, G, F] float32 after the last token.

    Raises:
        KernelError: an unknown feature map, shapes or devices that do not fit together, or chunk < 1.
    """
    fq, fk, values, state, normalizer = _prepared(q, k, v, state, normalizer, mask, feature_map, chunk)
    outs, denominators = [], []
    for t in range(q.shape[2]):
        state = state + fk[:, :, t, :, None] * values[:, :, t, None, :]
        normalizer = normalizer + fk[:, :, t]
        outs.append((fq[:, :, :, t, None] @ state[:, :, None]).squeeze(-2))
        denominators.append((fq[:, :, :, t] * normalizer[:, :, None]).sum(-1))
    out, denominator = torch.stack(outs, 3), torch.stack(denominators, 3)
    return (*finished(out, denominator, q, normalize), state, normalizer)


def _prepared(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    normalizer: torch.Tensor | None,
    mask: torch.Tensor | None,
    feature_map: str,
    chunk: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features of the queries [B, G, h, T, F] and of the keys, values, state and normalizer, in the dtype that is computed in."""
    check_arguments(q, k, v, mask, feature_map, chunk, state, normalizer)
    dtype = torch.promote_types(q.dtype, torch.float32)
    fq, fk = features(q.to(dtype), feature_map).unflatten(1, (k.shape[1], -1)), features(k.to(dtype), feature_map)
    if mask is not None:
        fk = fk.masked_fill(~mask[:, None, :, None], 0)
    if state is None:
        state = fk.new_zeros(*k.shape[:2], fk.shape[-1], v.shape[-1])
    if normalizer is None:
        normalizer = fk.new_zeros(*k.shape[:2], fk.shape[-1])
    return fq, fk, v.to(dtype), state.to(dtype), normalizer.to(dtype)


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    feature_map: str,
    chunk: int = 1,
    state: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
) -> None:
    """Refuse what does not fit together: a kernel would read memory that is not its own."""
    if feature_map not in FEATURE_MAPS:
        raise KernelError(
            f"feature_map={feature_map!r} is unknown: give one of {', '.join(FEATURE_MAPS)}, maps with weights are applied before"
        )
    if chunk < 1:
        raise KernelError(f"chunk={chunk}: give at least 1")
    (batch, heads, tokens, width), (groups, value_width) = q.shape, (k.shape[1], v.shape[-1])
    if tokens < 1:
        raise KernelError("there is no token: give at least one")
    if heads % groups:
        raise KernelError(f"{heads} query heads cannot share {groups} kv heads evenly")
    wanted = {
        "k": (k, (batch, groups, tokens, width)),
        "v": (v, (batch, groups, tokens, value_width)),
        "mask": (mask, (batch, tokens)),
        "state": (state, (batch, groups, width, value_width)),
        "normalizer": (normalizer, (batch, groups, width)),
    }
    if mask is not None and mask.dtype != torch.bool:
        raise KernelError(f"mask is {mask.dtype}: give bool, False for padding")
    for name, (given, shape) in wanted.items():
        if given is not None and tuple(given.shape) != shape:
            raise KernelError(f"{name} has shape {tuple(given.shape)}; with q of shape {tuple(q.shape)} it has to be {shape}")
        if given is not None and given.device != q.device:
            raise KernelError(f"{name} is on {given.device}, q on {q.device}: move one of them")


def features(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """``f(x)``, elementwise."""
    if feature_map == "elu1":
        return torch.where(x > 0, x + 1, x.clamp(max=0).exp())  # elu(x) + 1 would cancel
    return x.relu() if feature_map == "relu" else x


def _slope(x: torch.Tensor, feature_map: str) -> torch.Tensor | float:
    """``f'(x)``."""
    if feature_map == "elu1":
        return x.clamp(max=0).exp()
    return (x > 0).to(x.dtype) if feature_map == "relu" else 1.0


def finished(out: torch.Tensor, denominator: torch.Tensor, q: torch.Tensor, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, G, h, T, V] and denominator [B, G, h, T] as they are returned."""
    if normalize:
        out = torch.where(denominator[..., None] == 0, 0, out / denominator[..., None]).to(q.dtype)
    return out.flatten(1, 2), denominator.flatten(1, 2)


@linear_attention.fake
def _(
    q: Any,
    k: Any,
    v: Any,
    state: Any = None,
    normalizer: Any = None,
    mask: Any = None,
    feature_map: str = "elu1",
    normalize: bool = True,
    chunk: int = 64,
) -> Any:
    dtype = torch.promote_types(q.dtype, torch.float32)
    batch, heads, tokens, width = q.shape
    return (
        q.new_empty(batch, heads, tokens, v.shape[-1], dtype=q.dtype if normalize else dtype),
        q.new_empty(batch, heads, tokens, dtype=dtype),
        q.new_empty(batch, k.shape[1], width, v.shape[-1], dtype=dtype),
        q.new_empty(batch, k.shape[1], width, dtype=dtype),
    )


@linear_attention.samples
def _(device: torch.device) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def make(
        b: int,
        h: int,
        g: int,
        t: int,
        k: int,
        v: int,
        *rest: Any,
        dtype: torch.dtype = torch.float32,
        resumed: bool = False,
        mask: Any = None,
    ) -> tuple[Any, ...]:
        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(device)

        state = (draw(b, g, k, v), draw(b, g, k).abs() * 5) if resumed else (None, None)
        given = None if mask is None else torch.tensor(mask, dtype=torch.bool, device=device)
        return draw(b, h, t, k).to(dtype), draw(b, g, t, k).to(dtype), draw(b, g, t, v).to(dtype), *state, given, *rest

    yield "typical", make(1, 4, 4, 100, 64, 64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for b, h, g, t, k, v in (
            (1, 1, 1, 1, 8, 8),
            (2, 4, 2, 63, 60, 60),
            (1, 6, 1, 130, 32, 48),
            (1, 2, 2, 65, 128, 80),
            (1, 1, 1, 33, 256, 192),
        ):
            yield f"{b} x {h}/{g} x {t} x {k}/{v}, {dtype}", make(b, h, g, t, k, v, dtype=dtype)
    for kind in FEATURE_MAPS:
        for normalize in (True, False):
            # An identity with a normaliser is divided by sums that may come close to 0.
            if normalize and kind == "identity":
                continue
            yield f"{kind}, normalize {normalize}, resumed", make(2, 4, 2, 70, 24, 40, kind, normalize, 16, resumed=True)
    padded = [[False] * 40 + [True] * 30, [True] * 60 + [False] * 10, [False] * 70]
    yield "padding on both sides, and a row of nothing else", make(3, 4, 2, 70, 16, 16, "elu1", True, 32, mask=padded)
    yield "padding, resumed", make(3, 4, 2, 70, 16, 16, "relu", False, 32, mask=padded, resumed=True)
    q, key, value, *rest = make(2, 4, 2, 50, 32, 48)
    yield "not contiguous", (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, key, value)), *rest)


# -- The gradient ------------------------------------------------------------------------------------------------------------------
#
# With N = f(q) S and d = f(q) . z, and dN and dd their gradients, the gradients of the features are linear attentions themselves, one
# forward in time and two backward: df(q)_t = dN_t S_t^T + dd_t z_t, df(k)_t = R_t v_t + r_t and dv_t = f(k)_t R_t, in which
# R_t = dS_T + sum_{i >= t} f(q_i)^T dN_i and r_t = dz_T + sum_{i >= t} dd_i f(q_i). A cumulative sum is one with a single feature.


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, state, normalizer, mask, ctx.feature_map, ctx.normalize, ctx.chunk = inputs
    ctx.save_for_backward(q, k, v, state, normalizer, mask, output[0], output[1])


def _backward(ctx: Any, d_out: Any, d_denominator: Any, d_state: Any, d_normalizer: Any) -> Any:
    q, k, v, state, normalizer, mask, out, denominator = ctx.saved_tensors
    dtype = denominator.dtype
    q_raw, k_raw, values = q.to(dtype), k.to(dtype), v.to(dtype)
    fq, fk = features(q_raw, ctx.feature_map), features(k_raw, ctx.feature_map)
    if mask is not None:
        fk = fk.masked_fill(~mask[:, None, :, None], 0)
    d_out = d_out.to(dtype)
    if ctx.normalize:
        d_out = torch.where(denominator[..., None] == 0, 0, d_out / denominator[..., None])
        d_denominator = d_denominator - (d_out * out.to(dtype)).sum(-1)
    d_denominator = d_denominator[..., None]
    groups, shared = k.shape[1], q.shape[1] // k.shape[1]

    def attention(queries: Any, keys: Any, values: Any, initial: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        out, _, last, _ = linear_attention(
            queries.contiguous(), keys.contiguous(), values.contiguous(), initial, None, None, "identity", False, ctx.chunk
        )
        return out, last

    ones = fk.new_ones(*fk.shape[:3], 1)
    d_q = attention(d_out, values, fk, None if state is None else state.mT.contiguous())[0]
    d_q = d_q + attention(d_denominator, ones, fk, None if normalizer is None else normalizer[:, :, None].contiguous())[0]

    def backward_in_time(queries: Any, keys: Any, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
        repeated = queries.repeat_interleave(shared, 1)
        out, last = attention(*(x.flip(2) for x in (repeated, keys, values)))
        return out.flip(2).unflatten(1, (groups, shared)).sum(2), last.unflatten(1, (groups, shared)).sum(2)

    d_v, to_state = backward_in_time(fk, fq, d_out)
    d_k, to_normalizer = backward_in_time(ones, d_denominator, fq)
    d_k = d_k + backward_in_time(values, d_out, fq)[0] + values @ d_state.mT + d_normalizer[:, :, None]
    d_v = d_v + fk @ d_state
    d_k = d_k * _slope(k_raw, ctx.feature_map)
    if mask is not None:
        d_k = d_k.masked_fill(~mask[:, None, :, None], 0)
    return (
        (d_q * _slope(q_raw, ctx.feature_map)).to(q.dtype),
        d_k.to(k.dtype),
        d_v.to(v.dtype),
        None if state is None else (d_state + to_state).to(state.dtype),
        None if normalizer is None else (d_normalizer + to_normalizer.squeeze(2)).to(normalizer.dtype),
        *(None,) * 4,
    )


linear_attention.autograd(_backward, _setup_context)


# -- CPU -------------------------------------------------------------------------------------------------------------------------


def not_on_cpu(q: torch.Tensor, *rest: Any) -> str | None:
    return None if q.device.type == "cpu" else f"{q.device.type} tensors: it is for a CPU"


@functools.cache
def _kernel() -> tuple[Any, str | None]:
    # q, k, v, mask, first state and normalizer, out, denominator, state, normalizer, sizes, strides; map, normalize, threads.
    return native.load("linear_attention", (ctypes.c_void_p,) * 12 + (ctypes.c_int,) * 3)


def _native_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    if q.device.type != "cpu":
        return not_on_cpu(q)
    if torch.float64 in (q.dtype, k.dtype, v.dtype):
        return "float64: it sums in fp32"
    if q.shape[-1] > _MOST_FEATURES:
        return f"{q.shape[-1]} features: at most {_MOST_FEATURES}"
    if q.numel() == 0 or v.numel() == 0:
        return "q or v is empty"
    return _kernel()[1]


@linear_attention.backend("native", refuses=_native_refuses)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
    chunk: int = 64,
) -> Four:
    """`native/linear_attention.cpp`: everything in one pass, in chunks of 64 whatever ``chunk`` is."""
    check_arguments(q, k, v, mask, feature_map, chunk, state, normalizer)
    (batch, heads, tokens, width), groups, value_width = q.shape, k.shape[1], v.shape[-1]
    # Named, so that they live until the call is over.
    q32, k32, v32 = (x.float() if x.stride(-1) == 1 else x.float().contiguous() for x in (q, k, v))
    before = [None if x is None else x.float().contiguous() for x in (state, normalizer)]
    seen = None if mask is None else mask.to(torch.uint8).contiguous()
    # The kernel writes fp32, whatever torch.set_default_dtype says.
    empty = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    out, denominator = empty(batch, heads, tokens, value_width), empty(batch, heads, tokens)
    after, sums = empty(batch, groups, width, value_width), empty(batch, groups, width)
    tensors = q32, k32, v32, seen, *before, out, denominator, after, sums
    sizes = (ctypes.c_int64 * 6)(batch, heads, groups, tokens, width, value_width)
    strides = (ctypes.c_int64 * 9)(*(step for x in (q32, k32, v32) for step in x.stride()[:3]))
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    options = FEATURE_MAPS.index(feature_map), int(normalize), torch.get_num_threads()
    if _kernel()[0](*addresses, ctypes.addressof(sizes), ctypes.addressof(strides), *options):
        raise MemoryError("linear_attention: no memory for a chunk")
    return out.to(q.dtype) if normalize else out, denominator, after, sums


@linear_attention.backend("cpu", refuses=not_on_cpu)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
    chunk: int = 64,
) -> Four:
    """Chunk by chunk: masked products within it, the state for all that came before."""
    fq, fk, values, state, normalizer = _prepared(q, k, v, state, normalizer, mask, feature_map, chunk)
    state, normalizer = state.clone(), normalizer.clone()
    out, denominator = fq.new_empty(*fq.shape[:4], v.shape[-1]), fq.new_empty(fq.shape[:4])
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        queries, keys, chunk_values = fq[:, :, :, part], fk[:, :, part], values[:, :, part]
        weights = (queries @ keys.mT[:, :, None]).tril()
        out[:, :, :, part] = weights @ chunk_values[:, :, None] + queries @ state[:, :, None]
        denominator[:, :, :, part] = weights.sum(-1) + (queries @ normalizer[:, :, None, :, None]).squeeze(-1)
        state += keys.mT @ chunk_values
        normalizer += keys.sum(2)
    return (*finished(out, denominator, q, normalize), state, normalizer)


# -- Triton -----------------------------------------------------------------------------------------------------------------------


def triton_refuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    if q.numel() == 0 or v.numel() == 0:
        return "q or v is empty"
    if q.shape[-1] > _MOST_FEATURES:
        return f"{q.shape[-1]} features: at most {_MOST_FEATURES}"
    return next((reason for reason in map(triton.refusal, (q, k, v)) if reason), None)


# Products on tensor cores: features, weights and state are rounded to bf16 for bf16 inputs, to TF32 for others.
@linear_attention.backend("triton", refuses=triton_refuses, rounding=3e-3)
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    normalizer: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    feature_map: str = "elu1",
    normalize: bool = True,
    chunk: int = 64,
) -> Four:
    """`patchkit.kernels.triton.linear_attention`: three launches, in tiles of its own whatever ``chunk`` is."""
    from patchkit.kernels.triton.linear_attention import run

    check_arguments(q, k, v, mask, feature_map, chunk, state, normalizer)
    return run(q, k, v, state, normalizer, mask, feature_map, normalize)
