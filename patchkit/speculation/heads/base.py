"""The base class of heads that draft."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import save_file
from torch import nn

from patchkit.errors import PatchError, UnsupportedModel
from patchkit.trained_for import TrainedFor

Init = Literal["tie", "copy", "random"]
FORMAT = "patchkit heads 1"  # in the metadata of a file


class Heads(nn.Module):
    """Base class of heads that draft: a file format, and the model that they were trained for.

    Attributes:
        options: the constructor's arguments, stored in the file.
        trained_for: the model that they were trained for; None for untrained heads.
    """

    kind: ClassVar[str]

    def __init__(self, options: dict[str, Any]):
        super().__init__()
        self.options = options
        self.trained_for: TrainedFor | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in self.options.items())})"

    def save(self, path: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write the heads to a safetensors file with weights of ``dtype``.

        Raises:
            PatchError: the heads were not trained for a model.
        """
        if self.trained_for is None:
            raise PatchError("these heads were not trained for a model, so there is nothing to save: train them with train_heads")
        metadata = {
            "format": FORMAT,
            "kind": self.kind,
            "options": json.dumps(self.options),
            "trained_for": json.dumps(asdict(self.trained_for)),
        }
        save_file({name: tensor.detach().to(dtype).cpu().contiguous() for name, tensor in self.state_dict().items()}, path, metadata)

    def check_fits(self, model: Any) -> None:
        """Refuse a model that these heads were not trained for.

        Raises:
            UnsupportedModel: the model has another hidden size, vocabulary, embedding size or LM head, or another weight in any layer.
        """
        have = TrainedFor.of(model)
        wanted = self.trained_for or have
        if self.options["hidden_size"] != have.hidden_size:
            what = f"a hidden size of {self.options['hidden_size']}, and this one's is {have.hidden_size}"
        elif wanted.vocabulary != have.vocabulary:
            what = f"a vocabulary of {wanted.vocabulary} tokens, and this one's has {have.vocabulary}"
        elif wanted.embedding_size != have.embedding_size:
            what = f"embeddings of width {wanted.embedding_size}, and this one's have {have.embedding_size}"
        elif wanted.other_head(have):
            what = "another LM head: the sizes agree, the weights do not"
        elif (name := wanted.other_weight(have)) is not None:
            what = f"the same LM head, but another {name}"
        else:
            return
        raise UnsupportedModel(
            f"these {self.kind} heads were trained for a {wanted.model_type} model with {what}. Train heads for this model: "
            f"patchkit train-heads MODEL --kind {self.kind} --text FILE"
        )

    def outdated(self, model: Any, adapters: bool) -> str | None:
        """Return why drafts are worse since the weights of ``model``, or its ``adapters``, have changed; None if they are not.

        Changes as small as the rounding error of bfloat16 do not count.
        """
        if self.trained_for is None:
            return None
        try:
            self.check_fits(model)
        except UnsupportedModel:
            adapters = True
        if not adapters:
            return None
        return (
            f"the {self.kind} heads were trained for other weights than the model has now, so fewer drafts may be accepted: "
            "train them again (patchkit train-heads)"
        )
