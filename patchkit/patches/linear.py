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

import torch
from torch import nn

from patchkit import _compat
from patchkit.attention import AttentionOutput
from patchkit.definitions import hybrid_logits
from patchkit.errors import NothingMatched, PatchConflict, StreamError, UnsupportedModel
from patchkit.handle import Handle
from patchkit.kernels.linear_attention import linear_attention
from patchkit.linear.cache import LinearLane, LinearLayer, LinearStep, LinearStepLayer
from patchkit.linear.feature_maps import available_feature_maps
from patchkit.linear.hybrid import CHUNK, HybridAttention, banded_softmax_part, softmax_part
from patchkit.linear.state import LinearState, head_sizes, load_state
from patchkit.patch import Patch, Promises, Stage, register_patch
from patchkit.patches.streaming import (
    Runtime,
    check_layers,
    chosen_layers,
    make_plan,
    open_stream,
    report_layers,
    stream_layer,
    visible_columns,
)
from patchkit.streaming.cache import Frame, Lane, Plan
from patchkit.target import BAKED_IN, AttentionLayer, Rotary, Target

# Arguments of attention calls that change nothing about which keys are seen and how they are weighed, or that are served here.
_UNDERSTOOD = {
    *("scaling", "is_causal", "sliding_window", "position_ids", "position_embeddings", "cache_position", "cos", "sin"),
    *("use_cache", "input_ids", "labels", "token_type_ids", "logits_to_keep", "output_router_logits", "output_hidden_states"),
}
# Queries of long forwards that are computed at once: with a window, and where every query has a mask of its own.
_QUERY_BLOCK = 4096
_MASKED_BLOCK = 256
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
            lane = runtime.plan.lanes[layer.index]
            if isinstance(lane, LinearLane):
                attend = functools.partial(_attention, runtime, HybridLayer(layer.index, lane, lane.parts[layer.index]))
                handle.set_attribute(layer.module, "_patchkit_attention", attend)
            else:
                stream_layer(target, handle, runtime, layer)
        report_layers(target, handle, plan)
        if state is not None:
            inside = tuple(f"{layer.name}." for layer in owned if isinstance(runtime.plan.lanes[layer.index], LinearLane))
            adapted = {name: pair for name, pair in state.lora.items() if name.startswith(inside)}
            for name, (a, b) in adapted.items():
                _adapt(target.model.get_submodule(name), a, b, handle)
            if adapted:
                handle.changed("adapted projections", len(adapted))
        else:
            handle.left_alone(
                "quality",
                "not that of the original model without conversion (stdlib-7m: perplexity 826 instead of 12): run `patchkit linearize`",
            )
        if any(layer.obstacle == BAKED_IN for layer in owned):
            limit = target.position_limit
            handle.left_alone(
                "positions", f"they are learned, so texts end where they end{'' if limit is None else f', at {limit} tokens'}"
            )
        elif plan.limit is None:
            handle.left_alone("positions", "layers that patchkit does not keep need true ones, so they are not bounded")

    def promises(self, target: Target) -> Promises:
        plan, owned, state = self._plan(target)
        parts = {layer.name: plan.main.parts[layer.index] for layer in owned if isinstance(plan.main, LinearLane) and layer.kind == "full"}
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
        """The lanes of all layers that patchkit will keep, and the converted state; every refusal is raised here."""
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
            obstacle = _obstacle(layer, calls, learned) if layer in chosen else layer.obstacle if layer.kind != "full" else None
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
        lanes: dict[int, Lane] = {
            layer.index: LinearLane(
                sinks, kept, layer.rotary, in_cache=False, softmax_window=window, min_length=self.min_length, parts=parts
            )
            for layer in chosen
        }
        movable = not any(layer.obstacle == BAKED_IN for layer in chosen)
        return *make_plan(target, "linear attention", lanes, movable), state

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


def _obstacle(layer: AttentionLayer, calls: int, learned: bool) -> str | None:
    """Why hybrid attention cannot take the place of this layer's.

    Args:
        calls: how many times a forward calls its module's attention.
        learned: positions come from a table, not from rotations.
    """
    if layer.alibi is not None:
        return "scores get a bias that grows with the distance (ALiBi), which a sum over old tokens cannot have"
    if layer.obstacle is not None and not (layer.obstacle == BAKED_IN and learned):
        return layer.obstacle
    extra = [name for name in layer.arguments if name not in _UNDERSTOOD]
    if extra:
        return f"attention takes {', '.join(f'`{name}`' for name in extra)}, which linear attention cannot honour"
    if calls != 1:
        return f"attention is called {calls} times in a forward, and there is one state"
    if not layer.attends_stored or (layer.rotary is not None and layer.rotary.slot == "values"):
        return "the cache holds something else than the keys and values that attention receives (multi-head latent attention)"
    return None


def _adapt(module: Any, a: torch.Tensor, b: torch.Tensor, handle: Handle) -> None:
    """Put W + B A in the place of the weight W; what is saved stays W."""
    original: nn.Parameter = module._parameters["weight"]
    change = (b.float() @ a.float()).to(original.device)
    if not isinstance(module, nn.Linear):  # transformers' Conv1D keeps [in, out]
        change = change.mT
    handle.on_undo(functools.partial(_put_back, module, original))
    module._parameters["weight"] = nn.Parameter(
        (original.detach().float() + change).to(original.dtype), requires_grad=original.requires_grad
    )
    handle.state_dict_hook(module, functools.partial(_save_original, original))
    guard = module.register_load_state_dict_pre_hook(_refuse_loading)
    handle.on_undo(functools.partial(_remove, guard))


def _remove(guard: Any) -> None:
    guard.remove()


def _put_back(module: Any, original: nn.Parameter) -> None:
    adapted = module._parameters["weight"]
    if (adapted.dtype, adapted.device) != (original.dtype, original.device):  # the model was moved meanwhile
        original.data = original.data.to(adapted.device, adapted.dtype)
    module._parameters["weight"] = original


def _save_original(original: nn.Parameter, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = original.detach()


def _refuse_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if f"{prefix}weight" in state_dict:
        raise PatchConflict(f"{prefix}weight is adapted by the patch linear: unpatch_model first, then load weights, then patch again")


# -- run time --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class HybridLayer:
    """What the attention function of one layer knows: its index in the cache, its lane, and its hybrid attention."""

    index: int
    lane: LinearLane
    part: HybridAttention


def _attention(
    runtime: Runtime,
    hybrid: HybridLayer,
    original: Any,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> AttentionOutput:
    """transformers' attention function as hybrid attention.

    Args:
        query: [B, H, T, K], key: [B, G, N, K], value: [B, G, N, V]; keys as `LinearLayer.update` returned them.

    Returns:
        [B, T, H, V] and no attention weights.
    """
    lane, frame = hybrid.lane, runtime.frame
    given = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if given is None else given
    if runtime.step is not None:
        assert runtime.masks is not None
        layer = runtime.step.layer(hybrid.index)
        visible = runtime.masks[lane.number] == 0
        out = _one_token(hybrid, layer, layer.linear_step().short, softmax_part(query, key, value, visible, scaling), query)
    elif frame is None:
        return original(module, query, key, value, attention_mask, **kwargs)
    else:
        _refuse_arguments(module, kwargs)
        if hybrid.part.factor.device != query.device:  # the model was moved since it was patched
            hybrid.part.to(query.device)
        cached: Any = None if runtime.cache is None else runtime.cache.layers[hybrid.index]
        if frame.many:
            out = _several_tokens(hybrid, cached, frame, query, key, value, scaling)
        else:
            token = torch.tensor([frame.start], device=query.device)
            hidden = not frame.steady and (frame.pads is not None or not lane.sees_all)
            seen = frame.visible(lane, token, frame.key_tokens(lane)).to(query.device) if hidden else None
            short = frame.row_positions(token.to(frame.device)) < lane.min_length if lane.min_length else None
            layer = cached if frame.start >= lane.steps_from else None  # nothing is old yet
            out = _one_token(hybrid, layer, short, softmax_part(query, key, value, seen, scaling), query)
    return out.transpose(1, 2).to(query.dtype).contiguous(), None


def _refuse_arguments(module: nn.Module, kwargs: dict[str, Any]) -> None:
    given = {name: value for name, value in kwargs.items() if name not in _UNDERSTOOD and not _compat.means_nothing_to_a_model(value)}
    unknown = [name for name, value in given.items() if value is not None and value is not False]
    unknown = [name for name in unknown if torch.is_tensor(kwargs[name]) or kwargs[name] != 0]
    if unknown:
        raise StreamError(
            f"{type(module).__name__} was called with {', '.join(unknown)}, which linear attention cannot honour: leave it out"
        )


def _one_token(
    hybrid: HybridLayer,
    layer: LinearLayer | LinearStepLayer | None,
    short: torch.Tensor | None,
    both: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
) -> torch.Tensor:
    """[B, H, 1, V] from numerator and denominator of the softmax part, and the state of ``layer``, if anything is old.

    Args:
        short: [B or 1, 1] bool, the query sees everything by softmax; None if no query does.
    """
    lane, part = hybrid.lane, hybrid.part
    numerator, denominator = both
    young = numerator / denominator[..., None]
    if layer is None:
        mixed = part.read(young)
    else:
        step: LinearStep = layer.linear_step()
        features = part.query_map(step.plain_query(query, lane.rotary)).unflatten(1, (layer.state.shape[1], -1))[..., 0, :]  # [B, G, h, F]
        old_numerator = (features @ layer.state).flatten(1, 2)[:, :, None]
        old_denominator = (features @ layer.normalizer[..., None]).flatten(1, 2)
        mixed = part.combine(numerator, denominator, old_numerator, old_denominator, step.old_keys.to(query.device))
    return mixed if short is None else torch.where(short.to(query.device)[:, :, None, None], young, mixed)


def _several_tokens(
    hybrid: HybridLayer, layer: LinearLayer | None, frame: Frame, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> torch.Tensor:
    """[B, H, T, V] of T tokens, by one call of `linear_attention`; the layer's state, if there is one, takes in what becomes old."""
    lane, part, rotary = hybrid.lane, hybrid.part, hybrid.lane.rotary
    if rotary is not None and frame.turned:  # the model has put them at in-cache positions
        cos, sin = (t.to(q.device) for t in frame.window_turn(rotary))
        q = rotary.turn(q, cos, sin, rotary.start)
        if not frame.cached:
            k = rotary.turn(k, cos, sin, rotary.start)
    numerator, denominator = _softmax(frame, lane, q, k, v, scaling)
    queries = torch.arange(frame.start, frame.end, device=q.device)
    rows = frame.row_positions(queries.to(frame.device)).to(q.device)
    young = numerator / denominator[..., None]
    # Keys are in order of time, token i in column i + offset; that of the first query which has an old key is S.
    first = max(frame.start, lane.steps_from)
    if first < frame.end:
        late, offset = first - frame.start, k.shape[2] - frame.end
        columns = slice(first - lane.softmax_window + offset, frame.end - lane.softmax_window + offset)
        plain_q, plain_k, old_v = q[:, :, late:], k[:, :, columns], v[:, :, columns]
        if rotary is not None:
            plain_q = _unturned(frame, rotary, plain_q, 0, first)
            plain_k = _unturned(frame, rotary, plain_k, lane.softmax_window, first - lane.softmax_window)
        mask = None
        if frame.pads is not None:
            tokens = torch.arange(first, frame.end, device=frame.device) - lane.softmax_window
            mask = lane.is_old(frame, tokens).to(q.device)
        name = part.key_map.kind if part.key_map.fused else "identity"
        fq, fk = (plain_q, plain_k) if part.key_map.fused else (part.query_map(plain_q), part.key_map(plain_k))
        before = (None, None) if layer is None else (layer.state, layer.normalizer)
        if layer is not None and torch.is_grad_enabled():  # `advance` will write into them
            before = layer.state.clone(), layer.normalizer.clone()
        old_numerator, old_denominator, state, normalizer = linear_attention(
            fq.contiguous(), fk.contiguous(), old_v.contiguous(), *before, mask, name, False, CHUNK
        )
        if layer is not None:
            layer.advance(frame, state, normalizer, functools.partial(_entering, part, plain_k, old_v, mask))
        count = lane.old_keys(frame, queries[late:].to(frame.device)).to(q.device)
        mixed = part.combine(numerator[:, :, late:], denominator[:, :, late:], old_numerator, old_denominator, count)
        out = torch.cat([part.read(young[:, :, :late]), mixed], 2)
    else:
        out = part.read(young)
    if lane.min_length and frame.start < lane.min_length + frame.most_pads:
        out = torch.where((rows < lane.min_length)[:, None, :, None], young, out)
    return out


def _unturned(frame: Frame, rotary: Rotary, x: torch.Tensor, delay: int, first: int) -> torch.Tensor:
    cos, sin = frame.unturn(rotary, delay, first)
    return rotary.turn(x, cos.to(x.device), sin.to(x.device), rotary.start)


def _entering(part: HybridAttention, plain_k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    features = part.key_map(plain_k)
    return features if mask is None else features * mask[:, None, :, None], v


def _softmax(
    frame: Frame, lane: LinearLane, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numerator [B, H, T, V] and denominator [B, H, T] of what each query sees by softmax."""
    tokens, past = q.shape[2], k.shape[2] - q.shape[2]
    # Queries that need masks of their own: of padded rows, whose sinks stand elsewhere, and those that see more than a window.
    masked = tokens if frame.pads is not None else min(max(lane.min_length - frame.start, 0), tokens)
    pieces = []
    keys = frame.key_tokens(lane)
    for start in range(0, masked, _MASKED_BLOCK):
        stop = min(start + _MASKED_BLOCK, masked)
        columns = visible_columns(frame, lane, k.shape[2], slice(start, stop))
        queries = torch.arange(frame.start + start, frame.start + stop, device=frame.device)
        visible = frame.visible(lane, queries, keys[:, columns]).to(q.device)
        pieces.append(softmax_part(q[:, :, start:stop], k[:, :, columns], v[:, :, columns], visible, scaling))
    for start in range(masked, tokens, _QUERY_BLOCK):
        stop = min(start + _QUERY_BLOCK, tokens)
        seen = slice(past + stop)
        pieces.append(banded_softmax_part(q[:, :, start:stop], k[:, :, seen], v[:, :, seen], lane.softmax_window, scaling, lane.sinks))
    if len(pieces) == 1:
        return pieces[0]
    numerators, denominators = zip(*pieces, strict=True)
    return torch.cat(numerators, 2), torch.cat(denominators, 2)
