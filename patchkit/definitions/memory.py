"""Definition of attention with sinks, a window, and slots with the most distinct of what has left the window."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.definitions.forward import NoDefinition, hooks_removed, logits_at

if TYPE_CHECKING:
    from patchkit.record import PatchReport

# Arguments of attention that are computed here, and those that do not change a softmax over all keys.
_COMPUTED = {"scaling", "softcap", "s_aux"}
_WITHOUT_EFFECT = {"dropout", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states"}

# Rotary embeddings whose frequencies follow the largest position.
_BY_LENGTH = ("dynamic", "longrope")


@dataclass(frozen=True)
class _Rule:
    """Sizes of the rule of one layer, in tokens; ``slots`` per kv head, which ``shared`` of them have in common."""

    sinks: int
    window: int
    block: int
    slots: int
    shared: int
    limit: int

    @property
    def turn(self) -> int:
        """What is far moves this much closer: an eighth of the limit, in whole blocks."""
        return max(1, self.limit // 8 // self.block) * self.block

    @property
    def far(self) -> int:
        return max(self.window, self.limit - self.turn)

    @property
    def reach(self) -> int:
        """No sink is seen from this far."""
        return max(self.sinks + self.window, self.far + self.turn)


def memory_logits(
    model: Any,
    ids: torch.Tensor,
    facts: PatchReport,
    *,
    slots: Mapping[str, tuple[int, int]],
    sinks: int,
    window: int,
    block: int,
    limit: int,
    at: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits by the rule of `patchkit.memory.slots`, with lists of what each kv head keeps, and scores of all T x T pairs in float64.

    Rows of the sequence run whose tokens are at other positions: there the model computes queries and keys with other rotations. In the
    first, positions are true. In the second all are 0, so keys have no rotation. Queries of the others are nearer to old keys, as the
    rule wants. Only differences between positions matter, so nothing is rotated here.

    Args:
        slots: slots per kv head, and the number of kv heads that share them, by the name of the attention module.
        block: tokens from one competition to the next.
        limit: positions that the model was made for.

    Raises:
        NoDefinition: the model takes no positions, or its attention has an argument that is not known here.
    """
    length = ids.shape[1]
    rules = {id(model.get_submodule(name)): _Rule(sinks, window, block, *counts, limit) for name, counts in slots.items()}
    positions = torch.arange(length, device=ids.device)
    rows, options, turns = [positions], {}, 0
    if any(name.endswith("inv_freq") for name, _ in model.named_buffers()):
        if "position_ids" not in _compat.argument_names(model):
            raise NoDefinition(f"{type(model).__name__} takes no position_ids, so keys cannot be had without rotation")
        first = next(iter(rules.values()))
        turns = sum(border > first.far for border in range(first.turn, length, first.turn))
        rows += [0 * positions]
        rows += [(positions - turn * first.turn).clamp(min=0) for turn in range(1, turns + 1)]
        if length > first.reach and any(getattr(module, "rope_type", "default") in _BY_LENGTH for module in model.modules()):
            raise NoDefinition("the rotary embedding depends on the length of the text, which is beyond the positions of this model")
        if length > first.reach:
            rows += [positions.clamp(max=first.reach - 1)]
        # With a mask, transformers takes it for one sequence, whatever the positions.
        options = {"position_ids": torch.stack(rows), "attention_mask": torch.ones_like(ids).expand(len(rows), -1)}
    name = "patchkit_definition"

    def attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        rule = rules.get(id(module))
        unknown = {name for name, given in kwargs.items() if given is not None and given is not False} - _COMPUTED - _WITHOUT_EFFECT
        unknown -= set() if rule else {"sliding_window"}  # which the mask says
        if unknown:
            raise NoDefinition(f"attention takes {', '.join(sorted(unknown))}, whose effect is not written down here")
        query, key, value = query.double(), key.double(), value[0].double()
        scores, sees = (query[0] @ _repeated(key[0], query).mT, attention_mask) if rule is None else _scores(rule, turns, query, key)
        output = _softmax(scores, sees, value, query, kwargs).to(dtype)[None]
        # Behind attention all rows are the same again.
        return output.expand(query.shape[0], -1, -1, -1).contiguous(), None

    dtype = model.dtype
    implementation = _compat.attention_named(model.config.get_text_config(decoder=True)) or "eager"
    if implementation not in ("eager", "sdpa"):
        raise NoDefinition(f"another patch, or {implementation!r}, computes attention too")
    _compat.register_attention(name, attend, _compat.mask_function("sdpa"))
    with hooks_removed([]), _compat.attention_set_to(model, lambda _: name):
        return logits_at(model, ids.expand(len(rows), -1), at, **options)[:1]


def _scores(rule: _Rule, turns: int, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Products [H, T, T] of queries [B, H, T, K] and keys [B, G, T, K] of the rows of `memory_logits`, and where a query sees a key."""
    length = query.shape[2]
    kept = _repeated(_kept(rule, key[1] if len(key) > 1 else key[0]), query)
    i, j = torch.arange(length, device=key.device)[:, None], torch.arange(length, device=key.device)[None]
    sees = ((j <= i) & ((j < rule.sinks) | (i - j < rule.window)))[None] | (kept & (j <= i - rule.window)[None])
    by_row = query @ _repeated(key[0], query).mT
    scores = by_row[0]
    if len(query) > 1:
        moved = torch.zeros_like(i - j)
        for border in range(rule.turn, length, rule.turn):
            moved = moved + ((border <= i) & (border - j > rule.far))
        for turn in range(1, turns + 1):
            scores = torch.where(moved == turn, by_row[1 + turn], scores)
        scores = torch.where(j < rule.sinks, by_row[-1] if length > rule.reach else by_row[0], scores)
    return scores, sees


def _softmax(scores: torch.Tensor, sees: torch.Tensor | None, value: torch.Tensor, query: torch.Tensor, kwargs: Any) -> torch.Tensor:
    """Output [T, H, V] for products [H, T, T] and values [G, T, V], all in float64; ``sees`` is causal where it is None."""
    length = scores.shape[-1]
    if sees is None:
        sees = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()
    if sees.dtype != torch.bool:
        raise NoDefinition("the mask of this model is no mask of zeros and ones")
    sees = sees[0] if sees.ndim == 4 else sees
    scaling = kwargs.get("scaling")
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    scores = scores.masked_fill(~sees, -math.inf)
    if kwargs.get("s_aux") is not None:  # a score of its own for each head, which has no value
        scores = torch.cat([scores, kwargs["s_aux"].double()[:, None, None].expand(-1, length, 1)], -1)
    return (scores.softmax(-1)[..., :length] @ _repeated(value, query)).transpose(0, 1)


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat x [G, ...] for the H heads of queries [B, H, T, K]: [H, ...]."""
    return x.repeat_interleave(query.shape[1] // x.shape[0], 0)


def _kept(rule: _Rule, keys: torch.Tensor) -> torch.Tensor:
    """Whether query i finds token j in a slot of each kv head, for keys without rotation [G, T, K]: bool [G, T, T]."""
    groups, length = keys.shape[:2]
    found = torch.zeros(groups, length, length, dtype=torch.bool, device=keys.device)
    pools: list[list[tuple[int, int, int]]] = [[] for _ in range(groups // rule.shared)]
    for border in range(rule.block, length, rule.block):
        offered = list(range(max(rule.sinks, border - rule.window), border - rule.window + rule.block))
        mean = keys[:, :border].mean(1)
        for group in range(groups if offered else 0):
            pool = pools[group // rule.shared]
            cosines = keys[group, offered] @ mean[group] / (keys[group, offered].norm(dim=-1) * mean[group].norm()).clamp(min=1e-8)
            pool += [(int(score), token, group) for score, token in zip((cosines * 4096).round().tolist(), offered, strict=True)]
        for pool in pools:
            pool.sort()
            del pool[rule.slots * rule.shared :]
            for _, token, group in pool:
                found[group, border : border + rule.block, token] = True
    return found
