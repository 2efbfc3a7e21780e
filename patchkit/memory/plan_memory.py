"""The plan of `memory`: which layers get slots, how many heads share them, and every reason to refuse a model."""

from __future__ import annotations

from collections.abc import Callable

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.memory.rule import MemoryRule
from patchkit.streaming.plans import chosen_layers, listed, make_plan, windows_of
from patchkit.streaming.rule import Plan

# Every head of a pool is compared with the slots of all of them, so the work grows with their number.
MOST_SHARED = 4


def plan_memory(
    target: Target, indices: tuple[int, ...] | None, shared: int | None, rule_of: Callable[[Rotary | None, int], MemoryRule]
) -> tuple[Plan, list[AttentionLayer]]:
    """Return the plan, with the rules of all layers that patchkit will keep, and those layers.

    Args:
        indices: indices of the attention layers to patch; None for all with full attention.
        shared: kv heads that share their slots; None for as many as divide a layer's number of them, and are at most `MOST_SHARED`.
        rule_of: makes the rule of a layer with this rotary embedding, of which so many heads share their slots.

    Raises:
        NothingMatched: there is no layer to patch.
        UnsupportedModel: the rule could not be kept on this model.
        ValueError: ``shared`` does not divide the kv heads of a layer.
    """
    layers, name = target.attention_layers, type(target.model).__name__
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
        if obstacle is not None and (layer in chosen or layer.kind != "full"):
            raise UnsupportedModel(f"memory would not be exact on {name}: in layer {layer.index} ({layer.name}), {obstacle}")
    heads = {call["layer"]: call["key"].shape[1] for call in target.attention_calls}
    rules = {}
    for layer in chosen:
        count = heads[layer.index]
        if shared is not None and count % shared:
            raise ValueError(f"shared={shared}: layer {layer.index} of {name} has {count} kv heads, so give a divisor of that")
        rules[layer.index] = rule_of(layer.rotary, shared or max(n for n in range(1, MOST_SHARED + 1) if count % n == 0))
    return make_plan(target, "memory", dict(rules))


def obstacle_of(layer: AttentionLayer) -> str | None:
    """The reason why a layer cannot have slots; None if it can."""
    if layer.alibi is not None:
        return "scores get a bias that grows with the distance (ALiBi), and its own attention function computes it"
    if not layer.interface or layer.calls != 1:
        return f"attention is called {layer.calls} times in a forward through transformers' interface, and there is one set of slots"
    if not layer.attends_stored or (layer.rotary is not None and layer.rotary.slot == "values"):
        return "the cache holds something else than the keys and values that attention receives (multi-head latent attention)"
    return None
