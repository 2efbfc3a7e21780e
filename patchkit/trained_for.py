"""`TrainedFor`: the model that a file of trained weights belongs to, so that it is refused for any other."""

from __future__ import annotations

import hashlib
import logging
import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchkit.errors import UnsupportedModel

_logger = logging.getLogger("patchkit")

# Number of sampled weights, at most (a model of many experts has more), and of elements of each.
_SAMPLED, _ELEMENTS = 4096, 16
# Number of sampled rows of the LM head, all of whose elements are hashed.
_ROWS = 256
# Differences that moves between float32, bfloat16 and float16 can leave. Relative: twice the rounding error of bfloat16; absolute: twice
# that of float16 near zero.
_ROUNDING, _LEAST = 2.0**-7, 1e-7


@dataclass(frozen=True)
class TrainedFor:
    """The model that trained weights belong to.

    Attributes:
        hidden_size, embedding_size, vocabulary: D, E and V.
        fingerprint: hash of the LM head's weight in bfloat16, so that it is the same whether the model is loaded in that or in float32.
        samples: 16 elements of every weight by name, of up to 4096 weights; in older files 4 elements, of 48 weights, or none.
        half: the fingerprint when the model is loaded in float16, which rounds weights below 1e-5; empty in older files.
    """

    model_type: str
    hidden_size: int
    embedding_size: int
    vocabulary: int
    fingerprint: str
    samples: dict[str, list[float]] = field(default_factory=dict)
    half: str = ""

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
            half=fingerprint(weight, torch.float16),
        )

    def warn_if_partial(self, where: str) -> None:
        """Log a warning if a file, described by ``where``, knows its model by the LM head alone, as older ones do."""
        if not self.samples:
            _logger.warning(
                "patchkit: %s is of an older format, and knows its model by the LM head alone: a model that was fine-tuned in other layers "
                "is not told apart. Write it again to record samples of all weights",
                where,
            )

    def other_head(self, have: TrainedFor) -> bool:
        """Whether the LM head in the model of ``have`` is another, or one that was rounded first to bfloat16 and then to float16."""
        return ({self.fingerprint, self.half} & {have.fingerprint, have.half}) <= {""}

    def other_weight(self, have: TrainedFor) -> str | None:
        """Name of a weight that differs in the model of ``have``; None if all are equal up to rounding.

        Weights that only one of the two has are skipped: one model may be quantised.
        """
        for name, mine in self.samples.items():
            theirs = have.samples.get(name, mine)
            shortest = min(len(mine), len(theirs))
            if _differ(_of(mine, shortest), _of(theirs, shortest)):
                return name
        return None


def _differ(mine: list[float], theirs: list[float]) -> bool:
    """Whether values differ by more than 2^-7 of the larger one and 1e-7."""
    return any(abs(a - b) > _ROUNDING * max(abs(a), abs(b)) + _LEAST for a, b in zip(mine, theirs, strict=True))


def _of(samples: list[float], count: int) -> list[float]:
    """``count`` of the samples: 4 of 16 are at the places at which older files have their 4."""
    return samples if len(samples) == count else [samples[i * (len(samples) - 1) // (count - 1)] for i in range(count)]


def _samples(model: Any) -> dict[str, list[float]]:
    """Sixteen elements of each weight of ``model``, without quantised and offloaded ones."""
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
        samples[name] = _rounded(flat[torch.tensor(places, device=flat.device)])
    return samples


def _rounded(values: torch.Tensor) -> list[float]:
    """The values with 7 digits, which keeps files short."""
    return [float(f"{value:.7g}") for value in values.float().tolist()]


def lm_head_weight(model: Any) -> torch.Tensor | None:
    """The LM head's weight [V, D]; None if it is not a single matrix."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim == 2 else None


def fingerprint(weight: torch.Tensor, loaded: torch.dtype = torch.float32) -> str:
    """Hash of 256 rows of ``weight`` [N, D] as it is when ``loaded`` in a dtype, rounded to bfloat16."""
    rows = torch.linspace(0, len(weight) - 1, min(len(weight), _ROWS), device=weight.device).long()
    sample = weight.detach()[rows].to(loaded).to(torch.bfloat16).cpu().contiguous()
    return hashlib.sha256(sample.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
