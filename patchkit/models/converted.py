"""Copies of models that were converted from another format, kept under the user's cache folder.

A copy is a directory that `save_pretrained` wrote, with a list of its source and of its own files, each with its SHA-256. It is used
only if all hashes still match; else it is converted again. It is created by one rename, so that no process sees half of one.
"""

from __future__ import annotations

import errno
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

# To be raised when the written format changes: copies with other numbers are converted again.
FORMAT = 1
# Errors of writing a model where the disk is full or the folder read-only; safetensors raises a separate one.
WRITE_ERRORS = (OSError, SafetensorError)

_LIST = "patchkit.json"
_UNFINISHED = ".unfinished-"
_ABANDONED_AFTER_S = 24 * 3600.0
# Renames that are tried while other processes replace the same copy.
_ATTEMPTS = 16


def keep(file: Path, write: Callable[[Path], None]) -> Path | None:
    """Return the directory with the copy of ``file``; create it if there is none or if it has changed.

    Several processes may call this at once: each converts, and all use the first finished copy.

    Args:
        file: the source of the copy.
        write: writes the copy into the empty directory that it is given.

    Returns:
        None if nothing can be kept: no cache folder, not writable, or full. This is logged.
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
    """Whether ``copy`` was made from a file with this SHA-256, in this version of the format, and its files have not changed."""
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
    """Rename ``made`` to ``copy``, unless another process was faster.

    Raises:
        OSError: it cannot be renamed.
    """
    for _ in range(_ATTEMPTS):
        try:
            os.replace(made, copy)
            return
        except OSError as error:
            # A non-empty directory is in the way: another process has just made it, or it is outdated.
            if is_intact(copy, made_from):
                return
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        aside = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=copy.parent))
        try:
            # Processes that have the old one open can still use it. An empty directory may be replaced.
            os.replace(copy, aside)
        except FileNotFoundError:  # another process has just moved it
            continue
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    raise OSError(f"{copy} is replaced again and again by other processes")


def _remove_abandoned(folder: Path) -> None:
    """Remove unfinished directories of killed processes."""
    for left in folder.glob(f"{_UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(left, ignore_errors=True)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
