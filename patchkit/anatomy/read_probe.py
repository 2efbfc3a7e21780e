"""Interpretation of a probe: the facts about each attention layer that its recorded calls show."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from patchkit import _compat
from patchkit.anatomy.layers import BAKED_IN, AttentionLayer, Kind, Subject
from patchkit.anatomy.probe import PROBE_TOKENS, Probe
from patchkit.anatomy.rotary import Rotary

# In 16 bits, after the first layer: the largest relative error that may be rounding, and the factor by which one explanation must then be
# better than the other.
_MOST_ROUNDING, _FAR_BETTER = 0.12, 4.0

_NOISE = "its rounding hides how positions enter its keys"

# Keyword arguments of attention calls that hold tensors and change neither which keys a query may see nor positions.
_HARMLESS_TENSORS = {"s_aux", "position_ids", "position_embeddings", "cos", "sin", "labels", "token_type_ids", "input_ids"}


def read_probe(target: Subject, probe: Probe) -> list[AttentionLayer]:
    """Return every layer that stores keys and values, in cache order, with its kind, rotary embedding, ALiBi slopes and obstacle."""
    names = {id(module): name for name, module in target.model.named_modules()}
    frequencies: dict[str, torch.Tensor] = {}
    for name, buffer in target.model.named_buffers():
        if name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1 and buffer.device.type != "meta":
            frequencies[name] = buffer.detach().double().cpu()
            frequencies[f"-{name}"] = -frequencies[name]  # some models rotate the other way round
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
            if layer.obstacle == BAKED_IN and frequencies and _compat.loader_of(target.model) is not None:
                layer.obstacle = (
                    f"{_NOISE}{_compat.loaded_by(target.model)}, or quantise it with patchkit's mlp_int8 in the same patch_model"
                )
        elif layer.obstacle is None:
            _find_alibi(layer, cached, probe.biases.get(index))
        if layer.obstacle is None and layer.alibi is None and not probe.shifted:
            layer.obstacle = "its decoder takes no position_ids, so how positions enter cannot be probed"
    return layers


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
    if kind != "chunked" and cached.keys.shape[-2] != min(PROBE_TOKENS, PROBE_TOKENS if window is None else window - 1):
        return f"it stored {cached.keys.shape[-2]} keys for {PROBE_TOKENS} tokens"
    if not calls:
        return None
    if kind == "chunked":  # left alone, so nothing needs to be known
        return None
    if len({id(call["module"]) for call in calls}) > 1:
        return "several attention modules share its cache layer"
    for call in calls:
        mask = call["attention_mask"]
        if torch.is_tensor(mask) and not any(_is_part_of(mask, built) for built in masks):
            return "its attention adds its own term to the mask"
        for name, value in call["kwargs"].items():
            if torch.is_tensor(value) and name not in _HARMLESS_TENSORS:
                return f"its attention takes a tensor `{name}`, whose meaning for evicted keys is unknown"
        if call["key"].shape[-2] != PROBE_TOKENS:
            return "its attention receives other keys than it stores"
    return None


def _is_part_of(mask: torch.Tensor, built: torch.Tensor) -> bool:
    """Whether ``mask`` is the mask ``built``, possibly cut to the present keys or cast to another dtype."""
    if mask.ndim != 4 or built.ndim != 4 or mask.shape[-1] > built.shape[-1] or mask.shape[-2] != built.shape[-2]:
        return False
    return torch.equal(mask.expand(len(built), -1, -1, -1)[:, :1], built[..., : mask.shape[-1]].to(mask.dtype))


def _find_positions(
    layer: AttentionLayer, cached: Any, call: dict[str, Any], frequencies: dict[str, torch.Tensor], shift: int, first: bool
) -> None:
    """Set ``layer.rotary``, or ``layer.obstacle`` where no rotation explains how positions enter."""
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
    """Find the rotation by which the two rows of ``x`` [2, heads, T, K], at positions p and p + shift, differ.

    Returns:
        (style, start, buffer) of the rotation; () if the rows are equal; None if no rotation explains the difference.
    """
    plain, moved = x[:1].float().cpu(), x[1:].float().cpu()
    scale = plain.norm() + 1e-20
    still = float((moved - plain).norm() / scale)
    rotated, found = math.inf, None
    for name, frequency in frequencies.items():
        width = 2 * frequency.numel()
        for start in {0, x.shape[-1] - width}:
            if start < 0 or width > x.shape[-1]:
                continue
            for style in ("half", "interleaved"):
                rotary = Rotary(style, frequency, start, "keys", start, name)
                cos, sin = rotary.angles(torch.tensor([float(shift)]))
                error = float((rotary.rotate(plain, cos, sin, start) - moved).norm() / scale)
                if error < rotated:
                    rotated, found = error, (style, start, name)
    # Rounding of 16-bit models differs between the rows, and grows with depth.
    tolerance = 1e-3 if x.dtype in (torch.float32, torch.float64) else 1e-2 if first else 6e-2
    if still < tolerance:
        return ()
    if rotated < tolerance:
        return found
    if x.dtype in (torch.float32, torch.float64) or first or found is None:
        return None
    # Pretrained models have a few large activations, by which rounding grows further. Then one explanation has to be far better.
    better, other = min(still, rotated), max(still, rotated)
    if better > _MOST_ROUNDING or other < _FAR_BETTER * better:
        return None
    return () if better == still else found


def _find_alibi(layer: AttentionLayer, cached: Any, bias: tuple[nn.Module, dict[str, Any]] | None) -> None:
    """Set ``layer.alibi`` and its slopes, or the obstacle of a layer that does not use transformers' attention interface."""
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
