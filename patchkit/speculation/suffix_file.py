"""The file of a `SuffixStore`: safetensors with all tokens, and in its metadata the model that wrote them.

A model is known by its class, its vocabulary size and samples of its weights (`TrainedFor`).
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from patchkit.errors import PatchError, UnsupportedModel
from patchkit.speculation.suffix_store import SuffixStore
from patchkit.trained_for import TrainedFor

_FORMAT = "patchkit suffix 1"

_logger = logging.getLogger("patchkit")


@dataclass(frozen=True)
class Writer:
    """The model whose sequences a file holds.

    Attributes:
        name: its class.
        vocabulary: size of its vocabulary.
        weights: None of a model without an LM head of one matrix.
    """

    name: str
    vocabulary: int
    weights: TrainedFor | None

    @property
    def label(self) -> str:
        """The class and the size of the vocabulary."""
        return f"{self.name} with {self.vocabulary} tokens"

    @classmethod
    def of(cls, model: Any) -> Writer:
        """Identify ``model``, as it is while no patch has changed its weights."""
        try:
            weights = TrainedFor.of(model)
        except UnsupportedModel:
            weights = None
        return cls(type(model).__name__, int(model.config.get_text_config().vocab_size), weights)

    def metadata(self) -> dict[str, str]:
        """Metadata of a safetensors file of this model."""
        weights = {} if self.weights is None else {"trained_for": json.dumps(asdict(self.weights))}
        return {"format": _FORMAT, "model": self.label, **weights}


@dataclass(frozen=True)
class SuffixFile:
    """A path, and what may be there."""

    path: str

    def read(self, reader: Writer, max_tokens: int) -> SuffixStore:
        """The store in the file; an empty one where there is none yet. Of a file over the bound, the latest sequences are kept.

        Raises:
            PatchError: the path cannot be such a file, or a model with another vocabulary or other weights wrote it.
        """
        store, path = SuffixStore(max_tokens), Path(self.path)
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise PatchError(f"suffix(scope={self.path!r}): {path.parent} is not a folder that can be written to: give another path")
        if not path.exists():
            return store
        if not path.is_file():
            raise PatchError(
                f"suffix(scope={self.path!r}) is a folder: give the path of a file in it, such as {path / 'suffixes.safetensors'}"
            )
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise PatchError(f"suffix(scope={self.path!r}) is not a file that suffix drafting wrote: give another path")
                tokens, lengths = file.get_tensor("tokens"), file.get_tensor("lengths")
        except (OSError, SafetensorError) as error:
            raise PatchError(f"suffix(scope={self.path!r}) cannot be read ({error}): give another path, or delete the file") from error
        self._check_writer(metadata, reader)
        damage = _damage(tokens, lengths, reader.vocabulary)
        if damage is not None:
            raise PatchError(f"suffix(scope={self.path!r}) is damaged: {damage}. Delete the file")
        # Of what would be dropped again nothing is added. Each sequence takes one token more.
        first = int(np.argmax(np.cumsum((lengths + 1)[::-1])[::-1] <= max(max_tokens, lengths[-1] + 1))) if len(lengths) else 0
        for sequence in np.split(tokens, np.cumsum(lengths)[:-1])[first:] if len(lengths) else []:
            store.add(sequence)
        store.unwritten = 0
        return store

    def write(self, store: SuffixStore, writer: Writer) -> None:
        """Replace the file as a whole, so that another process never sees a part of it; the last process to write wins."""
        sequences = store.by_use()  # so that the next process drops the right ones
        tensors = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *sequences]),
            "lengths": np.array([len(each) for each in sequences], np.int64),
        }
        path = Path(self.path)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            save_file(tensors, unfinished, metadata=writer.metadata())
            os.replace(unfinished, path)
        store.unwritten = 0

    def _check_writer(self, metadata: dict[str, str], reader: Writer) -> None:
        """Raise a `PatchError` if another model than ``reader`` wrote the file."""
        label, scope = metadata.get("model"), f"suffix(scope={self.path!r})"
        if label != reader.label:
            raise PatchError(f"{scope} holds token ids of {label}, and this model is {reader.label}: give each its own file")
        try:
            weights = TrainedFor(**json.loads(metadata["trained_for"])) if "trained_for" in metadata else None
        except (TypeError, ValueError) as error:
            raise PatchError(f"{scope} is damaged: its model cannot be read ({error}). Delete the file") from error
        if weights is None or reader.weights is None:
            if reader.weights is not None:
                _logger.warning(
                    "patchkit: %s is of an older format, and knows its model by class and vocabulary alone: sequences of another "
                    "fine-tuning are not told apart. The next call of generate records samples of all weights",
                    scope,
                )
            return
        other = "LM head" if weights.other_head(reader.weights) else weights.other_weight(reader.weights)
        if other is not None:
            raise PatchError(
                f"{scope} holds sequences of a {label} with another {other}, such as before fine-tuning: give each its own file, "
                "or delete it"
            )


def _damage(tokens: np.ndarray, lengths: np.ndarray, vocabulary: int) -> str | None:
    """Why these cannot be the tokens and lengths that `SuffixFile.write` wrote; None if they can."""
    if tokens.ndim != 1 or tokens.dtype != np.int32 or lengths.ndim != 1 or lengths.dtype != np.int64:
        return "its tensors have other shapes or dtypes"
    if (len(lengths) and lengths.min() < 0) or lengths.sum() != len(tokens):
        return "its lengths do not add up"
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        return f"it has tokens that are not among the {vocabulary} of this model"
    return None
