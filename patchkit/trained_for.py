"""`TrainedFor`: which model a file of trained weights belongs to, so that it is refused for any other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.errors import UnsupportedModel


@dataclass(frozen=True)
class TrainedFor:
    """The model that trained weights belong to.

    Attributes:
        hidden_size, embedding_size, vocabulary: D, E and V.
        fingerprint: of the LM head's weight, in bfloat16, so that it is the same whether the model is loaded in that or in float32.
    """

    model_type: str
    hidden_size: int
    embedding_size: int
    vocabulary: int
    fingerprint: str

    @classmethod
    def of(cls, model: Any) -> TrainedFor:
        """The facts about ``model``.

        Raises:
            UnsupportedModel: it has no LM head of one weight [V, D], or no input embeddings.
        """
        weight, embeddings = lm_head_weight(model), model.get_input_embeddings()
        if weight is None or not hasattr(embeddings, "weight"):
            raise UnsupportedModel(
                f"{type(model).__name__} has no LM head of one weight matrix, by which trained weights are known to be its own: "
                "draft heads need one, and converted attention does. Use what needs no training, such as PromptLookup"
            )
        return cls(
            model_type=model.config.model_type,
            hidden_size=weight.shape[1],
            embedding_size=embeddings.weight.shape[1],
            vocabulary=weight.shape[0],
            fingerprint=fingerprint(weight),
        )


def lm_head_weight(model: Any) -> torch.Tensor | None:
    """The LM head's weight [V, D]; None if it has no one matrix."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def fingerprint(weight: torch.Tensor) -> str:
    """Of 256 rows of ``weight`` [N, D], rounded to bfloat16."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), 256), device=weight.device).long()
    sample = weight.detach()[rows].to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
