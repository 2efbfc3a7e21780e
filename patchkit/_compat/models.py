"""Facts about a model: its decoder, its rotary types, who else uses it."""

from __future__ import annotations

from typing import Any

import torch

from patchkit._compat.declared import Names
from patchkit._compat.modules import forward_pre_hooks_of
from patchkit._compat.names import Cache

RELIED_ON: Names = {"transformers:PreTrainedModel.get_decoder": None}

MAY_BE_MISSING = {
    "_tp_size": "only models that are spread over processes need it",
    "_adapter_names_pre_forward_hook": "peft's hook, looked for by name; a model has it only within a forward with adapter_names=",
}


def means_nothing_to_a_model(value: Any) -> bool:
    """Whether an argument of a forward is an object that no model computes with: transformers' generate leaves a tokenizer there."""
    return not isinstance(value, torch.Tensor | int | float | list | tuple | dict | Cache | type(None))


def is_shared_by_processes(model: Any) -> bool:
    """Whether several processes hold one model between them (tensor parallel, FSDP, ZeRO-3), so that all must run the same forwards."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return False
    from torch.distributed.tensor import DTensor
    from transformers.generation.utils import is_fsdp_managed_module
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model) or (getattr(model, "_tp_size", None) or 1) > 1:
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def has_adapters_by_row(model: Any) -> bool:
    """Whether PEFT's hooks are in place that give every row of the batch an adapter of its own."""
    hooks = (hook for module in model.modules() for hook in forward_pre_hooks_of(module))
    return any(getattr(getattr(hook, "func", None), "__name__", "") == "_adapter_names_pre_forward_hook" for hook in hooks)


def continuous_batching(model: Any) -> list[str]:
    """The methods of ``model`` that generate with continuous batching, whose cache is paged."""
    names = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
    return [name for name in names if callable(getattr(model, name, None))]


def decoder_of(model: Any) -> Any:
    """The module under the language-modelling head."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return found if isinstance(found, torch.nn.Module) and found is not model else model.base_model


def rope_switch(config: Any) -> int | None:
    """The number of positions beyond which a model chooses other rotary frequencies for all tokens; None if it never does."""
    if not {"dynamic", "longrope"} & set(rope_types(config)):
        return None
    limits = [getattr(config, name, None) for name in ("max_position_embeddings", "original_max_position_embeddings")]
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        limits.append(each.get("original_max_position_embeddings"))
    return min(limit for limit in limits if isinstance(limit, int))


def rope_types(config: Any) -> set[str]:
    """The kinds of rotary scaling that ``config`` names, for all kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    every = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    return {parameters["rope_type"] for parameters in every if "rope_type" in parameters}
