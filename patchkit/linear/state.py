"""`LinearState`: the parameters learned by converting a softmax model, and their file.

A file is safetensors. Tensors: ``layers.{index}.{name}`` for everything in that layer's `HybridAttention.state_dict`, and for each
adapted projection ``lora.{module}.A`` [r, in] and ``lora.{module}.B`` [out, r], already scaled: W' = W + B A. The metadata name the
window, sinks and horizon of the training, and the model; the state is refused for any other model.

Shapes: H heads, G kv heads, K head dimension, V value dimension, r rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.linear.feature_maps import available_feature_maps
from patchkit.linear.hybrid import HybridAttention
from patchkit.trained_for import TrainedFor

_FORMAT = "patchkit linear 1"
_REMEDY = "Convert this model: patchkit linearize MODEL --text FILE --out STATE"


class HeadSizes(NamedTuple):
    """H, G, K and V of one attention layer."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass
class LinearState:
    """The converted attention of one model.

    Attributes:
        feature_map, window, sinks, horizon: options of `HybridAttention` and `hybrid_attention` in the training.
        parts: the hybrid attention of each converted layer, by the layer's index in the cache, on the CPU in float32.
        lora: (A [r, in], B [out, r]) of each adapted projection, by its name in ``model.named_modules()``: W' = W + B A.
        trained_for: the model it belongs to.
        float16_fingerprint: that model's fingerprint when it is loaded in float16, which rounds weights below 1e-5.
    """

    feature_map: str
    window: int
    sinks: int
    horizon: int | None
    parts: dict[int, HybridAttention]
    trained_for: TrainedFor
    float16_fingerprint: str
    lora: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """Indices of the converted layers, ascending."""
        return sorted(self.parts)

    @classmethod
    def start(cls, target: Target, feature_map: str, window: int, sinks: int, horizon: int | None, layers: list[int]) -> LinearState:
        """Make untrained attention for these layers of a model.

        All old keys start at one distance from the query, the geometric mean of window and context. At distance 0 a query would treat
        old tokens like the current one: softmax attention with plain queries and plain old keys triples the perplexity of stdlib-7m,
        and at a distance of 96 to 256 tokens does not change it (docs/results.md).
        """
        sizes = head_sizes(target)
        parts = {index: HybridAttention(feature_map, *sizes[index], horizon=horizon) for index in layers}
        distance = math.sqrt(window * max(window, horizon or target.position_limit or window))
        for layer in target.attention_layers:
            if layer.index in parts and layer.rotary is not None:
                cos, sin = layer.rotary.angles(torch.tensor(distance))
                rotation = layer.rotary.rotate(torch.eye(sizes[layer.index].head_dim), cos, sin, layer.rotary.start)
                parts[layer.index].query_map.start_behind(rotation)
        trained_for = TrainedFor.of(target.model)
        return cls(feature_map, window, sinks, horizon, parts, trained_for, trained_for.half)

    def state_dict(self) -> dict[str, Any]:
        """Return the tensors by their names in a file, and its metadata under "metadata"; `load_state` accepts this dict."""
        tensors: dict[str, Any] = {}
        for index in self.layers:
            for name, tensor in self.parts[index].state_dict().items():
                tensors[f"layers.{index}.{name}"] = tensor.detach().clone()
        for name, (a, b) in self.lora.items():
            tensors[f"lora.{name}.A"], tensors[f"lora.{name}.B"] = a.detach().clone(), b.detach().clone()
        tensors["metadata"] = {
            "format": _FORMAT,
            "feature_map": self.feature_map,
            "window": str(self.window),
            "sinks": str(self.sinks),
            "horizon": json.dumps(self.horizon),
            "layers": json.dumps(self.layers),
            "trained_for": json.dumps(asdict(self.trained_for)),
            "float16_fingerprint": self.float16_fingerprint,
        }
        return tensors

    def save(self, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the state to a safetensors file with tensors of ``dtype``."""
        tensors = self.state_dict()
        metadata = tensors.pop("metadata")
        save_file({name: tensor.to(dtype).cpu().contiguous() for name, tensor in tensors.items()}, path, metadata)

    def check_fits(self, model: Any) -> None:
        """Refuse a model that this state was not trained for.

        Raises:
            UnsupportedModel: the model has other sizes or other weights.
        """
        have, wanted = TrainedFor.of(model), self.trained_for
        if (have.hidden_size, have.vocabulary) != (wanted.hidden_size, wanted.vocabulary):
            what = (
                f"a hidden size of {wanted.hidden_size} and {wanted.vocabulary} tokens, and this one has {have.hidden_size} and "
                f"{have.vocabulary}"
            )
        elif have.fingerprint != self.float16_fingerprint and wanted.other_head(have):
            what = "another LM head: the sizes agree, the weights do not"
        elif (name := wanted.other_weight(have)) is not None:
            what = f"the same LM head, but another {name}"
        else:
            return
        raise UnsupportedModel(f"this linear attention was converted from a {wanted.model_type} model with {what}. {_REMEDY}")


def load_state(source: str | Path | Mapping[str, Any] | LinearState, model_or_target: Any) -> LinearState:
    """Load the converted attention of a model.

    Args:
        source: a file that `LinearState.save` wrote, a dict that `LinearState.state_dict` returned, or a state, which is only checked.
        model_or_target: the unpatched model, or its `Target`.

    Raises:
        PatchError: no such file, not a file of linear attention, or tensors missing, left over or of wrong shapes.
        UnsupportedModel: the state belongs to another model.
    """
    target = model_or_target if isinstance(model_or_target, Target) else Target(model_or_target)
    if isinstance(source, LinearState):
        source.check_fits(target.model)
        return source
    if isinstance(source, Mapping):
        where, tensors = "the state dict", dict(source)
        metadata = tensors.pop("metadata", None) or {}
    else:
        where, tensors, metadata = _read(source)
    if metadata.get("format") != _FORMAT:
        raise PatchError(f"{where} holds no linear attention of patchkit: give a file that patchkit linearize wrote")
    try:
        facts = {name: json.loads(metadata[name]) for name in ("window", "sinks", "horizon", "layers", "trained_for")}
        state = LinearState(
            metadata["feature_map"],
            facts["window"],
            facts["sinks"],
            facts["horizon"],
            {},
            TrainedFor(**facts["trained_for"]),
            metadata["float16_fingerprint"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise PatchError(f"the metadata of {where} cannot be used ({type(error).__name__}: {error}). {_REMEDY}") from error
    if state.feature_map not in available_feature_maps():
        raise PatchError(f"{where} uses the feature map {state.feature_map!r}, which does not exist here. {_REMEDY}")
    state.trained_for.warn_if_partial(where)
    state.check_fits(target.model)
    _fill(state, facts["layers"], tensors, where, target)
    return state


def head_sizes(target: Target) -> dict[int, HeadSizes]:
    """Sizes of each layer that calls transformers' attention interface, by the layer's index in the cache."""
    return {
        call["layer"]: HeadSizes(call["query"].shape[1], call["key"].shape[1], call["query"].shape[-1], call["value"].shape[-1])
        for call in target.attention_calls
    }


def _read(source: str | Path) -> tuple[str, dict[str, Any], dict[str, str]]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise PatchError(f"there is no file of linear attention at {path}: write one with patchkit linearize")
    try:
        with safe_open(path, "pt") as file:
            return str(path), {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise PatchError(f"{path} cannot be read as safetensors ({error}): convert the model again with patchkit linearize") from error


def _fill(state: LinearState, layers: list[int], tensors: dict[str, Any], where: str, target: Target) -> None:
    """Copy every one of ``tensors`` into ``state``.

    Raises:
        PatchError: a tensor is missing, has another shape than the model requires, or belongs to no part of the state.
    """
    sizes, modules = head_sizes(target), dict(target.model.named_modules())
    left = dict(tensors)
    for index in layers:
        if index not in sizes:
            raise PatchError(f"{where} converts layer {index}, and the model has attention in layers {sorted(sizes)}. {_REMEDY}")
        part = HybridAttention(state.feature_map, *sizes[index], horizon=state.horizon)
        if f"layers.{index}.readout" in left:
            part.add_readout()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(_taken(left, f"layers.{index}.{name}", tuple(parameter.shape), where))
        state.parts[index] = part.requires_grad_(False)
    for key in [key for key in left if key.startswith("lora.") and key.endswith(".A")]:
        name = key[len("lora.") : -len(".A")]
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim != 2:
            raise PatchError(f"{where} adapts {name}, which is not a projection of this {type(target.model).__name__}. {_REMEDY}")
        rows, columns = in_and_out(modules[name])[::-1]
        rank = left[key].shape[0]
        state.lora[name] = (_taken(left, key, (rank, columns), where), _taken(left, f"lora.{name}.B", (rows, rank), where))
    if left:
        raise PatchError(f"{where} holds {sorted(left)[0]!r}, which has no place in the converted layers {layers}. {_REMEDY}")


def in_and_out(module: Any) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear layer; transformers' `Conv1D` keeps its weight as [in, out]."""
    first, second = module.weight.shape
    return (second, first) if isinstance(module, torch.nn.Linear) else (first, second)


def _taken(tensors: dict[str, Any], name: str, shape: tuple[int, ...], where: str) -> torch.Tensor:
    if name not in tensors:
        raise PatchError(f"{where} lacks the tensor {name!r} {list(shape)}. {_REMEDY}")
    tensor = tensors.pop(name)
    if tuple(tensor.shape) != shape:
        raise PatchError(f"{name!r} of {where} is {list(tensor.shape)}, and this model asks for {list(shape)}. {_REMEDY}")
    return tensor.float()


class StateDict(dict[str, Any]):
    """A dict of tensors by name, with a short representation in specs, which cannot hold tensors."""

    def __repr__(self) -> str:
        return "<state dict>"
