"""Linear attention: a softmax window, and one state of constant size for everything older.

Zhang et al. 2024, "LoLCATs", https://arxiv.org/abs/2410.10254; Katharopoulos et al. 2020, "Transformers are RNNs",
https://arxiv.org/abs/2006.16236. `patchkit.linear.hybrid` has the equation.

Query i sees the last W tokens, itself included, and S sinks by softmax, and all other tokens through a sum of products of features,
under one normaliser. Memory and time per token do not depend on the length of the sequence. Without a converted state the features and
the weight of old tokens are untrained: the model runs, with lower quality.

Differs from LoLCATs in three ways: a horizon may bound the weight of old tokens; queries and keys have no rotation in the linear part;
there are sinks, which keep their true distance.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from patchkit.anatomy.target import Target
from patchkit.definitions import hybrid_logits
from patchkit.handle import Handle
from patchkit.linear.feature_maps import available_feature_maps
from patchkit.linear.install import install_hybrid
from patchkit.linear.plan_hybrid import plan_hybrid
from patchkit.linear.rule import LinearRule
from patchkit.linear.state import StateDict
from patchkit.patch import Facts, Patch, Promises, Stage, register_patch
from patchkit.streaming.plans import check_layers

# Tokens of a window that a short sequence fills several times.
_SHORT_WINDOW = 24


@register_patch("linear")
@dataclass(frozen=True)
class LinearAttention(Patch):
    """A softmax window, and linear attention over everything older, at constant memory and time per token.

    Args:
        feature_map: "elu1", "relu" or "identity"; "hedgehog" and "t2r" have weights, which need training.
        window: W, number of last tokens that are seen by softmax, the current one included.
        sinks: S, number of first tokens of every sequence that are seen by softmax.
        layers: indices of the attention layers to patch; None (or "all") for all with full attention, or all that ``state_dict`` has.
            The others keep all keys.
        min_length: a query with fewer tokens before it sees all of them by softmax, as in the unpatched model.
        horizon: number of old tokens at which their total weight stops growing; None for never.
        state_dict: the result of `patchkit linearize` for this model: its file, the dict of tensors, or the `LinearState`. It holds
            feature map, window, sinks and horizon, which may then be left out.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.ATTENTION
    acts = ("tokens taken into the state",)
    example = "linear(window=6)"
    facts = Facts(
        goal="constant memory that keeps a trace of everything, after `patchkit linearize`",
        exact="no: another function than the model's, computed alike however tokens are fed",
        cost="today no better than its window alone, and worse without a converted `state_dict`. No key of an old token is kept",
        source="Zhang et al. 2024, [2410.10254](https://arxiv.org/abs/2410.10254); Katharopoulos et al. 2020, "
        "[2006.16236](https://arxiv.org/abs/2006.16236)",
    )

    feature_map: str = "elu1"
    window: int = 64
    sinks: int = 0
    layers: tuple[int, ...] | None = None
    min_length: int = 0
    horizon: int | None = None
    state_dict: Any = None

    def __post_init__(self) -> None:
        if self.feature_map not in available_feature_maps():
            raise ValueError(f"feature_map={self.feature_map!r} is unknown: give one of {', '.join(available_feature_maps())}")
        for name, least in (("window", 1), ("sinks", 0), ("min_length", 0), ("horizon", 1)):
            value = getattr(self, name)
            if name == "horizon" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                why = ", because a query without softmax has no scale to weigh old tokens by" if name == "window" else ""
                raise ValueError(f"{name}={value!r}: give a whole number of tokens, at least {least}{why}")
        object.__setattr__(self, "layers", check_layers(None if self.layers == "all" else self.layers))
        if isinstance(self.state_dict, dict):
            object.__setattr__(self, "state_dict", StateDict(self.state_dict))

    @classmethod
    def candidates(cls, target: Target) -> list[LinearAttention]:
        return []  # without a converted state, which only the user has, the quality is not that of the model

    def check(self, target: Target) -> None:
        plan_hybrid(self, target)

    def apply(self, target: Target, handle: Handle) -> None:
        install_hybrid(target, handle, plan_hybrid(self, target))

    def promises(self, target: Target) -> Promises:
        plan, owned, state = plan_hybrid(self, target)
        parts = {layer.name: plan.main.parts[layer.index] for layer in owned if isinstance(plan.main, LinearRule) and layer.kind == "full"}
        window, sinks = (self.window, self.sinks) if state is None else (state.window, state.sinks)
        adapted = {} if state is None else state.lora
        definition = functools.partial(hybrid_logits, parts=parts, sinks=sinks, window=window, min_length=self.min_length, adapted=adapted)
        changed = adapted or any(part.readout is not None for part in parts.values())
        reach = 0 if changed else max(sinks + window, self.min_length)
        return Promises(same_up_to=reach, definition=definition, bounded=plan.owns_all)

    def exercised(self) -> LinearAttention:
        if self.state_dict is not None:  # the window it was trained with
            return self
        short = min(self.window, _SHORT_WINDOW)
        return dataclasses.replace(self, window=short, min_length=min(self.min_length, 2 * short))
