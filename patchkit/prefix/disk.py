"""Kept blocks as files, which outlive a process and are shared by several: one safetensors file for each block.

A folder for each namespace, for its owner only. A file is named by the hash of its namespace and token ids, and holds the token ids, which
are compared, and a checksum. It is written under another name and then renamed. No pickle is read, so a file can hold nothing but tensors
and the JSON of `patchkit.prefix.written_state`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from patchkit.prefix.snapshot import FrozenBlock
from patchkit.prefix.written_state import CannotWrite, WrittenState, read_into, written
from patchkit.record import Warnings

_SUFFIX, _UNFINISHED = ".safetensors", ".part"
_ABANDONED_AFTER_S = 3600.0

# What damaged bytes lead to when they are read.
_DAMAGE = (SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError)


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

    def read(self, path: Path, tokens: bytes, empty: Callable[[], Any]) -> FrozenBlock | None:
        """Return the block in a file; None if there is none.

        Args:
            tokens: the ids from the first token on, which must be those in the file.
            empty: makes an empty state, into which one that is in the file is read.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            self.warnings.add(f"prefix_cache cannot read {self.folder}: {error.strerror}")
            return None
        found = _decoded(data, tokens, empty)
        if found is None:
            self.warnings.add(f"prefix_cache found damaged files in {self.folder}, which count as a miss")
            with contextlib.suppress(OSError):  # so that it is written again
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # another process may have removed it
            os.utime(path)
        self.hits["disk reads"] += 1
        return found

    def write(self, path: Path, tokens: bytes, block: FrozenBlock, replace: bool) -> None:
        """Write a block to a file.

        Args:
            tokens: the ids from the first token on.
            replace: also if there is one.
        """
        try:
            if path.exists() and not replace:
                return
            data = _encoded(tokens, block)
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
        except CannotWrite as reason:
            self.warnings.add(f"prefix_cache keeps states in memory only where they hold {reason}")

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

    def of(self, blocks: Sequence[bytes]) -> DiskPrompt:
        """The files of one prompt, whose token ids are in ``blocks``."""
        hashed, paths = hashlib.sha256(self.name.encode()), list[Path]()
        for block in blocks:
            hashed.update(block)
            paths.append(self.tier.folder / self.name[:32] / f"{hashed.hexdigest()}{_SUFFIX}")
        return DiskPrompt(self.tier, blocks, paths)


@dataclass(frozen=True)
class DiskPrompt:
    """The files of one prompt. Blocks are counted from 1."""

    tier: DiskTier
    blocks: Sequence[bytes]
    paths: Sequence[Path]

    def read(self, number: int, empty: Callable[[], Any]) -> FrozenBlock | None:
        """Return what is kept of a block; None if it is not. ``empty`` makes an empty state."""
        return self.tier.read(self.paths[number - 1], b"".join(self.blocks[:number]), empty)

    def write(self, number: int, block: FrozenBlock, replace: bool) -> None:
        """Write what is kept of a block; ``replace``: also if there is a file of it."""
        self.tier.write(self.paths[number - 1], b"".join(self.blocks[:number]), block, replace)


def _encoded(tokens: bytes, block: FrozenBlock) -> bytes:
    tensors = {"tokens": torch.frombuffer(bytearray(tokens), dtype=torch.int64)}
    for index, (keys, values) in block.slices.items():
        tensors[f"{index}.keys"], tensors[f"{index}.values"] = keys.cpu().contiguous(), values.cpu().contiguous()
        tensors[f"{index}.device"] = torch.tensor(list(str(keys.device).encode()), dtype=torch.uint8)
    if block.hidden is not None:
        tensors["hidden"] = block.hidden.cpu().contiguous()
        tensors["hidden.device"] = torch.tensor(list(str(block.hidden.device).encode()), dtype=torch.uint8)
    text = ""
    if block.state is not None:
        state = written(block.state)
        text = state.text
        tensors |= {f"state.{number}": tensor for number, tensor in enumerate(state.tensors)}
    return save(tensors, {"sha256": _checksum(tensors, text), "state": text})


def _decoded(data: bytes, tokens: bytes, empty: Callable[[], Any]) -> FrozenBlock | None:
    """The block in the bytes of a file; None if the file is damaged, or of other token ids."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        tensors, text = load(data), header["state"]
        if header["sha256"] != _checksum(tensors, text) or _bytes_of(tensors["tokens"]) != tokens:
            return None
    except _DAMAGE:
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
    block = FrozenBlock(slices, None, hidden)
    if not text:
        return block
    state = WrittenState(text, [tensors[f"state.{number}"] for number in range(sum(name.startswith("state.") for name in tensors))])
    try:
        return dataclasses.replace(block, state=read_into(empty(), state))
    except _DAMAGE:  # of another version of a cache class
        return None


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> str:
    found = hashlib.sha256(text.encode())
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
