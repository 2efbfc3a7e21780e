"""The plan of `memory`: which layers get slots, how many heads share them, and every reason to refuse a model."""

from __future__ import annotations

from typing import Protocol

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.memory.budgets import measured_shares, split
from patchkit.memory.rule import MemoryRule
from patchkit.streaming.plans import chosen_layers, listed, make_plan, windows_of
from patchkit.streaming.rule import LayerRule, Plan


class MemoryOptions(Protocol):
    """The options of the patch `memory`."""

    @property
    def sinks(self) -> int: ...
    @property
    def window(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def shared(self) -> int | None: ...
    @property
    def budgets(self) -> str | tuple[int, ...]: ...
    @property
    def layers(self) -> tuple[int, ...] | None: ...
    @property
    def kv(self) -> str: ...


# Distances stay below this where a model has no limit.
NO_LIMIT = 8192

# R is this part of the positions that a model was made for, about: moving rounds keys once more, and a larger R leaves L smaller.
_TURNS = 8

# Every head of a pool is compared with the slots of all of them, so the work grows with their number.
MOST_SHARED = 4


def plan_memory(options: MemoryOptions, target: Target) -> tuple[Plan, list[AttentionLayer]]:
    """Return the plan, with the rules of all layers that patchkit will keep, and those layers.

    Raises:
        NothingMatched: there is no layer to patch.
        UnsupportedModel: the rule could not be kept on this model.
        ValueError: ``shared`` does not divide the kv heads of a layer, or there are other layers than ``budgets``.
    """
    layers, name = target.attention_layers, type(target.model).__name__
    indices, shared = options.layers, options.shared
    chosen = [layer for layer in layers if layer.kind == "full"] if indices is None else chosen_layers(layers, indices)
    if not chosen:
        raise NothingMatched(
            f"every attention layer of {name} already has its own window (of {listed(windows_of(layers))} tokens): nothing leaves it that "
            "the model has ever seen"
        )
    for layer in layers:
        obstacle = layer.obstacle
        if obstacle is None and layer in chosen:
            obstacle = obstacle_of(layer)
            if obstacle is None and any(other is not layer and other.module is layer.module for other in layers):
                obstacle = "its module computes several layers of the cache, and there is one set of slots for a module"
        if obstacle is not None and (layer in chosen or layer.kind != "full"):
            raise UnsupportedModel(f"memory would not be exact on {name}: in layer {layer.index} ({layer.name}), {obstacle}")
    heads = {call["layer"]: call["key"].shape[1] for call in target.attention_calls}
    for layer in chosen:
        if shared is not None and heads[layer.index] % shared:
            count = heads[layer.index]
            raise ValueError(f"shared={shared}: layer {layer.index} of {name} has {count} kv heads, so give a divisor of that")
    slots = _budgets(options, target, chosen, heads)
    far, turn = distances(target.position_limit or NO_LIMIT, options)
    rules: dict[int, LayerRule] = {}
    for layer in chosen:
        pool = shared or max(n for n in range(1, MOST_SHARED + 1) if heads[layer.index] % n == 0)
        rules[layer.index] = MemoryRule(
            options.sinks,
            options.window,
            layer.rotary,
            int8=options.kv == "int8",
            slots=slots,
            block=options.block,
            shared=pool,
            far=far,
            turn=turn,
        )
    return make_plan(target, "memory", rules)


def distances(limit: int, options: MemoryOptions) -> tuple[int, int]:
    """Return L and R: no token is seen at a distance of L + R or more, which is the model's ``limit`` of positions."""
    turn = max(1, limit // _TURNS // options.block) * options.block
    return max(options.window, limit - turn), turn


def _budgets(options: MemoryOptions, target: Target, chosen: list[AttentionLayer], heads: dict[int, int]) -> dict[int, int]:
    """Slots per kv head of each layer, by its index."""
    if isinstance(options.budgets, tuple):
        if len(options.budgets) != len(chosen):
            raise ValueError(f"budgets={list(options.budgets)}: give one number for each of the {len(chosen)} layers that are patched")
        return {layer.index: count for layer, count in zip(chosen, options.budgets, strict=True)}
    if options.budgets == "equal":
        return {layer.index: options.slots for layer in chosen}
    return split(measured_shares(target, chosen), options.slots, heads)


def obstacle_of(layer: AttentionLayer) -> str | None:
    """The reason why a layer cannot have slots; None if it can."""
    if layer.alibi is not None:
        return "scores get a bias that grows with the distance (ALiBi), and its own attention function computes it"
    if not layer.interface or layer.calls != 1:
        return f"attention is called {layer.calls} times in a forward through transformers' interface, and there is one set of slots"
    if not layer.attends_stored or (layer.rotary is not None and layer.rotary.slot == "values"):
        return "the cache holds something else than the keys and values that attention receives (multi-head latent attention)"
    return None
