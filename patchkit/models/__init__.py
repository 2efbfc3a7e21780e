"""Models by name: those that ship with patchkit, `smollm2`, a directory, a GGUF file, or a hub id.

Importing this loads neither torch nor transformers, so that a wrong name is an error within a moment (`find`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from patchkit.models.names import BUNDLED as BUNDLED
from patchkit.models.names import DEFAULT as DEFAULT
from patchkit.models.names import SMOLLM2 as SMOLLM2
from patchkit.models.names import SMOLLM2_COMMAND as SMOLLM2_COMMAND
from patchkit.models.names import ModelSource as ModelSource
from patchkit.models.names import ModelUnavailable as ModelUnavailable
from patchkit.models.names import find as find
from patchkit.models.names import shipped
from patchkit.models.names import smollm2_gguf as smollm2_gguf

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def bundled_path(name: str = DEFAULT) -> Path:
    """Directory of a model of `BUNDLED`; `"bundled"` is the default one. That of smollm2 is created by the first call.

    Raises:
        ModelUnavailable: there is no model of this name, its files are missing from this installation, or smollm2 cannot be converted.
    """
    name = DEFAULT if name == "bundled" else name
    if name not in BUNDLED:
        raise ModelUnavailable(f"no bundled model is called {name!r}: use one of {', '.join(BUNDLED)}")
    if name == SMOLLM2:
        from patchkit.models.loading import directory_of

        return directory_of(find(name))
    return shipped(name)


def load_model(name_or_path: str | Path, dtype: torch.dtype | str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in evaluation mode on the CPU, and its tokenizer.

    Args:
        name_or_path: `"bundled"`, `"stdlib-7m"`, `"stdlib-1m-draft"`, `"smollm2"`, a directory with a saved model or with one GGUF
            file, a GGUF file, or a hub id. The first four and directories are never looked up on the hub. A hub model that is already
            in the local cache needs no network. A GGUF file becomes an ordinary dense model. A directory with one of PEFT's
            adapters becomes its base model with the adapter merged into the weights.
        dtype: of the weights: a torch dtype, its name, or "auto" for the one that the checkpoint was saved in (float32 for a GGUF file).

    Raises:
        ModelUnavailable: nothing of this name, not a causal LM, broken or incomplete files, or no network for a hub id.
    """
    source = find(name_or_path)
    from patchkit.models.loading import load

    return load(source, dtype)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that `load_model` accepts, without its weights.

    Raises:
        ModelUnavailable: nothing of this name, no usable tokenizer, or no network for a hub id.
    """
    source = find(name_or_path)
    from patchkit.models.loading import tokenizer_of

    return tokenizer_of(source)
