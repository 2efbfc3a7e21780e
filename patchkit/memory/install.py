"""The edits that give layers slots beyond their window."""

from __future__ import annotations

import functools

from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.attention import set_attention
from patchkit.handle import Handle
from patchkit.memory.attention import SeenSlots
from patchkit.memory.rule import MemoryRule
from patchkit.streaming.attention import attend_in_window
from patchkit.streaming.install import masked_implementation, open_stream, report_layers, stream_layer, warn_of_positions
from patchkit.streaming.rule import Plan

# Arguments of attention calls under which attention is a softmax of scaled scores.
_PLAIN = {"scaling", "is_causal", "position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states"}


def plain_scaling(target: Target, layer: AttentionLayer) -> float | None:
    """Return the scaling of a layer whose attention is a softmax of scaled scores; None for other layers."""
    call = next(call for call in target.attention_calls if call["layer"] == layer.index)
    if not set(layer.arguments) <= _PLAIN:
        return None
    return float(call["kwargs"].get("scaling") or call["query"].shape[-1] ** -0.5)


def install_memory(target: Target, handle: Handle, plan: Plan, owned: list[AttentionLayer]) -> None:
    """Make the layers ``owned`` attend by the rules of ``plan``, and report it in the handle's record."""
    runtime = open_stream(target, handle, plan)
    masked = masked_implementation(target)
    for layer in owned:
        rule = runtime.plan.rules[layer.index]
        if isinstance(rule, MemoryRule):
            seen = SeenSlots(runtime, layer.index, rule, plain_scaling(target, layer))
            set_attention(handle, layer.module, functools.partial(attend_in_window, runtime, rule, layer.rotary, masked, None, seen))
        else:
            stream_layer(layer, handle, runtime, masked)
    report_layers(target, handle, plan)
    if plan.limit is None:
        warn_of_positions(handle)
