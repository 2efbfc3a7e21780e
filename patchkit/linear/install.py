"""The edits that make layers attend by hybrid attention."""

from __future__ import annotations

import functools

from patchkit.anatomy.layers import BAKED_IN
from patchkit.anatomy.target import Target
from patchkit.attention import set_attention
from patchkit.derived import Derived, keep_fresh
from patchkit.handle import Handle
from patchkit.linear.attention import HybridLayer, attend_linearly
from patchkit.linear.plan_hybrid import HybridPlan
from patchkit.linear.rule import LinearRule
from patchkit.linear.weights import adapt, adapt_again
from patchkit.streaming.install import masked_implementation, open_stream, report_layers, stream_layer, warn_of_positions


def install_hybrid(target: Target, handle: Handle, planned: HybridPlan) -> None:
    """Make the layers of a plan attend by its rules, with the adapted projections of its state, and report it in the record."""
    plan, owned, state = planned
    runtime = open_stream(target, handle, plan)
    for layer in owned:
        rule = runtime.plan.rules[layer.index]
        if isinstance(rule, LinearRule):
            attend = functools.partial(attend_linearly, runtime, HybridLayer(layer.index, rule, rule.parts[layer.index]))
            set_attention(handle, layer.module, attend)
        else:
            stream_layer(layer, handle, runtime, masked_implementation(target))
    report_layers(target, handle, plan)
    if state is not None:
        inside = tuple(f"{layer.name}." for layer in owned if isinstance(runtime.plan.rules[layer.index], LinearRule))
        adapted = {name: pair for name, pair in state.lora.items() if name.startswith(inside)}
        pairs = [adapt(target.model.get_submodule(name), a, b, handle) for name, (a, b) in adapted.items()]
        if adapted:
            derived = Derived([pair.original for pair in pairs], functools.partial(adapt_again, pairs))
            keep_fresh(handle, target.model, target.decoder, derived)
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
        warn_of_positions(handle)
