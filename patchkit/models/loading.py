"""Loading of models and tokenizers that `patchkit.models.find` has found, with transformers."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
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

import patchkit.models.converted as converted
import patchkit.models.gguf as gguf
from patchkit import _compat
from patchkit.models.names import ModelSource, ModelUnavailable, find, first_line

_HUB_TIMEOUT_S = 5.0


def load(source: ModelSource, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM in evaluation mode, and its tokenizer.

    Raises:
        ModelUnavailable: broken or incomplete files, not a causal LM, or no network for a hub id.
        ValueError: ``dtype`` is no floating-point dtype.
    """
    if dtype != "auto":
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"dtype={dtype!r}: give a floating-point dtype of torch, its name such as 'bfloat16', or 'auto'")
        dtype = found
    if source.adapter:
        return _load_adapted(source, dtype)
    if source.keep:
        file = Path(source.place) / str(source.gguf)
        kept = converted.keep(file, functools.partial(_write, source))
        if kept is not None:
            return _load(str(kept), source.name, dtype, local_only=True)
    if source.gguf is not None:
        return _load_gguf(source, dtype)
    return _load(source.place, source.name, dtype, local_only=source.is_local or _hub_is_out_of_reach(source.place))


def _load_adapted(source: ModelSource, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model of one of PEFT's adapters, with the adapter merged into its weights."""
    try:
        from peft import PeftConfig, PeftModel
    except ImportError as error:
        raise ModelUnavailable(f"{source.name} holds an adapter, which needs PEFT: pip install peft") from error
    folder = Path(source.place)
    # A broken file can make PEFT raise nearly anything; to the user each of it means that this adapter cannot be loaded.
    try:
        config = PeftConfig.from_pretrained(source.place)
    except Exception as error:
        raise ModelUnavailable(f"the adapter_config.json of {source.name} cannot be used ({first_line(error)}): save it again") from error
    base = str(config.base_model_name_or_path or "")
    if not base:
        raise ModelUnavailable(f"the adapter {source.name} does not name its base model: write base_model_name_or_path into its config")
    if config.is_prompt_learning:
        raise ModelUnavailable(
            f"{source.name} is tuned by {config.peft_type.value}, which adds no weights but a prompt, and cannot be merged: load it in "
            "Python with peft.PeftModel, and patch that"
        )
    nearby = folder / base
    model, tokenizer = load(find(nearby if nearby.is_dir() else base), dtype)
    try:
        adapted: Any = PeftModel.from_pretrained(model, source.place)
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise ModelUnavailable(f"the adapter {source.name} does not go with its base model {base} ({first_line(error)})") from error
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(source.place, local_files_only=True)
    return merged.eval(), tokenizer


def tokenizer_of(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load a tokenizer without the model's weights, except that of an adapter's base model."""
    if source.gguf is not None:
        return _tokenizer(str(directory_of(source)), source.name, local_files_only=True)
    if source.adapter and not (Path(source.place) / "tokenizer_config.json").is_file():
        return load(source, "auto")[1]  # the base model's, which only loading finds
    local_only = source.is_local or _hub_is_out_of_reach(source.place)
    _refuse_unreachable(source.place, source.name, local_only)
    return _tokenizer(source.place, source.name, local_files_only=local_only)


@functools.lru_cache(maxsize=1)
def directory_of(source: ModelSource) -> Path:
    """The directory with the converted copy of a GGUF model: the one that is kept, or where none can be, one for this process.

    Raises:
        ModelUnavailable: it can be written nowhere.
    """
    kept = converted.keep(Path(source.place) / str(source.gguf), functools.partial(_write, source))
    if kept is not None:
        return kept
    try:
        folder = Path(tempfile.mkdtemp(prefix="patchkit-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _write(source, folder)
    except converted.WRITE_ERRORS as error:
        raise ModelUnavailable(
            f"the converted copy of {source.name} can be written neither under the cache folder nor under {tempfile.gettempdir()} "
            f"({error}): set XDG_CACHE_HOME to a folder with room for it"
        ) from error
    return folder


def _write(source: ModelSource, folder: Path) -> None:
    for part in _load_gguf(source, torch.float32):
        part.save_pretrained(folder)


def _load_gguf(source: ModelSource, dtype: torch.dtype | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    facts = gguf.read(Path(source.place) / str(source.gguf), source.name)
    wanted = torch.float32 if dtype == "auto" else dtype
    model, tokenizer = _load(source.place, source.name, wanted, local_only=True, gguf_file=source.gguf, **_compat.gguf_options())
    gguf.make_dense(model, facts)
    gguf.mend_tokenizer(tokenizer, model, facts)
    return model, tokenizer


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
        raise ModelUnavailable(f"{repo!r} is neither a directory nor a valid hub id: {first_line(error)}") from error
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


def _refuse_unreachable(place: str, name: str, local_only: bool) -> None:
    """Refuse a hub id that is not in the cache where the hub cannot be asked."""
    from huggingface_hub import try_to_load_from_cache

    if local_only and not Path(place).is_dir() and not isinstance(try_to_load_from_cache(place, "config.json"), str):
        raise ModelUnavailable(
            f"{name!r} is no directory here, is not in the local cache, and the hub cannot be reached: "
            "connect to the network (or unset HF_HUB_OFFLINE), or give a model directory or 'bundled'"
        )


def _load(
    place: str, name: str, dtype: torch.dtype | str, local_only: bool, gguf_file: str | None = None, **options: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    _refuse_unreachable(place, name, local_only)
    where: dict[str, Any] = {"local_files_only": local_only} | ({} if gguf_file is None else {"gguf_file": gguf_file})
    again = "save or download the model again"
    # Foreign files can make transformers raise nearly anything; for the user, each error means that this model cannot be loaded.
    try:
        config = AutoConfig.from_pretrained(place, **where)
    except Exception as error:
        raise ModelUnavailable(f"the config of {name} cannot be used ({first_line(error)}): {again}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelUnavailable(
            f"{name} is a {config.model_type!r} model, which is not a causal language model: give one that generates text"
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, config=config, dtype=dtype, output_loading_info=True, **where, **_compat.quantised_options(config), **options
        )
    except Exception as error:
        remedy = _compat.remedy_for(config) or again
        raise ModelUnavailable(f"the weights of {name} cannot be loaded ({first_line(error)}): {remedy}") from error
    model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelUnavailable(
            f"the weights of {name} are incomplete: {len(missing)} tensors are missing, {missing[0]} among them. "
            "Save or download the model again"
        )
    return model.eval(), _tokenizer(place, name, **where)


def _tokenizer(place: str, name: str, **where: Any) -> PreTrainedTokenizerBase:
    # Foreign files can raise nearly anything here, too.
    try:
        return AutoTokenizer.from_pretrained(place, **where)
    except Exception as error:
        raise ModelUnavailable(f"{name} has no usable tokenizer ({first_line(error)}): save one next to the weights") from error
