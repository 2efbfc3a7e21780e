"""The edits that make a model stream."""

from __future__ import annotations

import functools

from patchkit import _compat
from patchkit.anatomy.layers import AttentionLayer
from patchkit.anatomy.target import Target
from patchkit.attention import alias_of, configs_of, has_own_mask, original_name, set_alias, set_attention
from patchkit.handle import Handle
from patchkit.streaming.alibi import BIAS, Alibi, before_alibi_attention
from patchkit.streaming.attention import attend_in_window, watch_queries
from patchkit.streaming.generate import prepare_cache, refuse_continuous_batching
from patchkit.streaming.heavy_hitters import HeavyHitterRule
from patchkit.streaming.hooks import after_forward, before_forward, forget_masks
from patchkit.streaming.plans import joined, listed, windows_of
from patchkit.streaming.rule import Plan
from patchkit.streaming.runtime import Runtime, frequencies_of, keep_runtime, runtime_of


def install_window(target: Target, handle: Handle, plan: Plan, owned: list[AttentionLayer]) -> None:
    """Make the layers ``owned`` attend by the rules of ``plan``, and report it in the handle's record."""
    runtime = open_stream(target, handle, plan)
    masked = masked_implementation(target)
    for layer in owned:
        stream_layer(layer, handle, runtime, masked)
    report_layers(target, handle, plan)
    if plan.limit is None:
        warn_of_positions(handle)


def warn_of_positions(handle: Handle) -> None:
    """Record that positions grow with the sequence."""
    handle.record.warn("layers that patchkit does not keep need true positions, so positions are not bounded")


def open_stream(target: Target, handle: Handle, plan: Plan) -> Runtime:
    """Install the runtime of ``plan`` on the decoder, or join ``plan`` to the runtime that another patch has installed.

    Raises:
        PatchConflict: both plans have rules for one layer.
    """
    runtime = runtime_of(target.decoder)
    called = [layer.module for layer in target.attention_layers if layer.index in plan.rules and layer.interface]
    if runtime is not None:
        handle.set_attribute(runtime, "configs", configs_of(called, target.model) + runtime.configs)
        handle.set_attribute(runtime, "plan", joined(target, runtime.plan, plan))
        handle.set_attribute(runtime, "counters", [*runtime.counters, (plan.main, handle.record.hits)])
        handle.set_attribute(runtime, "frequencies", [*runtime.frequencies, *frequencies_of(target, plan)])
        return runtime
    configs = _compat.attention_configs(target.model)
    implementations = tuple({original_name(config) for config in configs})
    runtime = Runtime(plan, [(plan.main, handle.record.hits)], implementations, handle.record.warnings, configs_of(called, target.model))
    runtime.frequencies, runtime.mask_configs = frequencies_of(target, plan), tuple(configs)
    handle.on_undo(functools.partial(forget_masks, runtime))
    keep_runtime(handle, target.decoder, runtime)
    handle.pre_hook(target.decoder, before_forward, with_kwargs=True, prepend=True)
    handle.hook(target.decoder, after_forward, with_kwargs=True, always_call=True)
    handle.set_attribute(target.model, _compat.PREPARE_CACHE, functools.partial(prepare_cache, target.model, runtime))
    for name in _compat.continuous_batching(target.model):
        handle.set_attribute(target.model, name, functools.partial(refuse_continuous_batching, name))
    for config in configs:
        if not has_own_mask(config):  # an attention patch of other layers
            set_alias(handle, config, alias_of(original_name(config)))
    return runtime


def stream_layer(layer: AttentionLayer, handle: Handle, runtime: Runtime, masked: str) -> None:
    """Make one layer attend by its rule; ``masked`` names the attention that runs where a mask is needed (`masked_implementation`)."""
    rule = runtime.plan.rules[layer.index]
    if layer.alibi is not None:
        handle.set_attribute(layer.module, BIAS, Alibi(runtime, rule, layer))
        handle.pre_hook(layer.module, before_alibi_attention, with_kwargs=True)
    else:
        watch = functools.partial(watch_queries, runtime, layer.index) if isinstance(rule, HeavyHitterRule) else None
        attend = functools.partial(attend_in_window, runtime, rule, layer.rotary, masked, watch, None)
        set_attention(handle, layer.module, attend)


def report_layers(target: Target, handle: Handle, plan: Plan) -> None:
    """Record which layers were changed, which were left alone, and why."""
    layers = target.attention_layers
    changed = [layer for layer in layers if layer.kind == "full" and layer.index in plan.rules]
    sliding, chunked = ([layer for layer in layers if layer.kind == kind] for kind in ("sliding", "chunked"))
    others = [layer for layer in layers if layer.kind == "full" and layer not in changed]
    handle.record.changed("attention layers", len(changed))
    for kept, what in ((sliding, "sliding-window"), (chunked, "chunked")):
        if kept:
            handle.record.left_alone(f"{len(kept)} {what} layers", f"they keep their own rule, over {listed(windows_of(kept))} tokens")
    if others:
        why = "not in layers=: unless another patch has them, they keep all keys, so memory grows"
        handle.record.left_alone(f"{len(others)} attention layers", why)


def masked_implementation(target: Target) -> str:
    """Name the attention implementation that runs where a mask is needed: the model's own, unless that takes no mask of this kind."""
    own = target.attention_implementation
    if own in ("eager", "sdpa"):
        return own
    return "sdpa" if _compat.supports_sdpa(target.model) else "eager"
