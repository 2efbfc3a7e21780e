"""Recovery: low-rank updates of the attention projections, trained on the language-modelling loss while the model runs as hybrid.

LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) through peft, as LoLCATs (Zhang et al. 2024, https://arxiv.org/abs/2410.10254),
section 3.2. Differs from it in that

* the feature maps and factors continue to train;
* the softmax model's own distribution is a target in addition to the text (distillation), so that far fewer tokens suffice;
* sequences are longer than the model's trained context, from which the linear part learns to weigh many old tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from patchkit import _compat
from patchkit._compat.peft import adapter_parameters, adapter_scaling, insert_adapters
from patchkit.anatomy.target import Target
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.training.student import Student


class Lora:
    """Adapters on a student's projections, inserted by peft.

    Attributes:
        layers: peft's modules by the name of the projection that each replaces.
    """

    def __init__(self, student: Student, projections: list[str], rank: int, seed: int) -> None:
        """Insert adapters that change nothing yet.

        Raises:
            PatchError: peft is not installed, or cannot adapt a projection.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                insert_adapters(student.model, projections, rank)
            except ImportError as error:
                raise PatchError(
                    "recovery needs peft: pip install peft, or leave the stage out with lora_steps=0 (--lora-steps 0)"
                ) from error
            except ValueError as error:
                raise PatchError(f"peft cannot adapt the attention projections ({error}): leave the stage out with lora_steps=0") from error
        modules = dict(student.model.named_modules())
        self.layers: dict[str, Any] = {name: modules[name] for name in projections}

    def parameters(self) -> list[nn.Parameter]:
        """Matrices A and B of every adapter, in a fixed order."""
        return [parameter for layer in self.layers.values() for parameter in adapter_parameters(layer)]

    def weights(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """(A [r, in], B [out, r]) float32 of every projection, scaled: W' = W + B A."""
        found = {}
        for name, layer in self.layers.items():
            a, b = (parameter.detach().float() for parameter in adapter_parameters(layer))
            found[name] = a.cpu().clone(), (b * adapter_scaling(layer)).cpu()
        return found


def lm_loss(student: Student, texts: torch.Tensor, teacher: Any = None, context: int = 0, share: float = 0.0) -> torch.Tensor:
    """Mean next-token cross-entropy of sequences [N, T], with every converted layer as hybrid attention.

    Args:
        teacher: the softmax model, whose distribution gets a ``share`` of the loss; None for the text alone.
        context: number of positions at which the teacher is used: those that it was trained on.
    """
    texts = texts.to(student.model.device)
    with student.hybrid() as model:
        logits = model(input_ids=texts[:, :-1], use_cache=False).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), texts[:, 1:].flatten())
    if share == 0:
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=texts[:, :-1][:, :context], use_cache=False).logits.float().softmax(-1)
    given = logits[:, : wanted.shape[1]].float()
    return (1 - share) * loss + share * F.cross_entropy(given.flatten(0, 1), wanted.flatten(0, 1))


def projections(target: Target, layers: list[int]) -> list[str]:
    """The linear layers inside the attention modules of these layers, by name.

    Raises:
        UnsupportedModel: there is none.
    """
    found = [
        f"{layer.name}.{name}"
        for layer in target.attention_layers
        if layer.index in layers
        for name, module in layer.module.named_modules()
        if isinstance(module, nn.Linear | _compat.Conv1D)
    ]
    if not found:
        raise UnsupportedModel(
            f"{type(target.model).__name__} has no linear layers in its attention: leave the recovery out (lora_steps=0)"
        )
    return list(dict.fromkeys(found))
