"""Kept blocks as files, which outlive a process and are shared by several: one safetensors file for each block.

A folder for each namespace, for its owner only. A file is named by the hash of its namespace and token ids, and holds the token ids, which
are compared, and a checksum. It is written under another name and then renamed. No pickle is read, so a file can hold nothing but tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from patchkit.prefix.snapshot import FrozenBlock
from patchkit.record import Warnings

_SUFFIX, _UNFINISHED = ".safetensors", ".part"
_ABANDONED_AFTER_S = 3600.0


class DiskTier:
    """A folder of kept blocks, with a bound of its own.

    What fails is a miss: a file that is damaged, a folder that cannot be written. The reason is said once.

    Args:
        folder: made when the first block is written.
        max_bytes: the bound of all files; the one that was used longest ago goes first.
        hits: counters that it keeps: "disk reads" and "disk writes".
    """

    def __init__(self, folder: str, max_bytes: int, hits: Counter[str], warnings: Warnings) -> None:
        self.folder, self.max_bytes, self.hits, self.warnings = Path(folder), max_bytes, hits, warnings

    def read(self, space: str, blocks: Sequence[bytes]) -> FrozenBlock | None:
        """Return what is kept of the last of ``blocks``; None if it is not.

        Args:
            space: the namespace, as text.
            blocks: token ids of all blocks from the first token on.
        """
        path = self._path(space, blocks)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warnings.add(f"prefix_cache cannot read {self.folder}: {error.strerror}")
            return None
        found = _decoded(data, blocks)
        if found is None:
            self.warnings.add(f"prefix_cache found damaged files in {self.folder}, which count as a miss")
            return None
        with contextlib.suppress(OSError):  # another process may have removed it
            os.utime(path)
        self.hits["disk reads"] += 1
        return found

    def write(self, space: str, blocks: Sequence[bytes], value: FrozenBlock) -> None:
        """Write what is kept of the last of ``blocks``, unless there is a file of it."""
        path = self._path(space, blocks)
        try:
            if path.exists():
                return
            data = _encoded(blocks, value)
            if not self._room(len(data)):
                return
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=path.parent, suffix=_UNFINISHED)
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(data)
                os.replace(name, path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
            self.hits["disk writes"] += 1
        except OSError as error:
            self.warnings.add(f"prefix_cache keeps prompts in memory only: {self.folder} cannot be written ({error.strerror})")

    def _path(self, space: str, blocks: Sequence[bytes]) -> Path:
        name = hashlib.sha256(space.encode() + b"".join(blocks)).hexdigest()
        return self.folder / space[:32] / f"{name}{_SUFFIX}"

    def _room(self, size: int) -> bool:
        """Remove the files that were used longest ago until ``size`` more bytes fit. Returns whether they do."""
        if size > self.max_bytes:
            return False
        for path in self.folder.glob(f"*/*{_UNFINISHED}"):  # of processes that were killed
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()
        files = []
        for path in self.folder.glob(f"*/*{_SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                files.append((state.st_mtime_ns, state.st_size, path))
        total = sum(each[1] for each in files)
        for _, of_file, path in sorted(files):
            if total + size <= self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= of_file
        return True


@dataclass(frozen=True)
class DiskSpace:
    """One namespace of a `DiskTier`: ``name`` is a hash of everything that the bits of its blocks depend on, besides the token ids."""

    tier: DiskTier
    name: str

    def read(self, blocks: Sequence[bytes]) -> FrozenBlock | None:
        """Return what is kept of the last of ``blocks``; None if it is not."""
        return self.tier.read(self.name, blocks)

    def write(self, blocks: Sequence[bytes], value: FrozenBlock) -> None:
        """Write what is kept of the last of ``blocks``, unless there is a file of it."""
        self.tier.write(self.name, blocks, value)


def _encoded(blocks: Sequence[bytes], value: FrozenBlock) -> bytes:
    tensors = {"tokens": torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.int64)}
    for index, (keys, values) in value.slices.items():
        tensors[f"{index}.keys"], tensors[f"{index}.values"] = keys.cpu().contiguous(), values.cpu().contiguous()
        tensors[f"{index}.device"] = torch.tensor(list(str(keys.device).encode()), dtype=torch.uint8)
    if value.hidden is not None:
        tensors["hidden"] = value.hidden.cpu().contiguous()
        tensors["hidden.device"] = torch.tensor(list(str(value.hidden.device).encode()), dtype=torch.uint8)
    return save(tensors, {"sha256": _checksum(tensors)})


def _decoded(data: bytes, blocks: Sequence[bytes]) -> FrozenBlock | None:
    """The block in the bytes of a file; None if the file is damaged, or of other token ids."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors = load(data)
        if header["__metadata__"]["sha256"] != _checksum(tensors) or _bytes_of(tensors["tokens"]) != b"".join(blocks):
            return None
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError):  # what damaged bytes lead to
        return None
    # With the right checksum it is a file that this class wrote: an error from here on (no memory on the device) is not damage.
    devices = {name: bytes(each.tolist()).decode() for name, each in tensors.items() if name.endswith("device")}
    slices = {
        int(name.removesuffix(".keys")): (
            each.to(devices[name.replace("keys", "device")]),
            tensors[name.replace("keys", "values")].to(devices[name.replace("keys", "device")]),
        )
        for name, each in tensors.items()
        if name.endswith(".keys")
    }
    hidden = tensors["hidden"].to(devices["hidden.device"]) if "hidden" in tensors else None
    return FrozenBlock(slices, None, hidden)


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(_bytes_of(tensor))
    return found.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights_hash(tensors: Sequence[torch.Tensor]) -> str:
    """SHA-256 of all values of some tensors, in their order: what names weights in every process."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        if tensor.numel():
            found.update(_bytes_of(tensor))
    return found.hexdigest()
