"""The plan of `linear`: which layers get hybrid attention, and every reason to refuse a model or a converted state."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol

from patchkit.anatomy.layers import BAKED_IN, AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.linear.attention import obstacle_of
from patchkit.linear.hybrid import HybridAttention
from patchkit.linear.rule import LinearRule
from patchkit.linear.state import LinearState, head_sizes, load_state
from patchkit.streaming.plans import chosen_layers, make_plan
from patchkit.streaming.rule import LayerRule, Plan


class HybridOptions(Protocol):
    """The options of the patch `linear`, a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def feature_map(self) -> str: ...
    @property
    def window(self) -> int: ...
    @property
    def sinks(self) -> int: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def min_length(self) -> int: ...
    @property
    def horizon(self) -> int | None: ...
    @property
    def state_dict(self) -> Any: ...


class HybridPlan(NamedTuple):
    """The plan of all layers that patchkit will keep, those layers, and the converted state, if there is one."""

    plan: Plan
    owned: list[AttentionLayer]
    state: LinearState | None


def plan_hybrid(options: HybridOptions, target: Target) -> HybridPlan:
    """Return the plan for one model.

    Raises:
        NothingMatched: there is no layer to patch, or none of those asked for was converted.
        UnsupportedModel: linear attention cannot replace that of this model, or the state belongs to another model or other options.
    """
    layers, name = target.attention_layers, type(target.model).__name__
    state = None if options.state_dict is None else load_state(options.state_dict, target)
    if state is not None:
        _refuse_other_options(options, state)
    indices = options.layers if options.layers is not None or state is None else tuple(state.layers)
    chosen = [layer for layer in layers if layer.kind == "full"] if indices is None else chosen_layers(layers, indices)
    if not chosen:
        raise NothingMatched(f"every attention layer of {name} already has its own window: there is nothing older to sum up")
    learned = not any(key.endswith("inv_freq") for key, _ in target.model.named_buffers())
    for layer in layers:
        calls = sum(other.calls for other in layers if other.module is layer.module)
        obstacle = obstacle_of(layer, calls, learned) if layer in chosen else layer.obstacle if layer.kind != "full" else None
        if obstacle is not None:
            where = f"layer {layer.index} ({layer.name})"
            raise UnsupportedModel(f"linear attention cannot replace that of {name}: in {where}, {obstacle}")
    if target.position_limit is not None and options.min_length > target.position_limit:
        raise UnsupportedModel(
            f"min_length={options.min_length} is more than the {target.position_limit} positions that {name} was made for"
        )
    parts = _parts(options, target, chosen, state)
    window, sinks = (options.window, options.sinks) if state is None else (state.window, state.sinks)
    kept = max(window, options.min_length - sinks)
    rules: dict[int, LayerRule] = {
        layer.index: LinearRule(
            sinks, kept, layer.rotary, in_cache=False, softmax_window=window, min_length=options.min_length, parts=parts
        )
        for layer in chosen
    }
    movable = not any(layer.obstacle == BAKED_IN for layer in chosen)
    return HybridPlan(*make_plan(target, "linear attention", rules, movable), state)


def _parts(options: HybridOptions, target: Target, chosen: list[AttentionLayer], state: LinearState | None) -> dict[int, HybridAttention]:
    parts, sizes = {}, head_sizes(target)
    for layer in chosen:
        if state is None:
            part = HybridAttention(options.feature_map, *sizes[layer.index], horizon=options.horizon)
        elif layer.index in state.parts:
            # Its own copy: a state may be given to several models, on several devices.
            part = HybridAttention(state.feature_map, *sizes[layer.index], horizon=state.horizon)
            if state.parts[layer.index].readout is not None:
                part.add_readout()
            part.load_state_dict(state.parts[layer.index].state_dict())
        else:
            raise NothingMatched(f"layers={list(options.layers or ())}: state_dict has converted layers {state.layers} only")
        device = next((p.device for p in layer.module.parameters() if p.device.type != "meta"), target.model.device)
        parts[layer.index] = part.float().to(device).requires_grad_(False)
    return parts


def _refuse_other_options(options: HybridOptions, state: LinearState) -> None:
    """Refuse an option that is neither its default nor the value that the state was trained with."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in ("feature_map", "window", "sinks", "horizon"):
        value, trained = getattr(options, name), getattr(state, name)
        if value not in (defaults[name], trained):
            raise UnsupportedModel(f"{name}={value!r}, but state_dict was converted with {trained!r}: leave it out, or convert again")
