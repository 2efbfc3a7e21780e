"""Linear attention: a softmax window, and one state of constant size for everything older.

Zhang et al. 2024, "LoLCATs", https://arxiv.org/abs/2410.10254; Katharopoulos et al. 2020, "Transformers are RNNs",
https://arxiv.org/abs/2006.16236. `patchkit.linear.hybrid` has the equation.

Query i sees the last W tokens, itself included, and S sinks by softmax, and all other tokens through a sum of products of features,
under one normaliser. Memory and time per token do not depend on the length of the text. Without a converted state the features are
untrained, and so is the weight of old tokens: the model runs, and is worse than it was.

Differs from LoLCATs in that a horizon may bound the weight of old tokens, that queries and keys have no rotation in the linear part,
and in sinks, which stand at their true distance.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

from patchkit.anatomy.layers import BAKED_IN, AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.attention import set_attention
from patchkit.definitions import hybrid_logits
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.handle import Handle
from patchkit.linear.attention import HybridLayer, attend_linearly, obstacle_of
from patchkit.linear.cache import LinearRule
from patchkit.linear.feature_maps import available_feature_maps
from patchkit.linear.hybrid import HybridAttention
from patchkit.linear.state import LinearState, head_sizes, load_state
from patchkit.linear.weights import adapt
from patchkit.patch import Patch, Promises, Stage, register_patch
from patchkit.streaming.install import open_stream, report_layers, stream_layer
from patchkit.streaming.plans import check_layers, chosen_layers, make_plan
from patchkit.streaming.rule import LayerRule, Plan

# A window that a short text fills several times.
_SHORT_WINDOW = 24


@register_patch("linear")
@dataclass(frozen=True)
class LinearAttention(Patch):
    """A softmax window, and linear attention over everything older, at constant memory and time per token.

    Args:
        feature_map: "elu1", "relu", "identity"; "hedgehog" and "t2r" are made to be trained.
        window: W, last tokens that are seen by softmax, the current one included.
        sinks: S, first tokens of every sequence that are seen by softmax.
        layers: indices of the attention layers to patch; None (or "all") for all with full attention, or all that ``state_dict`` has.
            The others keep all keys.
        min_length: a query with fewer tokens before it sees all of them by softmax, as unpatched.
        horizon: number of old tokens from which on their weight grows no more; None for never.
        state_dict: what `patchkit linearize` has learned for this model: its file, the dict of tensors, or the `LinearState`.
            Feature map, window, sinks and horizon are then its own, and may be left out.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.ATTENTION
    acts = ("tokens taken into the state",)

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
            object.__setattr__(self, "state_dict", _StateDict(self.state_dict))

    @classmethod
    def candidates(cls, target: Target) -> list[LinearAttention]:
        return []  # without a converted state, which is the user's, the quality is not that of the model

    def check(self, target: Target) -> None:
        self._plan(target)

    def apply(self, target: Target, handle: Handle) -> None:
        plan, owned, state = self._plan(target)
        runtime = open_stream(target, handle, plan)
        for layer in owned:
            rule = runtime.plan.rules[layer.index]
            if isinstance(rule, LinearRule):
                attend = functools.partial(attend_linearly, runtime, HybridLayer(layer.index, rule, rule.parts[layer.index]))
                set_attention(handle, layer.module, attend)
            else:
                stream_layer(target, handle, runtime, layer)
        report_layers(target, handle, plan)
        if state is not None:
            inside = tuple(f"{layer.name}." for layer in owned if isinstance(runtime.plan.rules[layer.index], LinearRule))
            adapted = {name: pair for name, pair in state.lora.items() if name.startswith(inside)}
            for name, (a, b) in adapted.items():
                adapt(target.model.get_submodule(name), a, b, handle)
            if adapted:
                handle.record.changed("adapted projections", len(adapted))
        else:
            handle.record.warn(
                "without conversion, quality is not that of the original model (stdlib-7m: perplexity 826 instead of 12): "
                "run `patchkit linearize`"
            )
        if any(layer.obstacle == BAKED_IN for layer in owned):
            limit = target.position_limit
            handle.record.warn(f"positions are learned, so sequences end where they end{'' if limit is None else f', at {limit} tokens'}")
        elif plan.limit is None:
            handle.record.warn("layers that patchkit does not keep need true positions, so positions are not bounded")

    def promises(self, target: Target) -> Promises:
        plan, owned, state = self._plan(target)
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

    def _plan(self, target: Target) -> tuple[Plan, list[AttentionLayer], LinearState | None]:
        """The rules of all layers that patchkit will keep, and the converted state; every refusal is raised here."""
        layers, name = target.attention_layers, type(target.model).__name__
        state = None if self.state_dict is None else load_state(self.state_dict, target)
        if state is not None:
            self._refuse_other_options(state)
        indices = self.layers if self.layers is not None or state is None else tuple(state.layers)
        chosen = [layer for layer in layers if layer.kind == "full"] if indices is None else chosen_layers(layers, indices)
        if not chosen:
            raise NothingMatched(f"every attention layer of {name} already has its own window: there is nothing older to sum up")
        learned = not any(key.endswith("inv_freq") for key, _ in target.model.named_buffers())
        for layer in layers:
            calls = sum(other.calls for other in layers if other.module is layer.module)
            obstacle = obstacle_of(layer, calls, learned) if layer in chosen else layer.obstacle if layer.kind != "full" else None
            if obstacle is not None:
                where = f"layer {layer.index} ({layer.name})"
                raise UnsupportedModel(f"linear attention cannot stand in for that of {name}: in {where}, {obstacle}")
        if target.position_limit is not None and self.min_length > target.position_limit:
            raise UnsupportedModel(
                f"min_length={self.min_length} is more than the {target.position_limit} positions that {name} was made for"
            )
        parts = self._parts(target, chosen, state)
        window, sinks = (self.window, self.sinks) if state is None else (state.window, state.sinks)
        kept = max(window, self.min_length - sinks)
        rules: dict[int, LayerRule] = {
            layer.index: LinearRule(
                sinks, kept, layer.rotary, in_cache=False, softmax_window=window, min_length=self.min_length, parts=parts
            )
            for layer in chosen
        }
        movable = not any(layer.obstacle == BAKED_IN for layer in chosen)
        return *make_plan(target, "linear attention", rules, movable), state

    def _parts(self, target: Target, chosen: list[AttentionLayer], state: LinearState | None) -> dict[int, HybridAttention]:
        parts, sizes = {}, head_sizes(target)
        for layer in chosen:
            if state is None:
                part = HybridAttention(self.feature_map, *sizes[layer.index], horizon=self.horizon)
            elif layer.index in state.parts:
                # Its own copy: a state may be given to several models, on several devices.
                part = HybridAttention(state.feature_map, *sizes[layer.index], horizon=state.horizon)
                if state.parts[layer.index].readout is not None:
                    part.add_readout()
                part.load_state_dict(state.parts[layer.index].state_dict())
            else:
                raise NothingMatched(f"layers={list(self.layers or ())}: state_dict has converted layers {state.layers} only")
            device = next((p.device for p in layer.module.parameters() if p.device.type != "meta"), target.model.device)
            parts[layer.index] = part.float().to(device).requires_grad_(False)
        return parts

    def _refuse_other_options(self, state: LinearState) -> None:
        """An option that is neither its default nor what the state was trained with is a mistake."""
        for name in ("feature_map", "window", "sinks", "horizon"):
            value, trained = getattr(self, name), getattr(state, name)
            if value not in (type(self).__dataclass_fields__[name].default, trained):
                raise UnsupportedModel(f"{name}={value!r}, but state_dict was converted with {trained!r}: leave it out, or convert anew")


class _StateDict(dict[str, Any]):
    """Tensors by name, which no spec string can spell."""

    def __repr__(self) -> str:
        return "<state dict>"
