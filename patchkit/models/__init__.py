"""Models by name: the ones that ship with patchkit, a directory, or a hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from patchkit.errors import PatchError

DEFAULT = "stdlib-7m"
BUNDLED = (DEFAULT, "stdlib-1m-draft")

_HUB_TIMEOUT_S = 5.0
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


class ModelUnavailable(PatchError):
    """A model cannot be had: unknown name, broken directory, no network; the message names the cause and the remedy."""


def bundled_path(name: str = DEFAULT) -> Path:
    """The directory of a model that ships with patchkit; `"bundled"` is the default one.

    Raises:
        ModelUnavailable: there is no bundled model of this name, or its files are missing from this installation.
    """
    name = DEFAULT if name == "bundled" else name
    if name not in BUNDLED:
        raise ModelUnavailable(f"no bundled model is called {name!r}: use one of {', '.join(BUNDLED)}")
    path = Path(__file__).parent / name
    if not path.is_dir():
        raise ModelUnavailable(f"the files of {name} are missing from this installation of patchkit: install it again")
    return path


def load_model(name_or_path: str | Path, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in evaluation mode on the CPU, and its tokenizer.

    Args:
        name_or_path: `"bundled"`, `"stdlib-7m"`, `"stdlib-1m-draft"`, a directory with a saved model, or a hub id. The bundled
            names and directories are never looked up on the hub. A hub model that is already in the local cache needs no network.
        dtype: of the weights.

    Raises:
        ModelUnavailable: nothing of this name, not a causal LM, broken or incomplete files, or no network for a hub id.
    """
    name = str(name_or_path)
    if not name:
        raise ModelUnavailable("the model's name is empty: give 'bundled', a model directory or a hub id")
    if name == "bundled" or name in BUNDLED:
        source, local_only = bundled_path(name), True
    elif _looks_like_a_path(name):
        source, local_only = Path(name).expanduser(), True
    else:
        return _load(name, name, dtype, local_only=_hub_is_out_of_reach(name))
    _check_directory(source)
    return _load(str(source), name, dtype, local_only)


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name"; what exists here wins over it, as in transformers.
    return Path(name).expanduser().exists() or name.startswith((".", "~", os.sep)) or os.path.isabs(name) or name.count("/") > 1


def _check_directory(path: Path) -> None:
    """Refuse a directory whose model cannot load, before transformers meets it with a traceback of its own."""
    if not path.exists():
        raise ModelUnavailable(f"no such model directory: {path}. Give a directory written by save_pretrained, a hub id, or 'bundled'")
    if not path.is_dir():
        raise ModelUnavailable(f"{path} is a file: give the directory that holds config.json and the weights")
    config = path / "config.json"
    if not config.is_file():
        raise ModelUnavailable(f"{path} has no config.json: give a directory written by model.save_pretrained")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{config} cannot be read as JSON ({error}): save the model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelUnavailable(f"{config} names no model_type: save the model again with model.save_pretrained")
    if not any(file.is_file() for pattern in _WEIGHTS for file in path.glob(pattern)):
        raise ModelUnavailable(f"{path} holds no weights (*.safetensors or *.bin): save the model again, or copy the missing files")


def _hub_is_out_of_reach(repo: str) -> bool:
    """Ask the hub for the model's config once, with a short timeout, because transformers would retry for minutes.

    Raises:
        ModelUnavailable: the hub answered, and it has no such model for this user.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HFValidationError, RepositoryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(repo, "config.json"), timeout=_HUB_TIMEOUT_S)
    except HFValidationError as error:
        raise ModelUnavailable(f"{repo!r} is neither a directory nor a valid hub id: {_first_line(error)}") from error
    except GatedRepoError as error:
        raise ModelUnavailable(f"{repo!r} is gated on the hub: accept its terms there and run `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"{repo!r} is neither a directory here nor a model on the hub: check the spelling, or run `hf auth login` if it is private"
        ) from error
    except EntryNotFoundError as error:
        raise ModelUnavailable(f"{repo!r} on the hub has no config.json: it is not a transformers model") from error
    except Exception:
        # Name resolution, proxy, TLS, timeout, a 5xx answer: the HTTP client's own types, which change between hub versions.
        return True
    return False


def _load(source: str, name: str, dtype: torch.dtype, local_only: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from huggingface_hub import try_to_load_from_cache

    if local_only and not Path(source).is_dir() and not isinstance(try_to_load_from_cache(source, "config.json"), str):
        raise ModelUnavailable(
            f"{name!r} is no directory here, is not in the local cache, and the hub cannot be reached: "
            "connect to the network (or unset HF_HUB_OFFLINE), or give a model directory or 'bundled'"
        )
    # Foreign files can make transformers raise nearly anything; to the user each of it means that this model cannot be loaded.
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=local_only)
    except Exception as error:
        raise ModelUnavailable(f"the config of {name} cannot be used ({_first_line(error)}): save or download the model again") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnavailable(
            f"{name} is a {config.model_type!r} model, which is not a causal language model: give one that generates text"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, local_files_only=local_only, output_loading_info=True
        )
    except Exception as error:
        raise ModelUnavailable(
            f"the weights of {name} cannot be loaded ({_first_line(error)}): save or download the model again"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelUnavailable(
            f"the weights of {name} are incomplete: {len(missing)} tensors are missing, {missing[0]} among them. "
            "Save or download the model again"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only)
    except Exception as error:
        raise ModelUnavailable(f"{name} has no usable tokenizer ({_first_line(error)}): save one beside the weights") from error
    return model.eval(), tokenizer


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
