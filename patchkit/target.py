"""Target: the anatomy of a causal language model, found by probing the model itself.

One forward of two rows answers everything: both rows hold the same tokens, the second at positions shifted by a constant.
What moves between the rows, and how, shows where positions enter: keys that turn by ``shift * frequency`` are rotary
(and which half, slice and frequencies), keys that stay have no position, anything else is baked in. There is no table of models.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from patchkit import _compat
from patchkit.attention import alias_of, original_name, recorded
from patchkit.errors import NothingMatched, PatchError, UnsupportedModel
from patchkit.record import Named
from patchkit.views import evaluating

M = TypeVar("M", bound=nn.Module)

_PROBE_TOKENS = 4
_PROBE_SHIFT = 101
# In 16 bits, beyond the first layer: how much may be rounding, and how many times better than the other one an explanation has to be then.
_MOST_ROUNDING, _FAR_BETTER = 0.12, 4.0
# An `AttentionLayer.obstacle` that matters only to patches that move keys.
BAKED_IN = "positions are baked into its keys or values (learned, sinusoidal, or normalised after rotation), so kept keys cannot move"
_NOISE = (
    "its weights are quantised, and what they lose hides how positions enter its keys: load it in floating point, or quantise it with "
    "patchkit's mlp_int8 in the same patch_model"
)
# Keyword arguments of attention calls that hold tensors and do not change which key a query may see, or where it stands.
_HARMLESS_TENSORS = {"s_aux", "position_ids", "position_embeddings", "cos", "sin", "labels", "token_type_ids", "input_ids"}


@dataclass(frozen=True, eq=False)
class Rotary:
    """A rotary position embedding (Su et al. 2021, RoFormer) as one attention module applies it.

    Attributes:
        style: "half" pairs dimension d with d + n/2, "interleaved" pairs 2d with 2d + 1.
        frequencies: [n/2] float64, radians per position.
        start: first of the n rotated dimensions, in the queries and keys that the attention function receives.
        slot: which of the two tensors given to ``Cache.update`` is rotated: "values" only for multi-head latent attention.
        cached_start: first rotated dimension in that tensor.
        buffer: name of the module buffer that holds the frequencies.
    """

    style: Literal["half", "interleaved"]
    frequencies: torch.Tensor
    start: int
    slot: Literal["keys", "values"]
    cached_start: int
    buffer: str

    def follow(self, buffer: torch.Tensor) -> None:
        """Take the frequencies from the module's ``buffer`` [n/2] anew: the model was moved to another dtype, which rounds them."""
        sign = -1 if self.buffer.startswith("-") else 1  # see `_run_probe`
        object.__setattr__(self, "frequencies", sign * buffer.detach().double().cpu())

    @property
    def width(self) -> int:
        """Number n of rotated dimensions."""
        return 2 * self.frequencies.numel()

    def angles(self, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine [..., n] (float32) that turn by ``offsets`` [...] positions; exact for any offset up to 2^53."""
        angle = offsets.to(torch.float64)[..., None] * self.frequencies.to(offsets.device)
        angle = torch.cat([angle, angle], -1) if self.style == "half" else angle.repeat_interleave(2, -1)
        return angle.cos().float(), angle.sin().float()

    def quarter_turn(self, x: torch.Tensor) -> torch.Tensor:
        """Every pair (a, b) of the last dimension n becomes (-b, a), so that a turn by t is ``x cos t + quarter_turn(x) sin t``."""
        if self.style == "half":
            a, b = x.chunk(2, -1)
            return torch.cat([-b, a], -1)
        return torch.stack([-x[..., 1::2], x[..., 0::2]], -1).flatten(-2)

    def turn(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, start: int) -> torch.Tensor:
        """``x`` [..., K] with its dimensions start .. start+n turned; computed in float32, returned in x's dtype."""
        part = x[..., start : start + self.width].float()
        turned = (part * cos + self.quarter_turn(part) * sin).to(x.dtype)
        if self.width == x.shape[-1]:
            return turned
        return torch.cat([x[..., :start], turned, x[..., start + self.width :]], -1)


Kind = Literal["full", "sliding", "chunked", "other"]


@dataclass(eq=False)
class AttentionLayer:
    """One attention layer, as probed.

    Attributes:
        index: its place in the cache.
        name, module: the attention module, as in ``model.named_modules()``.
        kind: "full" causal attention, "sliding" (own window), "chunked" (own chunk), or "other" (compressed, indexed, ...).
        window: tokens a sliding layer sees, the current one included, or a chunk's length; None for other kinds.
        rotary: how positions enter; None when the layer's keys carry no position.
        alibi: the layer receives a bias that is linear in the key's position (Press et al. 2022): its keyword argument's name.
        slopes: [H] float64, the bias per position, with alibi.
        mask_is_boolean: such a layer takes a mask that is True where a key is hidden; else one that is added to the scores.
        interface: it calls transformers' attention interface, so a registered attention function reaches it.
        obstacle: why nothing can be promised about evicting its keys; None when all is understood.
        calls: how many times a forward calls that interface for this layer.
        arguments: the keyword arguments of those calls that are set: not None, False or 0.
        attends_stored: the keys and values of those calls are what is in the cache (in multi-head latent attention they are not).
    """

    index: int
    name: str
    module: nn.Module
    kind: Kind
    window: int | None = None
    interface: bool = False
    rotary: Rotary | None = None
    alibi: str | None = None
    slopes: torch.Tensor | None = None
    mask_is_boolean: bool = False
    obstacle: str | None = None
    calls: int = 0
    arguments: tuple[str, ...] = ()
    attends_stored: bool = False


@dataclass(eq=False)
class FeedForward:
    """What the feed-forward blocks of a decoder are made of, by module name.

    Attributes:
        linears: `nn.Linear` and transformers' `Conv1D` modules (whose weight is [in, out]).
        experts: modules with the weights of all experts in 3-D parameters, that go through transformers' experts interface.
        left_alone: modules that are neither, and why.
    """

    linears: dict[str, Any]
    experts: dict[str, nn.Module]
    left_alone: dict[str, str]


@dataclass
class _Probe:
    """What one forward showed: attention calls with the cache layer each belongs to, masks built for them, biases handed to them."""

    cache: Any
    shift: int
    decoder: Any = None
    shifted: bool = False
    calls: list[dict[str, Any]] = field(default_factory=list)
    masks: list[torch.Tensor] = field(default_factory=list)
    biases: dict[int, tuple[nn.Module, dict[str, Any]]] = field(default_factory=dict)


@dataclass(eq=False)
class Target:
    """A model and its anatomy. Probing is lazy: a patch that never asks costs no forward.

    Attributes:
        patches: all that are being applied, in that order.
        patch: patches another model as this one would be, without a line in the log: for `Patch.check`, which may draft with such a view.
        views: other models over the same weights, made by `Patch.check` while the model is unpatched, for `Patch.apply`.
        attention_implementation: what ``config._attn_implementation`` says unpatched: "sdpa", "eager", "flash_attention_2", ...
    """

    model: Any
    patches: tuple[Named, ...] = ()
    patch: Callable[[Any, list[Any]], Any] | None = field(default=None, repr=False)
    views: dict[int, Any] = field(default_factory=dict, repr=False)
    attention_implementation: str = field(init=False)

    def __post_init__(self) -> None:
        # Now, because a patch that is applied puts an alias there; so may one of another model with this config.
        self.attention_implementation = original_name(self.config)

    @cached_property
    def config(self) -> Any:
        """The text decoder's configuration."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def decoder(self) -> nn.Module:
        """The module whose forward takes the 2-D ``attention_mask``, ``position_ids`` and the cache."""
        return self._probe.decoder

    @cached_property
    def _probe(self) -> _Probe:
        return _run_probe(self)

    @cached_property
    def position_limit(self) -> int | None:
        """Positions (exclusive) up to which the rotary frequencies are those of a short text; None without a limit."""
        config = self.config
        limits = [getattr(config, "max_position_embeddings", None)]
        rope = getattr(config, "rope_parameters", None) or {}
        for parameters in [rope, *(v for v in rope.values() if isinstance(v, dict))]:
            # These two types change all frequencies once a position passes the original length.
            if parameters.get("rope_type") in ("dynamic", "longrope"):
                limits.append(parameters.get("original_max_position_embeddings"))
                limits.append(getattr(config, "original_max_position_embeddings", None))
        known = [limit for limit in limits if isinstance(limit, int) and limit > 0]
        return min(known) if known else None

    @cached_property
    def attention_layers(self) -> list[AttentionLayer]:
        """Every layer that stores keys and values, in cache order.

        Raises:
            UnsupportedModel: the model keeps its own cache class, or cannot be probed.
            NothingMatched: the model has no attention.
        """
        layers = _read_probe(self, self._probe)
        if not layers:
            raise NothingMatched(
                f"{type(self.model).__name__} has no attention layers with a key-value cache, so an attention patch has nothing to act on"
            )
        return layers

    @cached_property
    def feed_forward(self) -> FeedForward:
        """The feed-forward blocks of the decoder's layers.

        Raises:
            UnsupportedModel: the model cannot be probed.
        """
        return _find_feed_forward(self)

    def forward(self, ids: torch.Tensor) -> None:
        """Run the model once over token ids [B, T], in evaluation mode, without gradients or a cache.

        Raises:
            UnsupportedModel: it fails.
        """
        try:
            with evaluating(self.model), torch.no_grad():
                self.model(input_ids=ids, use_cache=False)
        except Exception as error:
            raise UnsupportedModel(
                f"{type(self.model).__name__} failed on {tuple(ids.shape)} token ids ({type(error).__name__}: {error}). "
                "Does model(input_ids) run unpatched?"
            ) from error

    def describe(self) -> dict[str, Any]:
        """The anatomy as plain data, for ``patchkit inspect``."""
        rows = []
        for layer in self.attention_layers:
            rotary = layer.rotary
            rows.append(
                {
                    "layer": layer.index,
                    "module": layer.name,
                    "kind": layer.kind,
                    "window": layer.window,
                    "positions": "alibi" if layer.alibi else "none" if rotary is None else f"rotary, {rotary.style}",
                    "rotated_dims": None if rotary is None else rotary.width,
                    "frequencies": None if rotary is None else rotary.buffer,
                    "obstacle": layer.obstacle,
                }
            )
        return {
            "class": type(self.model).__name__,
            "model_type": self.config.model_type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "attention": self.attention_implementation,
            "position_limit": self.position_limit,
            "decoder": type(self.decoder).__name__,
            "attention_layers": rows,
            "feed_forward_linears": len(self.feed_forward.linears),
            "fused_experts": len(self.feed_forward.experts),
        }


def _decoders(model: Any) -> list[nn.Module]:
    """Modules that may be the decoder, innermost first: some models build the masks one module further out than others."""
    named = model.get_decoder() if hasattr(model, "get_decoder") else None
    candidates = [named, model.base_model, *(child for child in model.children() if hasattr(child, "config"))]
    return list(dict.fromkeys(m for m in candidates if isinstance(m, nn.Module) and not isinstance(m, nn.Linear) and m is not model))


def _run_probe(target: Target) -> _Probe:
    model, config = target.model, target.config
    if not _compat.supports_dynamic_cache(model):
        raise UnsupportedModel(f"{type(model).__name__} keeps its state in a cache class of its own, which cannot be replaced")
    if any(_compat.speaks_old_names(module) for module in (model, *_decoders(model))):
        raise UnsupportedModel(
            f"{type(model).__name__} takes its cache as past_key_values, which is called {_compat.CACHE} since transformers 5.24: "
            "its code was written for an older version. Rename the argument there, or install transformers<5.24"
        )
    limit = target.position_limit or 10**6
    shift = max(1, min(_PROBE_SHIFT, limit - 2 * _PROBE_TOKENS))
    ids = _probe_tokens(target)
    positions = (torch.arange(_PROBE_TOKENS) + torch.tensor([[0], [shift]])).to(ids.device)
    probe = _Probe(_compat.DynamicCache(config=config), shift)
    layer_of_call: list[int] = []
    update = probe.cache.update

    def noticed_update(keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        layer_of_call.append(layer_idx)
        return update(keys, values, layer_idx, *args, **kwargs)

    probe.cache.update = noticed_update

    def notice_call(call: dict[str, Any]) -> None:
        probe.calls.append({**call, "layer": layer_of_call[-1] if layer_of_call else -1})

    def notice_bias(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if ("alibi" in kwargs or "position_bias" in kwargs) and isinstance(getattr(module, "layer_idx", None), int):
            probe.biases[module.layer_idx] = (module, kwargs)  # type: ignore[index]

    takes_2d_mask: dict[nn.Module, bool] = {}

    def shift_positions(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        kwargs = _compat.by_name(decoder, args, kwargs)
        mask = kwargs.get("attention_mask")
        takes_2d_mask[decoder] = torch.is_tensor(mask) and mask.ndim == 2
        if "position_ids" in _compat.argument_names(decoder):
            probe.shifted = True
            kwargs["position_ids"] = positions
        return (), kwargs

    decoders = _decoders(model)
    hooks = [m.register_forward_pre_hook(notice_bias, with_kwargs=True) for m in model.modules() if hasattr(m, "layer_idx")]
    hooks += [m.register_forward_pre_hook(shift_positions, with_kwargs=True) for m in decoders]
    try:
        with evaluating(model), torch.no_grad(), _compat.attention_set_to(model, alias_of), recorded(notice_call, probe.masks.append):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True, **{_compat.CACHE: probe.cache})
    except PatchError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} failed on the two-row probe ({type(error).__name__}: {error}). Does model(input_ids) run unpatched?"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    fitting = [decoder for decoder in decoders if takes_2d_mask.get(decoder)]
    if not fitting:
        raise UnsupportedModel(f"{type(model).__name__} builds its attention masks outside any decoder module that could be hooked")
    probe.decoder = fitting[0]
    return probe


def _probe_tokens(target: Target) -> torch.Tensor:
    """int64 [2, _PROBE_TOKENS], two equal rows, where the model takes its input."""
    vocabulary = getattr(target.config, "vocab_size", 100)
    row = torch.arange(_PROBE_TOKENS) * 7 % max(vocabulary - 8, 1) + min(7, vocabulary - 1)
    device = target.model.device
    return row.expand(2, -1).contiguous().to(device if device.type != "meta" else "cpu")


def _read_probe(target: Target, probe: _Probe) -> list[AttentionLayer]:
    names = {id(module): name for name, module in target.model.named_modules()}
    frequencies: dict[str, torch.Tensor] = {}
    for name, buffer in target.model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1 and buffer.device.type != "meta":
            frequencies[name] = buffer.detach().double().cpu()
            frequencies[f"-{name}"] = -frequencies[name]  # some models turn the other way round
    calls_of: dict[int, list[dict[str, Any]]] = {}
    for call in probe.calls:
        calls_of.setdefault(call["layer"], []).append(call)

    layers = []
    for index, cached in enumerate(probe.cache.layers):
        module: Any
        keys = getattr(cached, "keys", None)
        if keys is None or not torch.is_tensor(keys) or keys.numel() == 0:
            continue
        calls = calls_of.get(index, [])
        module = calls[0]["module"] if calls else probe.biases.get(index, (None, {}))[0]
        kind, window = _kind(target.config, index, cached)
        layer = AttentionLayer(index, names.get(id(module), f"layer {index}"), module, kind, window, interface=bool(calls))
        layers.append(layer)
        layer.calls = len(calls)
        given = [(name, value) for call in calls for name, value in call["kwargs"].items()]
        layer.arguments = tuple(sorted({name for name, value in given if torch.is_tensor(value) or value not in (None, False, 0)}))
        layer.attends_stored = all(call["key"].shape == keys.shape and call["value"].shape == cached.values.shape for call in calls)
        layer.obstacle = _obstacle(cached, calls, kind, window, probe.masks)
        if kind == "chunked":
            continue
        if layer.obstacle is None and calls:
            _find_positions(layer, cached, calls[0], frequencies, probe.shift, first=len(layers) == 1)
            if layer.obstacle == BAKED_IN and frequencies and _is_quantised(target.model):
                layer.obstacle = _NOISE
        elif layer.obstacle is None:
            _find_alibi(layer, cached, probe.biases.get(index))
        if layer.obstacle is None and layer.alibi is None and not probe.shifted:
            layer.obstacle = "its decoder takes no position_ids, so how positions enter cannot be probed"
    return layers


def _is_quantised(model: Any) -> bool:
    """Whether some of the weights are not plain floating-point tensors."""
    return any(type(parameter) is not nn.Parameter or not parameter.is_floating_point() for parameter in model.parameters())


def _kind(config: Any, index: int, cached: Any) -> tuple[Kind, int | None]:
    if type(cached) in (_compat.DynamicLayer, _compat.LinearAttentionAndFullAttentionLayer):
        return "full", None
    if type(cached) is _compat.DynamicSlidingWindowLayer:
        types = getattr(config, "layer_types", None)
        chunked = types[index] == "chunked_attention" if types else getattr(config, "attention_chunk_size", None) is not None
        return ("chunked" if chunked else "sliding"), int(cached.sliding_window)
    return "other", None


def _obstacle(cached: Any, calls: list[dict[str, Any]], kind: str, window: int | None, masks: list[torch.Tensor]) -> str | None:
    if kind == "other":
        return f"its cache layer is a {type(cached).__name__}, which holds more than a window of keys and values"
    if kind != "chunked" and cached.keys.shape[-2] != min(_PROBE_TOKENS, _PROBE_TOKENS if window is None else window - 1):
        return f"it stored {cached.keys.shape[-2]} keys for {_PROBE_TOKENS} tokens"
    if not calls:
        return None
    if kind == "chunked":  # left alone, so nothing needs to be known
        return None
    if len({id(call["module"]) for call in calls}) > 1:
        return "several attention modules share its cache layer"
    for call in calls:
        mask = call["attention_mask"]
        if torch.is_tensor(mask) and not any(_is_part_of(mask, built) for built in masks):
            return "its attention adds something of its own to the mask"
        for name, value in call["kwargs"].items():
            if torch.is_tensor(value) and name not in _HARMLESS_TENSORS:
                return f"its attention takes a tensor `{name}`, whose meaning for evicted keys is unknown"
        if call["key"].shape[-2] != _PROBE_TOKENS:
            return "its attention receives other keys than it stores"
    return None


def _is_part_of(mask: torch.Tensor, built: torch.Tensor) -> bool:
    """Whether ``mask`` is the mask ``built``, possibly cut to the keys there are or given another dtype."""
    if mask.ndim != 4 or built.ndim != 4 or mask.shape[-1] > built.shape[-1] or mask.shape[-2] != built.shape[-2]:
        return False
    return torch.equal(mask.expand(len(built), -1, -1, -1)[:, :1], built[..., : mask.shape[-1]].to(mask.dtype))


def _find_positions(
    layer: AttentionLayer, cached: Any, call: dict[str, Any], frequencies: dict[str, torch.Tensor], shift: int, first: bool
) -> None:
    """Fill in ``layer.rotary``, or ``layer.obstacle`` when positions enter in a way that no rotation explains."""
    slot: Literal["keys", "values"] = "keys"
    keys, values = _rotation(cached.keys, frequencies, shift, first), _rotation(cached.values, frequencies, shift, first)
    if keys is None or values is None or (keys and values):
        layer.obstacle = BAKED_IN
        return
    if values:
        slot, keys = "values", values
    query = _rotation(call["query"], frequencies, shift, first)
    if query is None or bool(query) != bool(keys) or (query and keys and (query[0], query[2]) != (keys[0], keys[2])):
        layer.obstacle = "its queries and keys take positions in different ways"
        return
    if keys and query:
        style, cached_start, buffer = keys
        layer.rotary = Rotary(style, frequencies[buffer], query[1], slot, cached_start, buffer)


def _rotation(x: torch.Tensor, frequencies: dict[str, torch.Tensor], shift: int, first: bool) -> tuple[Any, ...] | None:
    """How ``x`` [2, heads, T, K] differs between the row at positions p and the row at p + shift.

    Returns: () when not at all; (style, start, buffer) when by that rotation; None when no rotation explains it.
    """
    plain, moved = x[:1].float().cpu(), x[1:].float().cpu()
    scale = plain.norm() + 1e-20
    still = float((moved - plain).norm() / scale)
    turned, found = math.inf, None
    for name, frequency in frequencies.items():
        width = 2 * frequency.numel()
        for start in {0, x.shape[-1] - width}:
            if start < 0 or width > x.shape[-1]:
                continue
            for style in ("half", "interleaved"):
                rotary = Rotary(style, frequency, start, "keys", start, name)
                cos, sin = rotary.angles(torch.tensor([float(shift)]))
                error = float((rotary.turn(plain, cos, sin, start) - moved).norm() / scale)
                if error < turned:
                    turned, found = error, (style, start, name)
    # Rounding of 16-bit models differs between the rows, and grows with depth.
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 1e-2 if first else 6e-2
    if still < tolerance:
        return ()
    if turned < tolerance:
        return found
    if x.dtype in (torch.float32, torch.float64) or first or found is None:
        return None
    # Pretrained models have a few large activations, by which it grows further. Then one of the two has to explain it far better.
    better, other = min(still, turned), max(still, turned)
    if better > _MOST_ROUNDING or other < _FAR_BETTER * better:
        return None
    return () if better == still else found


def _find_alibi(layer: AttentionLayer, cached: Any, bias: tuple[nn.Module, dict[str, Any]] | None) -> None:
    """Fill in ``layer.alibi`` and its slopes, or the obstacle that attention outside transformers' interface is."""
    layer.obstacle = "it computes attention itself instead of calling transformers' attention interface"
    if bias is None or layer.kind != "full":
        return
    module, kwargs = bias
    name = "alibi" if "alibi" in kwargs else "position_bias"
    tensor = kwargs[name]
    heads = cached.keys.shape[1]
    if not torch.is_tensor(tensor) or tensor.ndim != 3 or tensor.shape[0] % heads or tensor.shape[-1] < 3:
        return
    rows = tensor[:heads, -1, -3:].double().cpu()
    steps = rows.diff(dim=-1)
    still = all(_rotation(x, {}, 1, first=True) == () for x in (cached.keys, cached.values))
    linear = torch.allclose(steps[:, 0], steps[:, 1], rtol=1e-2, atol=1e-6) and bool((steps[:, 0] != 0).all())
    mask = kwargs.get("attention_mask")
    if still and linear and torch.is_tensor(mask) and mask.ndim == 4:
        layer.module, layer.alibi, layer.slopes, layer.obstacle = module, name, steps[:, 0], None
        layer.mask_is_boolean = mask.dtype == torch.bool and bool(mask[0, 0, 0, -1])


# Where no cache can be watched, a module is a token mixer when its name says so.
_MIXER_WORDS = re.compile(r"att|mixer|mamba|time_mix|temporal|recurrent|lstm|ssm|conv", re.IGNORECASE)
# Beside the feed-forward block: routers and norms that are networks themselves, per-layer embeddings, low-rank residuals,
# mixtures of residual streams.
_AUXILIARY = re.compile(r"^(gate|.*router.*|.*norm|altup|laurel|ple|per_layer.*|.*hyper_connection)$")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def _find_feed_forward(target: Target) -> FeedForward:
    """Every linear layer of a decoder layer that is outside token mixers and is no router.

    A token mixer is a module that was seen to read or write the cache; a decoder layer, an item of a list of modules of which at
    least one holds a mixer; a router, a linear layer with at most two outputs more than there are experts. Small linear layers
    that stand beside the block (`_AUXILIARY`) are none of it.
    """
    model = target.model
    names = {module: name for name, module in model.named_modules()}
    mixers, watched = _token_mixers(target)
    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList) and any(module in mixers for layer in stack for module in layer.modules())
        for layer in stack
    ]
    inner = {module for layer in layers for module in layer.modules() if module is not layer}
    layers = [layer for layer in dict.fromkeys(layers) if layer not in inner]
    experts_here = max(_expert_counts(target.config), default=0)
    found = FeedForward({}, {}, {})
    for layer in layers:
        for path, module in _outside(layer, mixers, watched):
            name = f"{names[layer]}.{path}" if path else names[layer]
            stacked = [key for key, weight in module.named_parameters(recurse=False) if weight.ndim == 3 and min(weight.shape) > 1]
            if isinstance(module, nn.Linear | _compat.Conv1D):
                outputs = module.weight.shape[0] if isinstance(module, nn.Linear) else module.weight.shape[1]
                if outputs > max(experts_here, 1) + 2:
                    found.linears[name] = module
            elif _compat.on_experts_interface(module):
                found.experts[name] = module
            elif stacked and not isinstance(module, nn.Conv1d):
                found.left_alone[name] = f"its 3-D weights ({', '.join(stacked)}) do not go through transformers' experts interface"
    return found


def _expert_counts(config: Any) -> Iterator[int]:
    """Every number of experts that a config, or a config inside it, gives."""
    for name, value in vars(config).items():
        if name in _EXPERT_COUNTS and isinstance(value, int):
            yield value
        elif isinstance(value, _compat.PreTrainedConfig):
            yield from _expert_counts(value)


def _outside(layer: nn.Module, mixers: set[nn.Module], watched: bool) -> Iterator[tuple[str, nn.Module]]:
    """Every module under ``layer`` with its path, without token mixers and what is in or around them."""
    parents = {child: (module, name) for module in layer.modules() for name, child in module.named_children()}
    cut = set()
    for mixer in mixers & set(layer.modules()):
        # A wrapper such as BERT's `attention`, which holds `self` and `output`, belongs to the mixer.
        while mixer in parents and parents[mixer][0] in parents and "att" in parents[parents[mixer][0]][1].lower():
            mixer = parents[mixer][0]
        cut.add(mixer)

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        own_name = path.rpartition(".")[2]
        if module in cut or _AUXILIARY.match(own_name) or (path and _is_attention(module, own_name, watched)):
            return
        yield path, module
        for name, child in module.named_children():
            # Of a LoRA layer, only the base; adapters are trained and small.
            if hasattr(module, "base_layer") and name != "base_layer":
                continue
            yield from walk(child, f"{path}.{name}" if path else name)

    return walk(layer, "")


def _is_attention(module: nn.Module, name: str, watched: bool) -> bool:
    # Cross-attention may not touch the cache in the probe.
    return type(module).__name__.endswith("Attention") or "attn" in name.lower() or (not watched and bool(_MIXER_WORDS.search(name)))


def _token_mixers(target: Target) -> tuple[set[nn.Module], bool]:
    """The innermost modules that were seen to use the cache; and whether there was a cache to watch.

    Without one, every module whose name says that it mixes tokens.
    """
    model = target.model
    by_name = {module for name, module in model.named_modules() if _MIXER_WORDS.search(name.rpartition(".")[2])}
    if not _compat.supports_dynamic_cache(model):
        return by_name, False
    cache = _compat.DynamicCache(config=target.config)
    running: list[nn.Module] = []
    mixers: set[nn.Module] = set()

    def enter(module: nn.Module, args: Any) -> None:
        running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    def watch(method: Any) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if running:
                mixers.add(running[-1])
            return method(*args, **kwargs)

        return watched

    for name in dir(cache):
        if name.startswith("update") or name in ("get_conv_state", "get_recurrent_state", "has_previous_state"):
            setattr(cache, name, watch(getattr(cache, name)))
    hooks = [module.register_forward_pre_hook(enter) for module in model.modules()]
    hooks += [module.register_forward_hook(leave, always_call=True) for module in model.modules()]
    try:
        with evaluating(model), torch.no_grad():
            model(input_ids=_probe_tokens(target)[:1], use_cache=True, **{_compat.CACHE: cache})
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} failed on a probe of {_PROBE_TOKENS} tokens ({type(error).__name__}: {error}). "
            "Does model(input_ids) run unpatched?"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    if not mixers:
        return by_name, False
    # A layer may ask the cache something before its mixer does.
    return {mixer for mixer in mixers if not any(module in mixers for module in mixer.modules() if module is not mixer)}, True


def same_rotary(a: Rotary | None, b: Rotary | None) -> bool:
    """Whether two layers turn their keys alike, so that angles computed for one serve the other."""
    if a is None or b is None:
        return a is b
    mine, other = dataclasses.astuple(a), dataclasses.astuple(b)
    return all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(mine, other, strict=True))
