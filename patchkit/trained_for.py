"""`TrainedFor`: the model that a file of trained weights belongs to, so that it is refused for any other."""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchkit.errors import UnsupportedModel

# Number of sampled weights, at most (a model of many experts has more), and of elements of each.
_SAMPLED, _ELEMENTS = 4096, 4
# Relative: twice the rounding error of bfloat16.
_ROUNDING = 2.0**-7


@dataclass(frozen=True)
class TrainedFor:
    """The model that trained weights belong to.

    Attributes:
        hidden_size, embedding_size, vocabulary: D, E and V.
        fingerprint: hash of the LM head's weight in bfloat16, so that it is the same whether the model is loaded in that or in float32.
        samples: a few elements of every weight by name, of up to 4096 weights; of 48 weights or none in older files.
    """

    model_type: str
    hidden_size: int
    embedding_size: int
    vocabulary: int
    fingerprint: str
    samples: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> TrainedFor:
        """Identify ``model``.

        Raises:
            UnsupportedModel: it has no LM head of one weight [V, D], or no input embeddings.
        """
        weight, embeddings = lm_head_weight(model), model.get_input_embeddings()
        if weight is None or not hasattr(embeddings, "weight"):
            raise UnsupportedModel(
                f"{type(model).__name__} has no LM head of one weight matrix, which identifies the model of trained weights: "
                "draft heads and converted attention need one. Use a drafter that needs no training, such as PromptLookup"
            )
        return cls(
            model_type=model.config.model_type,
            hidden_size=weight.shape[1],
            embedding_size=embeddings.weight.shape[1],
            vocabulary=weight.shape[0],
            fingerprint=fingerprint(weight),
            samples=_samples(model),
        )

    def other_weight(self, have: TrainedFor) -> str | None:
        """Name of a weight that differs in the model of ``have``; None if all are equal up to rounding.

        Weights that only one of the two has are skipped: one model may be quantised.
        """
        for name, mine in self.samples.items():
            theirs = have.samples.get(name, mine)
            if any(abs(a - b) > _ROUNDING * max(abs(a), abs(b)) + 1e-7 for a, b in zip(mine, theirs, strict=True)):
                return name
        return None


def _samples(model: Any) -> dict[str, list[float]]:
    """Four elements of each weight of ``model``, without quantised and offloaded ones."""
    # PEFT adds prefixes and infixes to the model's names.
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        # 8-bit floating point is a quantised format: its values lack their scales.
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.dtype.itemsize > 1
        if parameter.ndim and parameter.numel() and parameter.device.type != "meta"
        if "lora_" not in name
    }
    samples = {}
    # Chosen by a hash of the name, so that mostly the same are chosen if some are excluded.
    for name in sorted(found, key=lambda name: zlib.crc32(name.encode()))[:_SAMPLED]:
        flat = found[name].detach().flatten()
        # In integers: torch.linspace computes in floating point, which beyond 2^24 elements rounds to an index that does not exist.
        places = [i * (len(flat) - 1) // (_ELEMENTS - 1) for i in range(_ELEMENTS)]
        samples[name] = flat[torch.tensor(places, device=flat.device)].float().tolist()
    return samples


def lm_head_weight(model: Any) -> torch.Tensor | None:
    """The LM head's weight [V, D]; None if it is not a single matrix."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def fingerprint(weight: torch.Tensor) -> str:
    """Hash of 256 rows of ``weight`` [N, D], rounded to bfloat16."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), 256), device=weight.device).long()
    sample = weight.detach()[rows].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
