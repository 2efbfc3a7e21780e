"""The file of a `SuffixStore`: safetensors with all tokens, and in its metadata the model that wrote them."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from patchkit.errors import PatchError
from patchkit.speculation.suffix_store import SuffixStore

_FORMAT = "patchkit suffix 1"


@dataclass(frozen=True)
class SuffixFile:
    """A path, and what may be there."""

    path: str

    def read(self, model: Any, max_tokens: int) -> SuffixStore:
        """The store in the file; an empty one where there is none yet. Of a file over the bound, the latest sequences are kept.

        Raises:
            PatchError: the path cannot be such a file, or a model with another vocabulary wrote it.
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
        writer, reader = metadata.get("model"), _model(model)
        if writer != reader:
            raise PatchError(f"suffix(scope={self.path!r}) holds token ids of {writer}, and this model is {reader}: give each its own file")
        damage = _damage(tokens, lengths, _vocabulary(model))
        if damage is not None:
            raise PatchError(f"suffix(scope={self.path!r}) is damaged: {damage}. Delete the file")
        # Of what would be dropped again nothing is added. Each sequence takes one token more.
        first = int(np.argmax(np.cumsum((lengths + 1)[::-1])[::-1] <= max(max_tokens, lengths[-1] + 1))) if len(lengths) else 0
        for sequence in np.split(tokens, np.cumsum(lengths)[:-1])[first:] if len(lengths) else []:
            store.add(sequence)
        return store

    def write(self, store: SuffixStore, model: Any) -> None:
        """Replace the file as a whole, so that another process never sees a part of it; the last process to write wins."""
        sequences = store.by_use()  # so that the next process drops the right ones
        tensors = {
            "tokens": np.concatenate([np.zeros(0, np.int32), *sequences]),
            "lengths": np.array([len(each) for each in sequences], np.int64),
        }
        path = Path(self.path)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            save_file(tensors, unfinished, metadata={"format": _FORMAT, "model": _model(model)})
            os.replace(unfinished, path)


def _damage(tokens: np.ndarray, lengths: np.ndarray, vocabulary: int) -> str | None:
    """Why these cannot be the tokens and lengths that `SuffixFile.write` wrote; None if they can."""
    if tokens.ndim != 1 or tokens.dtype != np.int32 or lengths.ndim != 1 or lengths.dtype != np.int64:
        return "its tensors have other shapes or dtypes"
    if (len(lengths) and lengths.min() < 0) or lengths.sum() != len(tokens):
        return "its lengths do not add up"
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocabulary:
        return f"it has tokens that are not among the {vocabulary} of this model"
    return None


def _vocabulary(model: Any) -> int:
    return int(model.config.get_text_config().vocab_size)


def _model(model: Any) -> str:
    """The class of a model and the size of its vocabulary."""
    return f"{type(model).__name__} with {_vocabulary(model)} tokens"
