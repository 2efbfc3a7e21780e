"""StreamingLLM: attention sinks and a sliding window, exact in every way of feeding tokens.

Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", https://arxiv.org/abs/2309.17453.

Query i attends to keys ``{0 .. S-1}`` (sinks) and ``{i-W+1 .. i}`` (window). The distance that the position embedding
sees is ``i - j`` for a window key and ``min(i, S+W-1) - j`` for a sink: positions are those inside the cache (section 3.2
of the paper), so they never exceed S + W - 1. While ``i < S + W`` this is the unpatched model.

Differs from the paper's code in that keys are cached turned and only the S sinks are turned at each step (the paper keeps
all keys unturned and turns S + W of them), that a forward of any number of tokens gives the same logits as one token at a
time, and that rows of a left-padded batch each have their own sinks.

Forwards of several tokens. Every query needs the sinks at another turn, so queries are turned instead: attention runs once
with query ``[q_window, q_sink]`` and keys ``[k, 0]`` (window) or ``[0, k]`` (sinks), twice the key dimension, whose inner
product is ``q_window . k`` or ``q_sink . k``. Any attention function of transformers computes it unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from patchkit import _compat
from patchkit.attention import (
    AttentionOutput,
    Masks,
    alias_of,
    configs_of,
    has_own_mask,
    original_function,
    original_name,
    refuse_other_attention,
    set_alias,
    swap_mask_builder,
)
from patchkit.compiled.step import StepCache
from patchkit.definitions import window_logits
from patchkit.errors import NothingMatched, PatchConflict, StreamError, UnsupportedModel
from patchkit.exclusive import Exclusive
from patchkit.handle import Handle
from patchkit.patch import Patch, Promises, Stage, register_patch
from patchkit.record import Notices
from patchkit.streaming.cache import Frame, Lane, Plan, Stream, StreamingCache
from patchkit.streaming.refresh import DynamicLane, DynamicSinks, Reencode, Refresh, RefreshedCache
from patchkit.target import AttentionLayer, Rotary, Target

# Queries per attention call in long forwards: bounds the scores to QUERY_BLOCK x (S + W + QUERY_BLOCK) per head.
QUERY_BLOCK = 512
# Frame positions are kept below this where the model allows it: small enough for float32 angles, large enough to turn rarely.
FRAME_POSITIONS = 1024
# A window that a short text fills several times.
_SHORT_WINDOW = 24
# Tokens of the largest window that `patchkit tune` tries, with its sinks.
_TRIED_WINDOW = 2048


@register_patch("streaming")
@dataclass(frozen=True)
class StreamingLLM(Patch):
    """Attention sinks and a sliding window (StreamingLLM), at constant memory and time per token.

    Args:
        sinks: S, first tokens of every sequence that stay visible. 0 is a plain sliding window; `patchkit.system_tokens` counts those of
            a system message, which then stays.
        window: W, last tokens that are visible, the current one included.
        positions: "cache" gives sinks the distance they have inside the cache (the paper's rule); "true" their true distance.
        layers: indices of the attention layers to patch; None for all with full attention. The others keep all keys.
        refresh: what is done every so many tokens about what was forgotten: `Reencode` or `DynamicSinks`
            (`patchkit.streaming.refresh`); None for nothing.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.ATTENTION
    acts = ("tokens evicted",)
    example = "streaming(window=252)"

    sinks: int = 4
    window: int = 1020
    positions: Literal["cache", "true"] = "cache"
    layers: tuple[int, ...] | None = None
    refresh: Refresh | None = dataclasses.field(default=None, metadata={"objects": (Reencode, DynamicSinks)})

    def __post_init__(self) -> None:
        if self.sinks == "system":
            raise ValueError(
                "sinks='system' is known where there is a chat, in `patchkit generate --system TEXT`: elsewhere give the number, "
                "sinks=patchkit.system_tokens(tokenizer, TEXT)"
            )
        for name, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: give a whole number of tokens, at least {least}")
        if self.positions not in ("cache", "true"):
            raise ValueError(f"positions={self.positions!r}: give 'cache' (distance inside the cache) or 'true' (true distance)")
        object.__setattr__(self, "layers", check_layers(self.layers))
        if self.refresh is not None and not isinstance(self.refresh, Refresh):
            raise ValueError(f"refresh={self.refresh!r}: give Reencode(every=64), DynamicSinks(n=16, every=64) or None")
        if self.refresh is not None and self.positions != "cache":
            raise ValueError(f"positions={self.positions!r} with refresh={self.refresh.spec}: a refresh needs positions='cache'")

    @property
    def capacity(self) -> int:
        """C: tokens that a query sees at most."""
        return self._lane(None).capacity

    def _lane(self, rotary: Rotary | None) -> Lane:
        if self.refresh is None:
            return Lane(self.sinks, self.window, rotary, in_cache=self.positions == "cache")
        return self.refresh.lane(self.sinks, self.window, rotary)

    def check(self, target: Target) -> None:
        self._plan(target)
        if self.refresh is None or self.refresh.can_roll_back:
            return
        for other in target.patches:
            if other.stage in (Stage.GENERATION, Stage.COMPILE):
                raise PatchConflict(
                    f"refresh={self.refresh.spec} counts the attention of every token, which {other.name} would take back or hide: "
                    "leave one of the two out, or use refresh=reencode"
                )

    def apply(self, target: Target, handle: Handle) -> None:
        plan, owned = self._plan(target)
        runtime = open_stream(target, handle, plan)
        for layer in owned:
            stream_layer(target, handle, runtime, layer)
        if plan.make_cache is not None:
            handle.pre_hook(target.decoder, functools.partial(_before_refreshed_forward, handle.hits), with_kwargs=True, prepend=True)
            handle.hook(target.decoder, _after_refreshed_forward, with_kwargs=True, always_call=True)
        report_layers(target, handle, plan)
        if plan.limit is None:
            handle.left_alone("positions", "layers that patchkit does not keep need true ones, so they are not bounded")

    def promises(self, target: Target) -> Promises:
        plan, owned = self._plan(target)
        modules = tuple(layer.name for layer in owned if layer.kind == "full")
        definition = functools.partial(
            window_logits, modules=modules, sinks=self.sinks, window=self.window, in_cache=self.positions == "cache"
        )
        if isinstance(self.refresh, Reencode):
            definition = functools.partial(
                _reencoded_logits, plain=definition, sinks=self.sinks, window=self.window, every=self.refresh.every
            )
        known = self.refresh is None or isinstance(self.refresh, Reencode)
        return Promises(same_up_to=plan.main.capacity, definition=definition if known else None, bounded=plan.owns_all)

    def exercised(self) -> StreamingLLM:
        short = min(self.window, _SHORT_WINDOW)
        refresh: Any = self.refresh
        if refresh is not None:
            refresh = dataclasses.replace(refresh, every=min(refresh.every, _SHORT_WINDOW))
        return dataclasses.replace(self, window=short, refresh=refresh)

    @classmethod
    def candidates(cls, target: Target) -> list[StreamingLLM]:
        """Four sinks, and all that the model was made for (at most 2048 tokens), a half, a quarter, an eighth."""
        most = min(target.position_limit or _TRIED_WINDOW, _TRIED_WINDOW)
        return [cls(window=most // share - cls.sinks) for share in (1, 2, 4, 8) if most // share > cls.sinks]

    def _plan(self, target: Target) -> tuple[Plan, list[AttentionLayer]]:
        """The lanes of all layers that patchkit will keep; every refusal is raised here."""
        layers = target.attention_layers
        name = type(target.model).__name__
        full = [layer for layer in layers if layer.kind == "full"]
        chosen = full if self.layers is None else chosen_layers(layers, self.layers)
        for layer in layers:
            if layer.obstacle is not None and (layer in chosen or layer.kind != "full"):
                raise UnsupportedModel(f"streaming would not be exact on {name}: in layer {layer.index} ({layer.name}), {layer.obstacle}")
        if not chosen:
            raise NothingMatched(
                f"every attention layer of {name} already has its own window (of {_listed(_windows(layers))} tokens): nothing to add"
            )
        plan, owned = make_plan(target, "streaming", {layer.index: self._lane(layer.rotary) for layer in chosen})
        plan.make_cache = None if self.refresh is None else self.refresh.new_cache
        obstacle = None if self.refresh is None else self.refresh.obstacle(plan, chosen)
        if self.refresh is not None and obstacle is not None:
            raise UnsupportedModel(f"refresh={self.refresh.spec} does not go with {name}: {obstacle}. Leave refresh out")
        return plan, owned


def _reencoded_logits(
    model: Any, ids: torch.Tensor, facts: Any, *, plain: Callable[..., torch.Tensor], sinks: int, window: int, every: int
) -> torch.Tensor:
    """The definition of streaming with `Reencode`, from that of streaming without: every R tokens a text begins anew."""
    size = sinks + window
    pieces = [plain(model, ids[:, : size + every], facts)]
    for start in range(size + every, ids.shape[1], every):
        text = torch.cat([ids[:, :sinks], ids[:, start - window : start + every]], 1)
        pieces.append(plain(model, text, facts)[:, size:])
    return torch.cat(pieces, 1)


# -- what patches that stream share ----------------------------------------------------------------------------------------


def check_layers(layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The option ``layers``, as a tuple.

    Raises:
        ValueError: it is neither None nor layer indices.
    """
    if layers is None:
        return None
    if not isinstance(layers, tuple | list) or not layers or not all(isinstance(i, int) and not isinstance(i, bool) for i in layers):
        raise ValueError(f"layers={layers!r}: give layer indices such as [0, 1], or None for all")
    return tuple(layers)


def chosen_layers(layers: list[AttentionLayer], indices: tuple[int, ...]) -> list[AttentionLayer]:
    """The layers with these indices, in order.

    Raises:
        NothingMatched: one does not exist, or has no full attention.
    """
    by_index = {layer.index: layer for layer in layers}
    for index in indices:
        if index not in by_index or by_index[index].kind != "full":
            known = [layer.index for layer in layers if layer.kind == "full"]
            raise NothingMatched(f"layers={list(indices)}: layer {index} has no full attention. Layers that do: {_listed(known)}")
    return [by_index[index] for index in sorted(set(indices))]


def make_plan(target: Target, patch: str, chosen: dict[int, Lane], movable: bool = True) -> tuple[Plan, list[AttentionLayer]]:
    """The plan of one patch, and the layers in it: the chosen ones and, where all others slide, those too.

    Args:
        chosen: a lane for each chosen layer; layers with equal lanes will share one.
        movable: positions can be bounded, because no layer has them baked in.

    Raises:
        UnsupportedModel: the model does not stream in this way.
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
    made: list[Lane] = []
    lanes: dict[int, Lane] = {}
    for layer in owned:
        wanted = chosen.get(layer.index) or Lane(0, layer.window or 1, layer.rotary, sliding=True)
        lane = next((lane for lane in made if lane.same_rule(wanted)), None)
        if lane is None:
            lane = wanted
            lane.number = len(made)
            made.append(lane)
        lanes[layer.index] = lane
    for layer in owned:
        if any(other.module is layer.module and lanes[other.index] is not lanes[layer.index] for other in owned):
            raise UnsupportedModel(f"{patch} would not be exact on {name}: layers with different rules share the module {layer.name}")
    frame_limit = None
    if owns_all and movable:
        frame_limit = max(capacity, min(limit or FRAME_POSITIONS, max(2 * capacity, FRAME_POSITIONS)))
    plan = Plan(
        lanes,
        main=lanes[next(iter(chosen))],
        limit=frame_limit,
        stock_layers=functools.partial(_stock_layers, target.config),
        owns_all=owns_all,
        has_alibi=any(layer.alibi is not None for layer in owned),
    )
    return plan, owned


def open_stream(target: Target, handle: Handle, plan: Plan) -> Runtime:
    """The stream of this model: a new one, or that of another patch, which from now on has both plans.

    Raises:
        PatchConflict: both plans have rules for one layer.
    """
    runtime: Runtime | None = target.decoder.__dict__.get("_patchkit_streaming")
    called = [layer.module for layer in target.attention_layers if layer.index in plan.lanes and layer.interface]
    if runtime is not None:
        handle.set_attribute(runtime, "configs", configs_of(called, target.model) + runtime.configs)
        handle.set_attribute(runtime, "plan", _joined(target, runtime.plan, plan))
        handle.set_attribute(runtime, "counters", [*runtime.counters, (plan.main, handle.hits)])
        handle.set_attribute(runtime, "frequencies", [*runtime.frequencies, *_frequencies(target, plan)])
        return runtime
    configs = _compat.attention_configs(target.model)
    implementations = tuple({original_name(config) for config in configs})
    runtime = Runtime(plan, [(plan.main, handle.hits)], implementations, handle.notices, configs_of(called, target.model))
    runtime.frequencies, runtime.mask_configs = _frequencies(target, plan), tuple(configs)
    handle.on_undo(functools.partial(_forget_masks, runtime))
    handle.set_attribute(target.decoder, "_patchkit_streaming", runtime)
    handle.pre_hook(target.decoder, _before_forward, with_kwargs=True, prepend=True)
    handle.hook(target.decoder, _after_forward, with_kwargs=True, always_call=True)
    handle.set_attribute(target.model, "_prepare_cache_for_generation", functools.partial(_prepare_cache, target.model, runtime))
    for name in _compat.continuous_batching(target.model):
        handle.set_attribute(target.model, name, functools.partial(_refuse_continuous_batching, name))
    for config in configs:
        if not has_own_mask(config):  # an attention patch of other layers
            set_alias(handle, config, alias_of(original_name(config)))
    return runtime


def _joined(target: Target, first: Plan, second: Plan) -> Plan:
    both = sorted(first.lanes.keys() & second.lanes.keys())
    if both:
        raise PatchConflict(f"two patches have rules for attention layers {_listed(both)}: give each layers of its own with layers=")
    lanes = dict(sorted({**first.lanes, **second.lanes}.items()))
    for number, lane in enumerate(dict.fromkeys(lanes.values())):
        lane.number = number
    return Plan(
        lanes,
        main=first.main if first.main.in_cache else second.main,  # in-cache positions are counted by it
        limit=None,
        stock_layers=first.stock_layers,
        owns_all=all(layer.index in lanes for layer in target.attention_layers),
        has_alibi=first.has_alibi or second.has_alibi,
    )


def stream_layer(target: Target, handle: Handle, runtime: Runtime, layer: AttentionLayer) -> None:
    """Make one layer attend by the streaming rule of its lane."""
    lane = runtime.plan.lanes[layer.index]
    if layer.alibi is not None:
        handle.set_attribute(layer.module, "_patchkit_alibi", Alibi(runtime, lane, layer))
        handle.pre_hook(layer.module, _before_alibi_attention, with_kwargs=True)
    else:
        watch = functools.partial(_watch, runtime, layer.index) if isinstance(lane, DynamicLane) else None
        attend = functools.partial(_attention, runtime, lane, layer.rotary, _masked_implementation(target), watch)
        handle.set_attribute(layer.module, "_patchkit_attention", attend)


def report_layers(target: Target, handle: Handle, plan: Plan) -> None:
    """Say which layers were changed, and which not, and why."""
    layers = target.attention_layers
    changed = [layer for layer in layers if layer.kind == "full" and layer.index in plan.lanes]
    sliding, chunked = ([layer for layer in layers if layer.kind == kind] for kind in ("sliding", "chunked"))
    others = [layer for layer in layers if layer.kind == "full" and layer not in changed]
    handle.changed("attention layers", len(changed))
    for kept, what in ((sliding, "sliding-window"), (chunked, "chunked")):
        if kept:
            handle.left_alone(f"{len(kept)} {what} layers", f"they keep their own rule, over {_listed(_windows(kept))} tokens")
    if others:
        why = "not in layers=: unless another patch has them, they keep all keys, so memory grows"
        handle.left_alone(f"{len(others)} attention layers", why)


# -- run time --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Frequencies:
    """The buffer ``module.name`` that holds the frequencies of ``rotary``, and how to recognise the one that was read last."""

    rotary: Rotary
    module: nn.Module
    name: str
    read: tuple[Any, ...] = ()

    def follow(self) -> None:
        """Read the buffer again if it is another one, or was written to."""
        buffer: Any = self.module._buffers[self.name]
        version = 0 if buffer.is_inference() else buffer._version  # such tensors have none
        now = id(buffer), buffer.data_ptr(), buffer.dtype, version
        if now != self.read:
            self.read = now
            self.rotary.follow(buffer)


def _frequencies(target: Target, plan: Plan) -> list[Frequencies]:
    if {"dynamic", "longrope"} & set(_compat.rope_types(target.config)):
        return []  # the model writes to the buffer in its own forward; the frequencies are those of a short text
    modules = dict(target.model.named_modules())
    # Lanes share the rotation of one of their layers; a layer turns its queries by its own.
    lanes, layers = plan.lanes.values(), [layer for layer in target.attention_layers if layer.index in plan.lanes]
    rotaries: dict[int, Rotary] = {}
    for each in [lane.rotary for lane in lanes] + [layer.rotary for layer in layers]:
        if each is not None:
            rotaries[id(each)] = each
    found = []
    for rotary in rotaries.values():
        path, _, name = rotary.buffer.removeprefix("-").rpartition(".")
        found.append(Frequencies(rotary, modules[path], name))
    return found


@dataclass(eq=False)
class Runtime:
    """What the hooks of one patched model share. ``frame`` is set while its decoder runs.

    Attributes:
        counters: the lane that each patch has brought, and the patch's hits.
        implementations: of attention, that the configs named before.
        notices: of the first patch.
        configs: those in which the alias of our attention must stand.
        frequencies: where those of the lanes' rotations come from.
        mask_configs: those by which the model's masks are made.
    """

    plan: Plan
    counters: list[tuple[Lane, Counter[str]]]
    implementations: tuple[str, ...]
    notices: Notices
    configs: list[Any] = dataclasses.field(default_factory=list)
    frequencies: list[Frequencies] = dataclasses.field(default_factory=list)
    exclusive: Exclusive = dataclasses.field(default_factory=Exclusive)
    frame: Frame | None = None
    cache: StreamingCache | None = None
    own_masks: Masks | None = None  # while a forward is under way, what its masks come from,
    outer_masks: Masks | None = None  # and what they came from before
    mask_configs: tuple[Any, ...] = ()
    masks: list[torch.Tensor] | None = None  # of a step that runs compiled, for each lane
    step: StepCache | None = None  # that step

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A patched model may be loaded by a process in which nothing was patched yet: its config names the aliases.
        vars(self).update(state)
        for implementation in self.implementations:
            alias_of(implementation)


def _before_forward(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Give the decoder our cache and bounded positions, and announce the frame to the attention layers."""
    runtime: Runtime = decoder.__dict__["_patchkit_streaming"]
    kwargs = _compat.by_name(decoder, args, kwargs)
    cache = kwargs.get(_compat.CACHE)
    if _compat.is_paged(kwargs):
        raise StreamError("continuous batching has a paged cache of its own and would bypass the streaming window: unpatch_model first")
    if decoder.training:
        if isinstance(cache, StreamingCache):
            raise StreamError("a streaming cache was given to a model in training mode, which runs unpatched: call model.eval() first")
        if not torch.is_grad_enabled():
            runtime.notices.say("the model is in training mode, where it runs unpatched: call model.eval()")
        _forget_masks(runtime)
        runtime.frame = runtime.cache = None
        return None
    # PyTorch leaves out the hook that gives it back where KeyboardInterrupt ends a forward.
    runtime.exclusive.take(f"a forward of this {type(decoder).__name__}", decoder, nested=False)
    runtime.frame = runtime.cache = None
    refuse_other_attention(runtime.configs)
    for each in runtime.frequencies:
        each.follow()
    if kwargs.get("output_attentions"):
        raise StreamError("output_attentions is not available with streaming or linear: their attention runs over blocks of the window")
    inputs = kwargs.get("input_ids")
    if inputs is None:
        inputs = kwargs["inputs_embeds"]
    batch, tokens = inputs.shape[:2]
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    if cache is None and use_cache:
        cache = runtime.plan.new_cache()
        kwargs[_compat.CACHE] = cache
    if cache is not None and not (isinstance(cache, StreamingCache) and cache.plan is runtime.plan):
        raise StreamError(
            f"this model streams with a cache of its own, and was given a {type(cache).__name__}. Leave {_compat.CACHE} out of the first "
            "call, and pass on what it returns. A cache made before the model was patched, by another model, or loaded from a pickle "
            "cannot be used (copy.deepcopy can), nor can the prefix of PEFT's prefix tuning."
        )
    stream = cache.stream if cache is not None else Stream(runtime.plan)
    _notice_padding(stream, kwargs.get("attention_mask"), batch, tokens)
    _refuse_packing(kwargs.get("position_ids"), kwargs.get("attention_mask"), stream.seen, tokens)
    if cache is not None:
        cache.make_writable()
        runtime.frame = stream.begin(tokens, cache.own_layers, inputs.device, in_place=not torch.is_grad_enabled(), batch=batch)
        runtime.cache = cache
    else:
        base = torch.zeros(1, dtype=torch.int64, device=inputs.device)
        runtime.frame = Frame(
            runtime.plan, 0, tokens, stream.pads, base, inputs.device, cached=False, rows=batch, most_pads=stream.most_pads
        )
    if "position_ids" in _compat.argument_names(decoder):
        kwargs["position_ids"] = runtime.frame.position_ids().expand(batch, -1)
    builder = functools.partial(_placeholder_mask if runtime.plan.owns_all else _causal_mask, runtime.frame)
    _forget_masks(runtime)
    runtime.own_masks = Masks(builder, runtime.mask_configs)
    runtime.outer_masks = swap_mask_builder(runtime.own_masks)
    return (), kwargs


def _forget_masks(runtime: Runtime) -> None:
    """A forward that was interrupted has left behind what its masks came from."""
    if runtime.own_masks is not None:
        found = swap_mask_builder(None)
        if found is not runtime.own_masks:
            swap_mask_builder(found)
        runtime.own_masks = None


def _after_forward(decoder: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    """Count the tokens as seen; runs after a failed forward too, with no output."""
    runtime: Runtime = decoder.__dict__["_patchkit_streaming"]
    if not runtime.exclusive.give_back():  # refused: what is there belongs to another thread
        return
    frame, cache = runtime.frame, runtime.cache
    if frame is None:
        return
    swap_mask_builder(runtime.outer_masks)
    runtime.frame = runtime.cache = runtime.outer_masks = runtime.own_masks = None
    if output is None:
        return
    if cache is not None:
        cache.stream.commit()
    if torch.compiler.is_compiling():  # of the user's own: a count that changes would be a graph of its own for every call
        return
    for lane, hits in runtime.counters:
        lane.count(hits, frame)


def _refuse_two_way(frame: Frame, rule: Any, keys: int | None) -> None:
    """Our own rule takes the place of the model's, so that must not show a token later ones, as within the span of an image.

    Args:
        rule: transformers' mask function: which keys a query sees, from indices that broadcast.
        keys: how many a mask would have; what the rule knows of single tokens (the ids of spans) has as many places, the new ones last.

    Raises:
        StreamError: it does, in this forward.
    """
    if frame.tokens == 1 or rule is None or _compat.is_causal_rule(rule):
        return
    first = frame.start if keys is None else int(keys) - frame.tokens
    tokens = torch.arange(first, first + frame.tokens, device=frame.device)
    rows = torch.arange(frame.rows, device=frame.device)[:, None, None, None]
    for block in tokens.split(QUERY_BLOCK):
        query, later = block[None, None, :, None], tokens[None, None, None, :]
        if bool((rule(rows, torch.zeros_like(rows), query, later) & (later > query)).any()):
            raise StreamError(
                "in this call the model lets tokens see later ones (those of an image, say, by token_type_ids), which no streaming or "
                "linear rule does: leave that argument out, or unpatch_model first"
            )


def _causal_mask(frame: Frame, implementation: str, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The model's own mask, which layers without a rule of ours use."""
    _refuse_two_way(frame, kwargs.get("mask_function"), kwargs.get("kv_length"))
    return _compat.mask_function(implementation)(*args, **kwargs)


def _placeholder_mask(frame: Frame, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """The layers make their own masks. In one-token steps, None tells them that none is needed."""
    _refuse_two_way(frame, kwargs.get("mask_function"), kwargs.get("kv_length"))
    unneeded = (frame.steady or frame.many) and not frame.plan.has_alibi  # such models compute with the mask before a layer sees it
    return None if unneeded else torch.zeros(1, 1, 1, 1, device=frame.device)


def _attention(
    runtime: Runtime,
    lane: Lane,
    rotary: Rotary | None,
    masked: str,
    watch: Any,
    original: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """transformers' attention function with the streaming rule.

    Args:
        query: [B, H, T, K], key: [B, G, S, K], value: [B, G, S, V]; keys as `StreamLayer.update` returned them.
        masked: the implementation that runs when a mask is needed.
        watch: is shown queries, keys, masks, the keys' token numbers and the scaling; None if nobody is.

    Returns:
        [B, T, H, V] and no attention weights.
    """
    if runtime.masks is not None:
        return original_function(masked, module)(module, query, key, value, runtime.masks[lane.number], **kwargs)
    frame = runtime.frame
    if frame is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    additive = masked != "sdpa"
    # An eager function may add the mask without asking whether there is one.
    no_mask = query.new_zeros(1, 1, 1, 1) if additive and original_function(masked, module) is original else None
    if frame.steady:
        if watch is not None:
            watch(query, key, None, frame.key_tokens(lane), kwargs.get("scaling"))
        return original(module, query, key, value, no_mask, **kwargs)
    run = original_function(masked, module)
    queries = torch.arange(frame.start, frame.end, device=query.device)
    keys = frame.key_tokens(lane).to(query.device)
    if not frame.many:
        mask = no_mask if frame.pads is None else _mask(frame, lane, queries, keys, query, additive)
        if watch is not None:
            watch(query, key, mask, keys, kwargs.get("scaling"))
        return run(module, query, key, value, mask, **kwargs)

    window_query = sink_query = query
    if rotary is not None:
        if frame.turned:
            cos, sin = (t.to(query.device) for t in frame.window_turn(rotary))
            window_query = rotary.turn(query, cos, sin, rotary.start)
            if not frame.cached:
                key = rotary.turn(key, cos, sin, rotary.start)
        elif runtime.plan.limit is None and lane.in_cache and frame.end > runtime.plan.main.capacity:
            cos, sin = (t.to(query.device) for t in frame.sink_turn(rotary))
            sink_query = rotary.turn(query, cos, sin, rotary.start)
    split = sink_query is not window_query and lane.sinks > 0 and lane.in_cache
    if split and kwargs.get("scaling") is None:  # the default would be taken from the doubled key dimension
        kwargs["scaling"] = query.shape[-1] ** -0.5

    outputs = []
    for block in queries.split(QUERY_BLOCK):
        rows = slice(int(block[0]) - frame.start, int(block[-1]) + 1 - frame.start)
        columns = visible_columns(frame, lane, keys.shape[-1], rows)
        block_keys, k, v = keys[:, columns], key[:, :, columns], value[:, :, columns]
        q = window_query[:, :, rows]
        if split:
            # Which keys are sinks [B or 1, 1, n, 1]; a sink's place is taken from where it stands in its own row.
            row = block_keys if frame.pads is None else block_keys - frame.pads[:, None].to(query.device)
            is_sink = ((row >= 0) & (row < lane.sinks))[:, None, :, None]
            zero = torch.zeros((), dtype=k.dtype, device=k.device)
            k = torch.cat([torch.where(is_sink, zero, k), torch.where(is_sink, k, zero)], -1)
            q = torch.cat([q, sink_query[:, :, rows]], -1)
        mask = _mask(frame, lane, block, block_keys, q, additive)
        if watch is not None:
            watch(q, k, mask, block_keys, kwargs.get("scaling"))
        outputs.append(run(module, q, k, v, mask, **kwargs)[0])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _watch(runtime: Runtime, index: int, query: torch.Tensor, key: torch.Tensor, mask: Any, tokens: torch.Tensor, scaling: Any) -> None:
    """Show what a layer attends to to its cache layer, if it has one."""
    if runtime.cache is not None:
        layer: Any = runtime.cache.layers[index]
        layer.observe(runtime.frame, query, key, mask, tokens, scaling)


def visible_columns(frame: Frame, lane: Lane, n_keys: int, rows: slice) -> torch.Tensor:
    """Indices of the keys that queries ``rows`` of the forward can see: the sinks, and one window behind the first of them."""
    # Keys are in order of time from column `ordered` on, where token i is in column i + offset. Every row's sinks are before
    # that, or among the first most_pads + S tokens.
    offset = n_keys - frame.end
    ordered = lane.sinks if frame.start >= lane.capacity else 0
    most_pads = 0 if frame.pads is None else int(frame.pads.max())
    head = max(ordered, most_pads + lane.sinks + offset) if most_pads or not ordered else ordered
    last = frame.start + rows.stop + offset
    first = max(ordered, frame.start + rows.start - lane.window + 1 + offset)
    head = min(head, last)
    return torch.cat([torch.arange(head), torch.arange(max(first, head), last)])


def _mask(frame: Frame, lane: Lane, queries: torch.Tensor, keys: torch.Tensor, like: torch.Tensor, additive: bool) -> torch.Tensor:
    """[B or 1, 1, T, n]: True where visible, or 0 there and the lowest number elsewhere, of the queries' dtype."""
    visible = frame.visible(lane, queries, keys)
    if not additive:
        return visible
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, torch.finfo(like.dtype).min)


def _masked_implementation(target: Target) -> str:
    """What computes attention where a mask is needed: the model's own choice, unless that takes none of this kind."""
    own = target.attention_implementation
    if own in ("eager", "sdpa"):
        return own
    return "sdpa" if getattr(target.model, "_supports_sdpa", False) else "eager"


# -- refresh ---------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Cut:
    """A forward that is run in pieces, with refreshes between them.

    Attributes:
        outputs: of the pieces before the last.
        ids: [B, T] of the last piece; None if it was given as embeddings.
        keeps_cache: the caller asked for the cache.
    """

    outputs: list[Any]
    ids: torch.Tensor | None
    keeps_cache: bool


def _before_refreshed_forward(
    hits: Counter[str], decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Refresh the cache where that is due; a forward that goes beyond such a place is run up to it first, and goes on with the rest."""
    runtime: Runtime = decoder.__dict__["_patchkit_streaming"]
    kwargs = _compat.by_name(decoder, args, kwargs)
    cache, mask = kwargs.get(_compat.CACHE), kwargs.get("attention_mask")
    if decoder.training or not (cache is None or (isinstance(cache, RefreshedCache) and cache.plan is runtime.plan)):
        return None
    ids = kwargs.get("input_ids")
    batch, tokens = (kwargs["inputs_embeds"] if ids is None else ids).shape[:2]
    use_cache = kwargs.get("use_cache")
    if use_cache is None:
        use_cache = getattr(decoder.config, "use_cache", True)
    keeps_cache = cache is not None or bool(use_cache)
    if cache is None:
        cache = runtime.plan.new_cache()
        assert isinstance(cache, RefreshedCache)
    cache.make_writable()
    start = cache.stream.seen
    end = start + tokens
    _notice_padding(cache.stream, mask, batch, tokens)
    _refuse_packing(kwargs.get("position_ids"), mask, start, tokens)
    cut = Cut([], ids, keeps_cache)
    if cache.refresh_at() >= end:
        cache.cut = cut if keeps_cache else None
        return ((), {**kwargs, _compat.CACHE: cache}) if keeps_cache else None
    if tokens > 1 and torch.is_grad_enabled():
        raise StreamError("a refresh cuts this forward, and gradients do not pass through it: call the model under torch.no_grad()")
    run = functools.partial(_run_uncounted, runtime, decoder)
    try:
        while (due := cache.refresh_at()) < end:
            if due > cache.stream.seen:
                cut.outputs.append(decoder(**_piece(kwargs, cache, start, end, due)))
            hits["refreshes"] += cache.refresh(run)
    except BaseException:
        cache.stream.broken = True
        raise
    last = _piece(kwargs, cache, start, end, end)
    cut.ids, cache.cut = last.get("input_ids"), cut
    return (), last


def _after_refreshed_forward(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Put the pieces together; runs after a failed forward too, with no output."""
    cache = kwargs.get(_compat.CACHE)
    if not isinstance(cache, RefreshedCache):
        return None
    cut, cache.cut = cache.cut, None
    if cut is None or output is None:
        return None
    cache.remember(cut.ids)
    return _joined_outputs([*cut.outputs, output], cut.keeps_cache) if cut.outputs else None


def _piece(kwargs: dict[str, Any], cache: RefreshedCache, start: int, end: int, stop: int) -> dict[str, Any]:
    """The arguments of a forward over tokens ``start`` to ``end``, for those from the first that the cache has not seen to ``stop``."""
    part = slice(cache.stream.seen - start, stop - start)
    batched = {name: x[:, part] for name, x in kwargs.items() if torch.is_tensor(x) and x.ndim > 1 and x.shape[1] == end - start}
    piece = {**kwargs, **batched, _compat.CACHE: cache, "use_cache": True, "position_ids": None}
    if kwargs.get("attention_mask") is not None:
        piece["attention_mask"] = kwargs["attention_mask"][:, :stop]
    return {name: value for name, value in piece.items() if value is not None}


def _run_uncounted(runtime: Runtime, decoder: nn.Module, ids: torch.Tensor, cache: StreamingCache) -> None:
    counters, runtime.counters = runtime.counters, []
    try:
        decoder(input_ids=ids, use_cache=True, **{_compat.CACHE: cache})
    finally:
        runtime.counters = counters


def _joined_outputs(outputs: list[Any], keeps_cache: bool) -> Any:
    """One output of all pieces: tensors [B, T, ...] one after the other, and the cache of the last."""
    last = outputs[-1]
    if isinstance(last, _compat.Cache):
        return last if keeps_cache else None
    if last is None:
        return None
    if torch.is_tensor(last) and last.ndim == 3:
        return torch.cat(outputs, 1)
    if isinstance(last, dict):
        return type(last)(**{name: _joined_outputs([output[name] for output in outputs], keeps_cache) for name in last})
    if isinstance(last, tuple):
        return tuple(_joined_outputs(list(each), keeps_cache) for each in zip(*outputs, strict=True))
    raise StreamError(f"a refresh cuts this forward, and a {type(last).__name__} of its pieces cannot be put together: feed fewer tokens")


# -- ALiBi -----------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Alibi:
    """For a layer that adds a bias linear in the distance (Press et al. 2022) and computes attention itself."""

    runtime: Runtime
    lane: Lane
    layer: AttentionLayer


def _before_alibi_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Replace the bias and the mask by those of the streaming rule."""
    alibi: Alibi = module.__dict__["_patchkit_alibi"]
    frame, lane, layer = alibi.runtime.frame, alibi.lane, alibi.layer
    if frame is None:
        return None
    assert layer.alibi is not None and layer.slopes is not None
    given = kwargs[layer.alibi]
    pads = None if frame.pads is None else frame.pads.to(given.device)
    tokens, keys = torch.arange(frame.start, frame.end, device=given.device), frame.key_tokens(lane).to(given.device)
    query_row, key_row = frame.row_positions(tokens)[:, :, None], (keys if pads is None else keys - pads[:, None])[:, None, :]
    distance = query_row - key_row
    if lane.in_cache:
        distance = torch.where(key_row < lane.sinks, query_row.clamp(max=lane.capacity - 1) - key_row, distance)
    bias = -layer.slopes.to(given.device)[:, None, None] * distance[:, None]  # [B or 1, H, T, n]
    rows = given.shape[0] // len(layer.slopes)  # a model gives one bias per row, or one for all
    if rows == 1 and len(bias) > 1:
        raise StreamError(f"{type(module).__name__} takes one bias for all rows, so a left-padded batch cannot stream: run its rows alone")
    bias = bias.expand(rows, -1, -1, -1).flatten(0, 1).to(given.dtype)
    hidden = ~frame.visible(lane, tokens, keys)
    if not layer.mask_is_boolean:
        hidden = torch.zeros(hidden.shape, dtype=given.dtype, device=given.device).masked_fill_(hidden, torch.finfo(given.dtype).min)
    return args, {**kwargs, layer.alibi: bias, "attention_mask": hidden}


# -- input checks ----------------------------------------------------------------------------------------------------------


def _notice_padding(stream: Stream, attention_mask: Any, batch: int, tokens: int) -> None:
    """Read each row's left padding off the 2-D mask [B, seen + T].

    Raises:
        StreamError: the mask is not 2-D, has another length, or hides tokens between others.
    """
    if attention_mask is None:
        return
    if not torch.is_tensor(attention_mask) or attention_mask.ndim != 2:
        raise StreamError(
            "a streaming model takes a 2-D attention_mask [batch, tokens] of zeros and ones, or none: its own rule makes the 4-D mask"
        )
    # Once every row has begun and none has ended, later steps of one token only add to the rows.
    if tokens == 1 and stream.seen > 0 and not stream.mask_unsettled:
        return
    end = stream.seen + tokens
    if attention_mask.shape != (batch, end):
        raise StreamError(f"attention_mask has shape {tuple(attention_mask.shape)}: it must cover all tokens so far, ({batch}, {end})")
    real = attention_mask.bool()
    if bool(real.all()):
        stream.mask_unsettled = False
        if stream.pads is not None and bool((stream.pads > 0).any()):
            raise StreamError(
                "attention_mask shows tokens that earlier calls gave as padding: pass the same mask, extended by the new tokens"
            )
        return
    begun = real.cumsum(1) > 0
    pads = (~begun).sum(1)
    inside = begun & ~real
    ended = inside & (real.flip(1).cumsum(1).flip(1) == 0)
    if bool((inside & ~ended).any()):
        raise StreamError(
            "attention_mask has zeros between tokens: streaming takes padding on the left, or on the right of the last tokens"
        )
    if stream.seen and stream.pads is None and bool((pads > 0).any()) and bool((pads < stream.seen).any()):
        raise StreamError("attention_mask hides tokens that earlier calls gave as real: pass the same mask, extended by the new tokens")
    stream.mask_unsettled = bool((~real[:, -1]).any())
    if bool((pads > 0).any()):
        stream.set_pads(pads)


def _refuse_packing(position_ids: Any, attention_mask: Any, seen: int, tokens: int) -> None:
    """Positions of a forward of several tokens must go up by one; they are otherwise ours to choose.

    Raises:
        StreamError: they restart (packed sequences), jump, or have several axes that differ (images).
    """
    if position_ids is None or tokens == 1:
        return
    if position_ids.ndim == 3:
        if not bool((position_ids == position_ids[:1]).all()):
            raise StreamError("position_ids with several axes (images or video) cannot stream: only text has one position per token")
        position_ids = position_ids[0]
    steps = position_ids.diff(dim=-1)
    wrong = steps != 1
    if attention_mask is not None:
        real = attention_mask[:, seen : seen + tokens].bool()
        wrong = wrong & real[:, 1:] & real[:, :-1]
    if bool(wrong.any()):
        raise StreamError(
            "position_ids restart or jump within a row (packed sequences?): a stream's positions go up by one. Feed one sequence a row"
        )


# -- generate --------------------------------------------------------------------------------------------------------------


def _prepare_cache(model: Any, runtime: Runtime, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin._prepare_cache_for_generation`, with our cache where it would make a dynamic or static one."""
    if _compat.decoder_of(model).training:  # it runs unpatched, and says so
        return type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    given = model_kwargs.get(_compat.CACHE)
    if given is not None and not isinstance(given, StreamingCache):
        raise StreamError(
            f"this model streams with a cache of its own: leave {_compat.CACHE} out instead of passing a {type(given).__name__}"
        )
    kind = generation_config.cache_implementation
    if kind is not None and kind not in ("dynamic", "static"):
        raise StreamError(
            f"cache_implementation={kind!r} would replace the streaming cache: leave it out, a window of keys is small already"
        )
    generation_config.cache_implementation = None
    result = type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    generation_config.cache_implementation = kind
    if generation_config.use_cache is False:
        runtime.notices.say("generate was called with use_cache=False: every step reads the whole text again, and memory grows with it")
    made = model_kwargs.get(_compat.CACHE)
    if given is None and made is not None:
        cache = runtime.plan.new_cache()
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[_compat.CACHE] = cache
    return result


def _refuse_continuous_batching(name: str, *args: Any, **kwargs: Any) -> Any:
    raise StreamError(
        f"{name} keeps keys in pages of its own, and would bypass the window of streaming or linear: unpatch_model first, or call generate"
    )


def _stock_layers(config: Any) -> list[Any]:
    return _compat.DynamicCache(config=config).layers


def _windows(layers: list[AttentionLayer]) -> list[int]:
    return sorted({layer.window for layer in layers if layer.window is not None})


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values)) if values else "none"
