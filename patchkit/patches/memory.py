"""Memory: sinks, a window, and exact keys and values chosen from what leaves the window, at constant bytes.

`patchkit.memory.slots` has the rule. Score of a token: minus the cosine of its key without rotation and the mean key (Park et al. 2025,
"KeyDiff", https://arxiv.org/abs/2504.15364).

Differs from the paper in five ways:

* keys are compared without their rotation;
* the kv heads of a layer share their slots, as in AdaKV (Feng et al. 2024, https://arxiv.org/abs/2407.11550);
* layers whose keys spread get more slots (`patchkit.memory.budgets`);
* a token is scored once, when it leaves the window;
* tokens compete at fixed positions of the text, so that logits do not depend on how it is fed.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.definitions import memory_logits
from patchkit.handle import Handle
from patchkit.memory.install import install_memory
from patchkit.memory.plan_memory import NO_LIMIT, plan_memory
from patchkit.memory.rule import MemoryRule
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch
from patchkit.streaming.plans import check_kv, check_layers
from patchkit.streaming.rule import Plan

# Tokens of a window, and slots, that a short sequence fills several times.
_SHORT = 24


@register_patch("memory")
@dataclass(frozen=True)
class Memory(Patch):
    """Sinks, a window, and slots with what is most distinct of the rest, at constant memory and time per token.

    Args:
        sinks: S, number of first tokens of every sequence that stay visible.
        window: W, number of last tokens that are visible, the current one included.
        slots: M, tokens per kv head, on average over all heads, that stay visible after they have left the window.
        block: E, tokens from one competition for the slots to the next.
        shared: kv heads of a layer that share their slots; None for as many as divide their number, and are at most 4.
        budgets: slots of each layer: "measured" distributes them by how distinct keys are in each, on random token ids, when the model is
            patched; "equal" gives every layer M per kv head; or one number per patched layer.
        layers: indices of the attention layers to patch; None for all with full attention. The others keep all keys.
        kv: "model" or "int8", as for `patchkit.StreamingLLM`; of sinks, window and slots.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.ATTENTION
    acts = ("tokens offered to the slots",)
    example = "memory(sinks=2, window=8, slots=6, block=4)"
    facts = Facts(
        goal="recall beyond the window, at constant memory",
        exact="its own rule, to rounding; the unpatched model while a text fits the window",
        cost="what is dropped is gone, and the question is not known when that is decided",
        source="Park et al. 2025, [2504.15364](https://arxiv.org/abs/2504.15364)",
    )

    sinks: int = 4
    window: int = 64
    slots: int = 444
    block: int = 32
    shared: int | None = None
    budgets: Literal["measured", "equal"] | tuple[int, ...] = "measured"
    layers: tuple[int, ...] | None = None
    kv: Literal["model", "int8"] = "model"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("window", 1), ("slots", 1), ("block", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of tokens, at least {least}")
        if self.block > self.window:
            raise ValueError(
                f"block={self.block} is more than window={self.window}: tokens are compared before they leave it, so give at most that"
            )
        if self.shared is not None and (not isinstance(self.shared, int) or isinstance(self.shared, bool) or self.shared < 1):
            raise ValueError(f"shared={self.shared!r}: give a number of kv heads, or None")
        if isinstance(self.budgets, list):
            object.__setattr__(self, "budgets", tuple(self.budgets))
        if self.budgets not in ("measured", "equal") and not (
            isinstance(self.budgets, tuple) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in self.budgets)
        ):
            raise ValueError(f'budgets={self.budgets!r}: give "measured", "equal", or a number of slots, at least 1, for each layer')
        object.__setattr__(self, "layers", check_layers(self.layers))
        check_kv(self.kv)

    def check(self, target: Target) -> None:
        self._plan(target)

    def apply(self, target: Target, handle: Handle) -> None:
        install_memory(target, handle, *self._plan(target))

    def promises(self, target: Target) -> Promises:
        plan, owned = self._plan(target)
        if self.kv == "int8":
            return Promises(bounded=plan.owns_all, rounds=True)
        slots = {}
        for layer in owned:
            rule = plan.rules[layer.index]
            if isinstance(rule, MemoryRule):
                slots[layer.name] = rule.slots[layer.index], rule.shared
        definition = functools.partial(
            memory_logits,
            slots=slots,
            sinks=self.sinks,
            window=self.window,
            block=self.block,
            limit=target.position_limit or NO_LIMIT,
        )
        return Promises(same_up_to=plan.main.capacity, definition=definition, bounded=plan.owns_all)

    def exercised(self) -> Memory:
        window = min(self.window, _SHORT)
        return dataclasses.replace(self, window=window, slots=min(self.slots, _SHORT), block=min(self.block, window))

    def _plan(self, target: Target) -> tuple[Plan, list[AttentionLayer]]:
        return plan_memory(self, target)
