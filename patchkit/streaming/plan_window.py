"""The plan of `streaming`: which layers get sinks and a window, and every reason to refuse a model."""

from __future__ import annotations

from collections.abc import Callable

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.rotary import Rotary
from patchkit.anatomy.target import Target
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.streaming.plans import chosen_layers, listed, make_plan, windows_of
from patchkit.streaming.refresh import Refresh
from patchkit.streaming.rule import LayerRule, Plan


def plan_window(
    target: Target, indices: tuple[int, ...] | None, rule_of: Callable[[Rotary | None], LayerRule], refresh: Refresh | None
) -> tuple[Plan, list[AttentionLayer]]:
    """Return the plan, with the rules of all layers that patchkit will keep, and those layers.

    Args:
        indices: indices of the attention layers to patch; None for all with full attention.
        rule_of: makes the rule of a layer with this rotary embedding.

    Raises:
        NothingMatched: there is no layer to patch.
        UnsupportedModel: streaming would not be exact on this model, or ``refresh`` does not serve it.
    """
    layers, name = target.attention_layers, type(target.model).__name__
    chosen = [layer for layer in layers if layer.kind == "full"] if indices is None else chosen_layers(layers, indices)
    for layer in layers:
        if layer.obstacle is not None and (layer in chosen or layer.kind != "full"):
            raise UnsupportedModel(f"streaming would not be exact on {name}: in layer {layer.index} ({layer.name}), {layer.obstacle}")
    if not chosen:
        raise NothingMatched(
            f"every attention layer of {name} already has its own window (of {listed(windows_of(layers))} tokens): nothing to add"
        )
    plan, owned = make_plan(target, "streaming", {layer.index: rule_of(layer.rotary) for layer in chosen})
    if refresh is not None:
        plan.make_cache = refresh.new_cache
        obstacle = refresh.obstacle(plan, chosen)
        if obstacle is not None:
            raise UnsupportedModel(f"refresh={refresh.spec} does not go with {name}: {obstacle}. Leave refresh out")
    return plan, owned
