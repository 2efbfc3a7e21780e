"""Definition of a softmax window with linear attention over everything older."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.definitions.forward import NoDefinition, hooks_removed, logits_at

if TYPE_CHECKING:
    from patchkit.record import PatchReport


def hybrid_logits(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    parts: Mapping[str, Any],
    sinks: int,
    window: int,
    min_length: int,
    adapted: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits by the equation of `patchkit.linear.hybrid`, computed for all T x T pairs.

    Two rows of the sequence run, the second with every token at position 0: there the model computes queries and keys without rotation.

    Args:
        parts: trained parts (feature maps, factor, readout, horizon), by the name of the attention module.
        adapted: low-rank factors (A, B) by the name of a projection, whose output is W x + B A x.

    Raises:
        NoDefinition: the model takes no positions.
    """
    rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    options: dict[str, Any] = {}
    if rotary:
        if "position_ids" not in _compat.argument_names(model):
            raise NoDefinition(f"{type(model).__name__} takes no position_ids, so queries and keys cannot be had without rotation")
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        # With a mask, transformers takes it for one sequence, whatever the positions.
        options = {"position_ids": torch.cat([positions, 0 * positions]), "attention_mask": torch.ones_like(ids).expand(2, -1)}
    named = {id(model.get_submodule(name)): part for name, part in parts.items()}
    name = "patchkit_definition"

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **kwargs: Any) -> Any:
        part = named.get(id(module))
        if part is None:
            output, _ = original(module, query, key, value, mask, **kwargs)
        else:
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            output = _hybrid(part, query, key, value, scaling, sinks, window, min_length).to(query.dtype)[None]
        # Behind attention the two rows are the same again.
        return output[:1].expand(query.shape[0], -1, -1, -1).contiguous(), None

    implementation = _compat.attention_named(model.config.get_text_config(decoder=True)) or "eager"
    if implementation not in ("eager", "sdpa"):
        raise NoDefinition(f"another patch, or {implementation!r}, computes attention too")
    original = _compat.attention_function("sdpa")
    _compat.register_attention(name, attend, _compat.mask_function("sdpa"))
    hooks = [model.get_submodule(each).register_forward_hook(_adapter(*pair)) for each, pair in adapted.items()]
    with hooks_removed(hooks), _compat.attention_set_to(model, lambda _: name):
        return logits_at(model, ids.expand(2, -1), at, **options)[:1]


def _hybrid(
    part: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, sinks: int, window: int, min_length: int
) -> torch.Tensor:
    """Output [T, H, V] in float64 for queries [B, H, T, K] and keys [B, G, T, K]: rotated in the first row, unrotated in the last."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = query[0].double(), key[0].double().repeat_interleave(groups, 0), value[0].double().repeat_interleave(groups, 0)
    plain_q = part.query_map(query[-1:]).double()[0]
    plain_k = part.key_map(key[-1:]).double()[0].repeat_interleave(groups, 0)
    i, j = torch.arange(q.shape[1], device=q.device)[:, None], torch.arange(q.shape[1], device=q.device)[None]
    near = (j <= i) & ((j < sinks) | (i - j < window) | (i < min_length))
    old = (j <= i) & ~near
    scores = (scaling * q @ k.mT).masked_fill(~near, -math.inf)
    softmax = (scores - scores.amax(-1, keepdim=True)).exp()
    weight = part.factor.double().exp()[:, None, None].expand_as(scores)
    if part.horizon is not None:
        weight = weight * (part.horizon / old.sum(1).clamp(min=part.horizon))[:, None]
    weights = softmax + weight * (plain_q @ plain_k.mT) * old
    output = weights @ v / weights.sum(-1, keepdim=True)
    if part.readout is not None:
        output = output @ part.readout.double()
    return output.transpose(0, 1)


def _adapter(a: torch.Tensor, b: torch.Tensor) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output + (args[0].float() @ a.float().to(output.device).T @ b.float().to(output.device).T).to(output.dtype)

    return add
