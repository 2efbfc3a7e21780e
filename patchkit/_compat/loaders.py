"""Libraries that quantise a model while transformers loads it: their names, and what serves instead of a model that is refused."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from patchkit._compat.gguf import is_unpacked_gguf


@dataclass(frozen=True)
class Loader:
    """The library that has quantised a model.

    Attributes:
        name: of the library, with the bits where it has several forms.
        dense: how to get the model in floating point.
        by_token: how to load it so that a token's numbers do not depend on the tokens beside it.
        rounds_activations: it quantises activations too, so that a difference in the last bit may become one of a whole step.
    """

    name: str
    dense: str
    by_token: str
    rounds_activations: bool = False


_AGAIN = "load it in floating point"
_WEIGHT_ONLY = "a checkpoint whose activations are not quantised"


def loader_of(model: Any) -> Loader | None:
    """Return the library whose quantised weights, or activations, are in ``model``; None for a model of ordinary tensors."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None or is_unpacked_gguf(model):
        return None
    config: Any = getattr(quantizer, "quantization_config", None)
    method = str(getattr(getattr(config, "quant_method", None), "value", getattr(config, "quant_method", "")))
    if method == "bitsandbytes":
        if getattr(config, "load_in_8bit", False):
            by_token = "load it with BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0), which looks for no outliers"
            return Loader("bitsandbytes in 8 bits", "call model.dequantize()", by_token, rounds_activations=True)
        return Loader("bitsandbytes in 4 bits", "call model.dequantize()", "call model.dequantize()")
    if method == "compressed-tensors":
        if getattr(config, "dequantize", False) and not any(map(is_wrapped, model.modules())):
            return None
        dense = "load it with quantization_config=CompressedTensorsConfig(dequantize=True)"
        groups = getattr(getattr(config, "quantization_config", None), "config_groups", {}).values()
        rounds = any(group.input_activations is not None or group.output_activations is not None for group in groups)
        return Loader("compressed-tensors", dense, f"{dense}, or take {_WEIGHT_ONLY}", rounds)
    if method == "torchao":
        kinds = getattr(config.quant_type, "fqn_to_config", None) or {"": config.quant_type}
        rounds = any("Activation" in type(kind).__name__ for kind in kinds.values())
        return Loader("torchao", _AGAIN, f"load it with Int8WeightOnlyConfig, or take {_WEIGHT_ONLY}", rounds)
    if method == "gguf":
        dense = "load it with quantization_config=GgufConfig(dequantize=True)"
        return Loader("GGUF", dense, dense)
    return Loader(method or type(quantizer).__name__, _AGAIN, _AGAIN)


# By `quant_method` of a config: the module without which transformers cannot load the checkpoint, and what to do then.
_WHERE_NOT_LOADED = {
    "gptq": (
        "gptqmodel",
        "GPTQ needs gptqmodel and optimum, for a torch that they support: take the model in compressed-tensors, GGUF or floating point",
    ),
    "awq": (
        "gptqmodel",
        "AWQ needs gptqmodel, for a torch that it supports: convert the checkpoint with AutoAWQConverter of compressed-tensors",
    ),
    "compressed-tensors": ("compressed_tensors", "pip install compressed-tensors"),
    "bitsandbytes": ("bitsandbytes", "pip install bitsandbytes"),
    "torchao": ("torchao", "pip install torchao"),
}


def remedy_for(config: Any) -> str | None:
    """Return what to do where the quantised checkpoint of ``config`` cannot be loaded; None if its library is there, or not known."""
    module, remedy = _WHERE_NOT_LOADED.get(_quantisation(config).get("quant_method", ""), ("", ""))
    return remedy if module and importlib.util.find_spec(module) is None else None


def quantised_options(config: Any) -> dict[str, Any]:
    """Return the options of `from_pretrained` without which the quantised checkpoint of ``config`` cannot be loaded.

    Of weights with zero points per group, as AWQ's are, transformers gives compressed-tensors tensors of another shape than they are
    written in, unless it dequantises them itself.
    """
    quantisation = _quantisation(config)
    if quantisation.get("quant_method") != "compressed-tensors" or importlib.util.find_spec("compressed_tensors") is None:
        return {}
    weights = [group.get("weights") or {} for group in quantisation.get("config_groups", {}).values()]
    if all(each.get("symmetric", True) for each in weights):
        return {}
    return {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}


def _quantisation(config: Any) -> dict[str, Any]:
    found = getattr(config, "quantization_config", None) or {}
    return found if isinstance(found, dict) else found.to_dict()


def loaded_by(model: Any, remedy: str = "dense") -> str:
    """Return what to add to a refusal of ``model``: the library that has quantised it, and the remedy; empty for ordinary tensors.

    Args:
        remedy: "dense" or "by_token", see `Loader`.
    """
    loader = loader_of(model)
    return "" if loader is None else f". The model was quantised by {loader.name}: {getattr(loader, remedy)}"


def unpack_weights(model: Any) -> None:
    """Let compressed-tensors unpack its weights now, which it does at the first forward: before it, linear layers have no ``weight``."""
    if hasattr(model, "ct_decompress_hook"):
        model.hf_quantizer.compressor.decompress_model(model)


def is_wrapped(module: nn.Module) -> bool:
    """Return whether compressed-tensors has put its own forward on a linear layer."""
    return getattr(module, "quantization_scheme", None) is not None


def unpacked_weight(module: Any) -> tuple[Any, torch.Tensor] | None:
    """Return the scheme of a layer of compressed-tensors that quantises only its weight, and the weight's scales, once unpacked.

    Its forward is then that of `nn.Linear` over ``module.weight``. None for any other module.
    """
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is None or type(module) is not nn.Linear or scheme.weights is None:
        return None
    if scheme.input_activations is not None or scheme.output_activations is not None:
        return None
    scale = getattr(module, "weight_scale", None)
    status = getattr(module, "quantization_status", None)
    if scale is None or getattr(status, "value", status) != "decompressed" or type(getattr(module, "weight", None)) is not nn.Parameter:
        return None
    return scheme.weights, scale.detach()


def unpacked_int8(module: Any, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the integers [N, K] int8 and scales [N] fp32 by which compressed-tensors has unpacked ``weight`` of ``module``.

    None where it has no such form (other bits, groups, zero points, quantised activations), or the weight has changed since.
    """
    found = unpacked_weight(module)
    if found is None:
        return None
    args, scale = found
    plain = args.num_bits == 8 and str(getattr(args.type, "value", args.type)) == "int" and args.symmetric
    if not plain or str(getattr(args.strategy, "value", args.strategy)) != "channel" or scale.shape != (len(weight), 1):
        return None
    steps = (weight.detach().float() / scale.float()).round().clamp(-128, 127)
    if not torch.equal((steps * scale.float()).to(weight.dtype), weight.detach()):
        return None
    return steps.to(torch.int8), scale.reshape(-1).float()
