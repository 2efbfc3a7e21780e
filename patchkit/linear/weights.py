"""Low-rank updates (LoRA) of projections, installed and removed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from patchkit._compat.modules import parameters_of
from patchkit.errors import PatchConflict, StaleWeights
from patchkit.handle import Handle


class Adapted(NamedTuple):
    """A module that runs over W + B A: A [r, in] and B [out, r], and its weight W."""

    module: Any
    original: nn.Parameter
    a: torch.Tensor
    b: torch.Tensor

    def weight(self) -> torch.Tensor:
        """W + B A, of W's shape and dtype."""
        change = (self.b.float() @ self.a.float()).to(self.original.device)
        if not isinstance(self.module, nn.Linear):  # transformers' Conv1D keeps [in, out]
            change = change.mT
        return (self.original.detach().float() + change).to(self.original.dtype)


def adapt(module: Any, a: torch.Tensor, b: torch.Tensor, handle: Handle) -> Adapted:
    """Replace the weight W of ``module`` by W + B A; `state_dict` still holds W.

    Args:
        a, b: [r, in] and [out, r].
    """
    original: nn.Parameter = parameters_of(module)["weight"]
    adapted = Adapted(module, original, a, b)
    handle.on_undo(functools.partial(_restore, module, original))
    parameters_of(module)["weight"] = nn.Parameter(adapted.weight(), requires_grad=original.requires_grad)
    handle.state_dict_hook(module, functools.partial(_save_original, original))
    guard = module.register_load_state_dict_pre_hook(_refuse_loading)
    handle.on_undo(functools.partial(_remove, guard))
    return adapted


def adapt_again(every: Sequence[Adapted]) -> bool:
    """Compute W + B A again, after W has changed. Returns whether the sums differ from before.

    Raises:
        StaleWeights: a weight has another shape than before, or is no longer in memory.
    """
    for each in every:
        if each.original.device.type == "meta" or each.original.shape != parameters_of(each.module)["weight"].shape:
            raise StaleWeights(
                f"a weight of a {type(each.module).__name__} that linear adapts has another shape, or is no longer in memory: "
                "unpatch_model(model), and patch it again"
            )
    differs = False
    with torch.no_grad():
        for each in every:
            weight, new = parameters_of(each.module)["weight"], each.weight()
            if not torch.equal(weight, new):  # to write the same would look like a change
                weight.copy_(new)
                differs = True
    return differs


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
