"""Real text that is on every machine: the standard library sources of the running Python.

The bundled models were trained on such files. 5 % of them are held out for evaluation; they are chosen by a hash of
each file's path, so they are the same in every Python version.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "_bundled"}
_HELDOUT_OF_1000 = 50


def stdlib_root() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_heldout(relative_path: str) -> bool:
    """Whether the file at this POSIX path, relative to the library's root, belongs to the held-out 5 %."""
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < _HELDOUT_OF_1000


def stdlib_files(split: Split, root: Path | None = None) -> list[Path]:
    """Every ``.py`` file of one split, in a fixed order.

    Raises:
        FileNotFoundError: the interpreter has no library sources (a frozen or stripped Python).
    """
    root = root or stdlib_root()
    files = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and is_heldout(relative.as_posix()) == (split == "heldout"):
            files.append(path)
    if not files:
        raise FileNotFoundError(f"no Python sources under {root}: this interpreter ships without its library's text")
    return files


def read_texts(files: list[Path]) -> Iterator[str]:
    """The text of each file that is valid, non-empty UTF-8 (the library's tests hold a few that are not, on purpose)."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text
