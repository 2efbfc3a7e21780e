"""Low-rank updates (LoRA) of projections, installed and removed."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from patchkit._compat.modules import parameters_of
from patchkit.errors import PatchConflict
from patchkit.handle import Handle


def adapt(module: Any, a: torch.Tensor, b: torch.Tensor, handle: Handle) -> None:
    """Replace the weight W of ``module`` by W + B A; `state_dict` still holds W.

    Args:
        a, b: [r, in] and [out, r].
    """
    original: nn.Parameter = parameters_of(module)["weight"]
    change = (b.float() @ a.float()).to(original.device)
    if not isinstance(module, nn.Linear):  # transformers' Conv1D keeps [in, out]
        change = change.mT
    handle.on_undo(functools.partial(_restore, module, original))
    parameters_of(module)["weight"] = nn.Parameter(
        (original.detach().float() + change).to(original.dtype), requires_grad=original.requires_grad
    )
    handle.state_dict_hook(module, functools.partial(_save_original, original))
    guard = module.register_load_state_dict_pre_hook(_refuse_loading)
    handle.on_undo(functools.partial(_remove, guard))


def _remove(guard: Any) -> None:
    guard.remove()


def _restore(module: Any, original: nn.Parameter) -> None:
    adapted = parameters_of(module)["weight"]
    if (adapted.dtype, adapted.device) != (original.dtype, original.device):  # the model was moved meanwhile
        original.data = original.data.to(adapted.device, adapted.dtype)
    parameters_of(module)["weight"] = original


def _save_original(original: nn.Parameter, module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    state_dict[f"{prefix}weight"] = original.detach()


def _refuse_loading(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if f"{prefix}weight" in state_dict:
        raise PatchConflict(f"{prefix}weight is adapted by the patch linear: unpatch_model first, then load weights, then patch again")
