"""Copies of models that were converted from another format, kept under the user's cache folder.

A copy is a directory that `save_pretrained` wrote, with a list of what it was made from and of its own files, each with its SHA-256. It
is used only if all of that is still so; else it is made anew. It comes into being by one rename, so nobody meets half of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from patchkit.kernels.native import cache_folder

_logger = logging.getLogger("patchkit")

# To be raised when what is written changes: copies of other numbers are made anew.
FORMAT = 1
# What writing a model raises where the disk is full or the folder read-only; safetensors has an error of its own.
WRITE_ERRORS = (OSError, SafetensorError)

_LIST = "patchkit.json"
_UNFINISHED = ".unfinished-"
_ABANDONED_AFTER_S = 24 * 3600.0


def keep(file: Path, write: Callable[[Path], None]) -> Path | None:
    """The directory with the copy that was made from ``file``, made now if there is none or if it is not what it was.

    Several processes may call this at once: each makes what it misses, and the first to be done is what all use.

    Args:
        file: what the copy is made from.
        write: writes the copy into the empty directory that it is given.

    Returns:
        None if nothing can be kept: no cache folder, not writable, or full. A line in the log says so.
    """
    try:
        folder = cache_folder() / "models"
    except RuntimeError:  # there is no home folder
        return None
    made_from = _sha256(file)
    copy = folder / file.stem
    if is_intact(copy, made_from):
        return copy
    made: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        made = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
        _logger.info("patchkit: converting %s, once", file.name)
        write(made)
        _seal(made, made_from)
        _move(made, copy, made_from)
    except WRITE_ERRORS as error:
        _logger.warning(
            "patchkit: no converted copy of %s can be kept in %s (%s): it is converted at every start", file.name, folder, error
        )
        return None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
    return copy


def is_intact(copy: Path, made_from: str) -> bool:
    """Whether ``copy`` was made from a file of this SHA-256, by this version of the format, and all its files are as they were."""
    try:
        listed = json.loads((copy / _LIST).read_text(encoding="utf-8"))
        return (
            listed["format"] == FORMAT
            and listed["made_from"] == made_from
            and all(_sha256(copy / name) == digest for name, digest in listed["files"].items())
            and {file.name for file in copy.iterdir()} == {*listed["files"], _LIST}
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing, unreadable, or not such a list
        return False


def _seal(made: Path, made_from: str) -> None:
    files = {file.name: _sha256(file) for file in sorted(made.iterdir())}
    (made / _LIST).write_text(json.dumps({"format": FORMAT, "made_from": made_from, "files": files}, indent=1), encoding="utf-8")


def _move(made: Path, copy: Path, made_from: str) -> None:
    """Put ``made`` where ``copy`` is to be, unless another process has been there first.

    Raises:
        OSError: it cannot be done.
    """
    try:
        os.replace(made, copy)
        return
    except OSError:
        # A directory that is not empty is in the way: what another process has just made, or what is to be made anew.
        if is_intact(copy, made_from):
            return
        if not copy.exists():
            raise
    aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=copy.parent))
    try:
        # Whoever has the old one open goes on with it. An empty directory may be replaced.
        os.replace(copy, aside)
        os.replace(made, copy)
    except OSError:
        # Another process does the same, and was faster.
        if not is_intact(copy, made_from):
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what processes that were killed have left behind."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
