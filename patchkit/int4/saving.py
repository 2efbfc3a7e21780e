"""The form of symmetric int4 weights on disk: compressed-tensors' "pack-quantized", which stock transformers and vLLM load.

Formats: https://github.com/vllm-project/compressed-tensors. A weight [N, K] is ``weight_packed`` [N, K / 8] int32, of which each holds 8
levels, the first in its lowest bits; ``weight_scale`` [N, K / group]; and ``weight_shape``. Its zero points are whole numbers, so weights
with minima have no form there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from patchkit.int4.weight import Int4Weight
from patchkit.kernels.int4_layout import unpack

_IN_ONE = 8


def is_packable(weight: Int4Weight, symmetric: bool) -> bool:
    """Whether a weight has a form on disk."""
    return symmetric and weight.inputs % weight.group == 0


def save_packed(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Write the int4 weight of a linear layer packed. A state-dict hook."""
    weight = module.weight
    assert isinstance(weight, Int4Weight)
    levels, scale, _ = unpack(weight.qdata, len(weight.scale), weight.inputs, weight.group)
    eight = levels.int().unflatten(1, (-1, _IN_ONE))
    del state[f"{prefix}weight"]
    state[f"{prefix}weight_packed"] = sum(eight[:, :, i] << 4 * i for i in range(_IN_ONE))
    state[f"{prefix}weight_scale"] = (scale.float() * weight.scale[:, None]).to(weight.dtype)
    state[f"{prefix}weight_shape"] = torch.tensor(weight.shape)


def configuration(model: nn.Module, packed: list[str], group: int) -> dict[str, Any]:
    """The field ``quantization_config`` of the config of a model whose layers ``packed`` are saved packed."""
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in packed]
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}},
        "ignore": others,
        "kv_cache_scheme": None,
    }
