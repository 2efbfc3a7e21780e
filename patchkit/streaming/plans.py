"""Plans: the choice of the layers that stream, and their rules."""

from __future__ import annotations

import functools
from typing import Any

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, PatchConflict, UnsupportedModel
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.rule import LayerRule, Plan

# Bounded positions stay below this where the model allows it: small enough for float32 angles, large enough to rotate rarely.
BOUNDED_POSITIONS = 1024


def check_layers(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Return the option ``layers`` as a tuple.

    Raises:
        ValueError: it is neither None nor layer indices.
    """
    if layers is None:
        return None
    if not isinstance(layers, tuple | list) or not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise ValueError(f"layers={layers!r}: give layer indices such as [0, 1], or None for all")
    return tuple(layers)


def check_kv(kv: str) -> None:
    """Check the option ``kv``.

    Raises:
        ValueError: it is neither "model" nor "int8".
    """
    if kv not in ("model", "int8"):
        raise ValueError(f"kv={kv!r}: give 'model' (keys and values as the model computes them) or 'int8'")


def chosen_layers(layers: list[AttentionLayer], indices: tuple[int, ...]) -> list[AttentionLayer]:
    """Return the layers with these indices, in ascending order.

    Raises:
        NothingMatched: a layer does not exist, or has no full attention.
    """
    by_index = {layer.index: layer for layer in layers}
    for index in indices:
        if index not in by_index or by_index[index].kind != "full":
            known = [layer.index for layer in layers if layer.kind == "full"]
            raise NothingMatched(f"layers={list(indices)}: layer {index} has no full attention. Layers that do: {listed(known)}")
    return [by_index[index] for index in sorted(set(indices))]


def make_plan(target: Target, patch: str, chosen: dict[int, LayerRule], movable: bool = True) -> tuple[Plan, list[AttentionLayer]]:
    """Return the plan of one patch, and its layers: the chosen ones and, where all others have a sliding window, those too.

    Args:
        patch: its name, for messages.
        chosen: a rule for each chosen layer, by index; layers with equal rules will share one.
        movable: positions can be bounded, because no layer's weights depend on them.

    Raises:
        UnsupportedModel: positions of this model cannot be kept bounded, or layers of one module have different rules.
    """
    layers, name = target.attention_layers, type(target.model).__name__
    capacity, limit = next(iter(chosen.values())).capacity, target.position_limit
    if not movable or any(layer.rotary is not None for layer in layers):
        if "position_ids" not in _compat.argument_names(target.decoder):
            raise UnsupportedModel(f"{type(target.decoder).__name__}.forward takes no position_ids, so positions cannot be kept bounded")
        if limit is not None and capacity > limit:
            first = next(iter(chosen.values()))
            raise UnsupportedModel(
                f"sinks + window = {capacity} is more than the {limit} positions that {name} was made for: "
                f"use window={max(1, limit - first.sinks)} or less"
            )
    owns_all = all(layer.index in chosen or layer.kind == "sliding" for layer in layers)
    owned = [layer for layer in layers if layer.index in chosen or (owns_all and layer.kind == "sliding")]
    int8 = next(iter(chosen.values())).int8
    for layer in owned:
        if int8 and (obstacle := _int8_obstacle(layer)) is not None:
            raise UnsupportedModel(
                f'kv="int8" would not be exact on {name}: in layer {layer.index} ({layer.name}), {obstacle}. Leave kv out'
            )
    made: list[LayerRule] = []
    rules: dict[int, LayerRule] = {}
    for layer in owned:
        wanted = chosen.get(layer.index) or LayerRule(0, layer.window or 1, layer.rotary, sliding=True, int8=int8)
        rule = next((rule for rule in made if rule.same_rule(wanted)), None)
        if rule is None:
            rule = wanted
            rule.number = len(made)
            made.append(rule)
        rules[layer.index] = rule
    for layer in owned:
        if any(other.module is layer.module and rules[other.index] is not rules[layer.index] for other in owned):
            raise UnsupportedModel(f"{patch} would not be exact on {name}: layers with different rules share the module {layer.name}")
    position_limit = None
    if owns_all and movable:
        reach = next(iter(chosen.values())).reach
        position_limit = max(reach, min(limit or BOUNDED_POSITIONS, max(2 * reach, BOUNDED_POSITIONS)))
    plan = Plan(
        rules,
        main=rules[next(iter(chosen))],
        limit=position_limit,
        stock_layers=functools.partial(stock_layers_of, target.config),
        make_cache=StreamingCache,
        owns_all=owns_all,
        has_alibi=any(layer.alibi is not None for layer in owned),
    )
    return plan, owned


def _int8_obstacle(layer: AttentionLayer) -> str | None:
    """The reason why keys and values of a layer cannot be kept in int8; None if they can."""
    if layer.alibi is not None or not layer.interface:
        return "attention is computed by the model's own function, which would see exact keys where there is no cache"
    if not layer.attends_stored or (layer.rotary is not None and layer.rotary.slot == "values"):
        return "the cache holds something else than the keys and values that attention receives (multi-head latent attention)"
    return None


def joined(target: Target, first: Plan, second: Plan) -> Plan:
    """Return one plan with the rules of two patches of different layers.

    Raises:
        PatchConflict: both have rules for one layer.
    """
    both = sorted(first.rules.keys() & second.rules.keys())
    if both:
        raise PatchConflict(f"two patches have rules for attention layers {listed(both)}: give each its own layers with layers=")
    rules = dict(sorted({**first.rules, **second.rules}.items()))
    for number, rule in enumerate(dict.fromkeys(rules.values())):
        rule.number = number
    return Plan(
        rules,
        main=first.main if first.main.in_cache else second.main,  # in-cache positions are counted by it
        limit=None,
        stock_layers=first.stock_layers,
        make_cache=StreamingCache,
        owns_all=all(layer.index in rules for layer in target.attention_layers),
        has_alibi=first.has_alibi or second.has_alibi,
    )


def stock_layers_of(config: Any) -> list[Any]:
    """Fresh cache layers as transformers makes them for a model with this config."""
    return _compat.DynamicCache(config=config).layers


def windows_of(layers: list[AttentionLayer]) -> list[int]:
    """Sizes in tokens, ascending, of the sliding windows among these layers."""
    return sorted({layer.window for layer in layers if layer.window is not None})


def listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) if values else "none"
