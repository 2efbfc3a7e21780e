"""StreamingLLM: attention sinks and a sliding window, with the same logits however tokens are fed.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453.

1. Query i attends to keys ``{0 .. S-1}`` (sinks) and ``{i-W+1 .. i}`` (window).
2. Its distance to a window key is ``i - j``, to a sink ``min(i, S+W-1) - j``: positions inside the cache (section 3.2 of the paper).
   While ``i < S + W`` this is the unpatched model.
3. A forward of several tokens needs the sinks at another rotation for each query, so it rotates queries. Attention runs once with query
   ``[q_window, q_sink]`` and keys ``[k, 0]`` (window) or ``[0, k]`` (sinks), at twice the key dimension.

Differs from the paper's code in three ways: keys are cached rotated, and a step rotates only the S sinks (the paper rotates all S + W
keys); a forward of any number of tokens gives the logits of one token at a time; rows of a left-padded batch have their own sinks.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.anatomy.target import Target
from patchkit.definitions import window_logits
from patchkit.errors import PatchConflict
from patchkit.handle import Handle
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch
from patchkit.streaming.heavy_hitters import DynamicSinks
from patchkit.streaming.install import install_window
from patchkit.streaming.plan_window import plan_window
from patchkit.streaming.plans import check_kv, check_layers
from patchkit.streaming.reencode import Reencode
from patchkit.streaming.reencoded import reencoded_logits
from patchkit.streaming.refresh import Refresh
from patchkit.streaming.refreshing import install_refresh
from patchkit.streaming.rule import LayerRule, Plan

# Tokens of a window that a short sequence fills several times.
_SHORT_WINDOW = 24

# Tokens of the largest window that `patchkit tune` tries, with its sinks.
_TRIED_WINDOW = 2048


@register_patch("streaming")
@dataclass(frozen=True)
class StreamingLLM(Patch):
    """Attention sinks and a sliding window (StreamingLLM), at constant memory and time per token.

    Args:
        sinks: S, number of first tokens of every sequence that stay visible. 0 is a plain sliding window; `patchkit.system_tokens` counts
            the tokens of a system message, to keep it visible.
        window: W, number of last tokens that are visible, the current one included.
        positions: "cache" gives sinks the distance they have inside the cache (the paper's rule); "true" their true distance.
        layers: indices of the attention layers to patch; None for all with full attention. The others keep all keys.
        refresh: a periodic change of the cache against the loss of evicted tokens, `Reencode` or `DynamicSinks`; None for none.
        kv: "model" keeps keys and values as the model computes them; "int8" rounds them to int8, with a scale per token and kv head, before
            any query sees them: a quarter of the bytes of fp32, half of those of 16 bits. Not with ``refresh``.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.ATTENTION
    acts = ("tokens evicted",)
    example, evaluated = "streaming(sinks=2, window=6)", "streaming(window=252)"
    facts = Facts(
        goal="a chat or stream without end, at constant memory",
        exact="the StreamingLLM rule, to rounding; the unpatched model while a text fits the window",
        cost="what left the window is forgotten. One token: rotates `sinks` keys; several: twice the key dimension",
        source="Xiao et al. 2023, [2309.17453](https://arxiv.org/abs/2309.17453)",
    )

    sinks: int = 4
    window: int = 1020
    positions: Literal["cache", "true"] = "cache"
    layers: tuple[int, ...] | None = None
    refresh: Refresh | None = dataclasses.field(default=None, metadata={"objects": (Reencode, DynamicSinks)})
    kv: Literal["model", "int8"] = "model"

    def __post_init__(self) -> None:
        if self.sinks == "system":
            raise ValueError(
                "sinks='system' is known where there is a chat, in `patchkit generate --system TEXT`: elsewhere give the number, "
                "sinks=patchkit.system_tokens(tokenizer, TEXT)"
            )
        for name, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of tokens, at least {least}")
        if self.positions not in ("cache", "true"):
            raise ValueError(f"positions={self.positions!r}: give 'cache' (distance inside the cache) or 'true' (true distance)")
        object.__setattr__(self, "layers", check_layers(self.layers))
        if self.refresh is not None and not isinstance(self.refresh, Refresh):
            raise ValueError(f"refresh={self.refresh!r}: give Reencode(every=64), DynamicSinks(n=16, every=64) or None")
        if self.refresh is not None and self.positions != "cache":
            raise ValueError(f"positions={self.positions!r} with refresh={self.refresh.spec}: a refresh needs positions='cache'")
        check_kv(self.kv)
        if self.refresh is not None and self.kv == "int8":
            raise ValueError(f"kv='int8' with refresh={self.refresh.spec}: a refresh needs keys as the model made them, so leave one out")

    @property
    def capacity(self) -> int:
        """C, the largest number of tokens that a query sees."""
        return self._rule(None).capacity

    def _rule(self, rotary: Rotary | None) -> LayerRule:
        if self.refresh is None:
            return LayerRule(self.sinks, self.window, rotary, in_cache=self.positions == "cache", int8=self.kv == "int8")
        return self.refresh.rule(self.sinks, self.window, rotary)

    def check(self, target: Target) -> None:
        self._plan(target)
        if self.refresh is None or self.refresh.can_roll_back:
            return
        for other in target.patches:
            if other.stage in (Stage.GENERATION, Stage.COMPILE):
                raise PatchConflict(
                    f"refresh={self.refresh.spec} counts the attention of every token, which {other.name} would roll back or hide: "
                    "leave one of the two out, or use refresh=reencode"
                )

    def apply(self, target: Target, handle: Handle) -> None:
        plan, owned = self._plan(target)
        install_window(target, handle, plan, owned)
        if self.refresh is not None:
            install_refresh(target.decoder, handle)

    def promises(self, target: Target) -> Promises:
        plan, owned = self._plan(target)
        modules = tuple(layer.name for layer in owned if layer.kind == "full")
        definition = functools.partial(
            window_logits, modules=modules, sinks=self.sinks, window=self.window, in_cache=self.positions == "cache"
        )
        if isinstance(self.refresh, Reencode):
            definition = functools.partial(
                reencoded_logits, plain=definition, sinks=self.sinks, window=self.window, every=self.refresh.every
            )
        if self.kv == "int8":
            return Promises(bounded=plan.owns_all, rounds=True)
        known = self.refresh is None or isinstance(self.refresh, Reencode)
        return Promises(same_up_to=plan.main.capacity, definition=definition if known else None, bounded=plan.owns_all)

    def exercised(self) -> StreamingLLM:
        short = min(self.window, _SHORT_WINDOW)
        refresh: Any = self.refresh
        if refresh is not None:
            refresh = dataclasses.replace(refresh, every=min(refresh.every, _SHORT_WINDOW))
        return dataclasses.replace(self, window=short, refresh=refresh)

    @classmethod
    def candidates(cls, target: Target) -> list[StreamingLLM]:
        """Four sinks, and windows of all positions that the model was made for (at most 2048), a half, a quarter and an eighth."""
        most = min(target.position_limit or _TRIED_WINDOW, _TRIED_WINDOW)
        return [cls(window=most // share - cls.sinks) for share in (1, 2, 4, 8) if most // share > cls.sinks]

    def _plan(self, target: Target) -> tuple[Plan, list[AttentionLayer]]:
        return plan_window(target, self.layers, self._rule, self.refresh)
