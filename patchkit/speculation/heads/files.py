"""Loading of heads from their files."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from patchkit.errors import PatchError
from patchkit.speculation.heads.base import FORMAT, Heads
from patchkit.speculation.heads.eagle import EagleHead
from patchkit.speculation.heads.medusa import MedusaHeads
from patchkit.trained_for import TrainedFor

_KINDS: dict[str, type[Heads]] = {cls.kind: cls for cls in (MedusaHeads, EagleHead)}


def load_heads(path: str | Path, kind: str | None = None, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """Load heads from a file that `Heads.save` wrote, frozen and in evaluation mode.

    Args:
        path: the file, or "bundled" for the ones of ``kind`` that ship for stdlib-7m.
        kind: "medusa" or "eagle", the required kind; None accepts both.
        device: of the loaded heads.
        dtype: of the loaded heads.

    Raises:
        PatchError: no such file, not a file of heads, or heads of another kind.
    """
    if str(path) == "bundled":
        from patchkit.models import bundled_path

        path = bundled_path() / f"{kind}_heads.safetensors"
    path = Path(path).expanduser()
    if not path.is_file():
        raise PatchError(f"there is no file of draft heads at {path}: train them with patchkit train-heads, or give 'bundled'")
    state = path.stat()  # the clock of a file system may be too coarse to tell two writes apart
    return _loaded(path, (state.st_mtime_ns, state.st_size), kind, torch.device(device), dtype)


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, state: tuple[int, int], kind: str | None, device: torch.device, dtype: torch.dtype) -> Heads:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    except SafetensorError as error:
        raise PatchError(f"{path} cannot be read as safetensors ({error}): train the heads again") from error
    if metadata.get("format") != FORMAT:
        raise PatchError(f"{path} holds no draft heads of patchkit: give a file that patchkit train-heads wrote")
    if kind is not None and metadata["kind"] != kind:
        raise PatchError(f"{path} holds {metadata['kind']} heads, not {kind} heads: give them to the drafter of that name")
    heads = _KINDS[metadata["kind"]](**json.loads(metadata["options"]))
    heads.load_state_dict(tensors)
    heads.trained_for = TrainedFor(**json.loads(metadata["trained_for"]))
    heads.trained_for.warn_if_partial(f"the file of draft heads {path}")
    return heads.to(device, dtype).eval().requires_grad_(False)


_Heads = TypeVar("_Heads", bound=Heads)


def heads_for(model: Any, heads: str | Path | Heads, cls: type[_Heads]) -> _Heads:
    """Return heads of one kind, from a file or as given, on the device and in the dtype of the model's LM head.

    Raises:
        PatchError: there is no such file, it is not a file of heads, or the heads are of another kind.
    """
    weight = model.get_output_embeddings().weight
    if isinstance(heads, str | Path):
        heads = load_heads(heads, cls.kind, weight.device, weight.dtype)
    if not isinstance(heads, cls):
        raise PatchError(f"these are {getattr(heads, 'kind', type(heads).__name__)} heads, not {cls.kind} heads: give a {cls.__name__}")
    first = next(heads.parameters())
    if (first.device, first.dtype) != (weight.device, weight.dtype):
        heads = copy.deepcopy(heads).to(weight.device, weight.dtype)
    return heads
