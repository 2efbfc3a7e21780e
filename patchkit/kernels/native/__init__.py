"""C++ kernels, compiled for the processor of this machine when they are first needed, in a second or two, and kept on disk.

A kernel is one file in this folder with one ``extern "C"`` function. Without a compiler the backend that needs the kernel refuses, with
the reason, and another one serves. ``<name>_direct.cpp`` is a kernel as torch's dispatcher calls it without Python; see `Op.direct`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

# No -ffast-math, which would change exact arithmetic. Contracted products would round differently from torch's.
_FLAGS = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]


def cache_folder() -> Path:
    """Folder of the compiled kernels: ``$XDG_CACHE_HOME/patchkit``, by default ``~/.cache/patchkit``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "patchkit"


def load(name: str, signature: tuple[Any, ...]) -> tuple[Any, str | None]:
    """Load the function ``patchkit_<name>`` of ``<name>.cpp``, which returns an int.

    Args:
        signature: ctypes of its arguments.

    Returns:
        The function and None; or None and the reason why it is not available on this machine.
    """
    if platform.system() != "Linux":
        return None, f"C++ kernels are compiled on Linux only, this is {platform.system()}"
    source = Path(__file__).with_name(f"{name}.cpp")
    compiler = _compiler()
    if compiler is None:
        return None, "there is no C++ compiler: install g++ or set CXX"
    try:
        library = ctypes.CDLL(str(_compiled(source, compiler)))
    except subprocess.CalledProcessError as error:
        return None, f"{compiler} failed on {source.name}: {error.stderr.strip().splitlines()[0] if error.stderr else error}"
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return None, f"{source.name} could not be compiled or loaded: {error}"
    function = getattr(library, f"patchkit_{name}")
    function.argtypes = signature
    return function, None


def _compiler() -> str | None:
    return next((path for path in map(shutil.which, [os.environ.get("CXX", ""), "c++", "g++", "clang++"]) if path), None)


def load_direct(name: str) -> str | None:
    """Load ``<name>_direct.cpp``, which registers with torch's dispatcher; return the reason where it is not available, or None."""
    return load(f"{name}_direct", ())[1]


def _texts(source: Path) -> list[str]:
    """Text of a source and of the files of this folder that it includes."""
    text = source.read_text()
    return [text, *(part for name in re.findall(r'^#include "(.+)"$', text, re.M) for part in _texts(source.with_name(name)))]


def _compiled(source: Path, compiler: str) -> Path:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    features = "".join(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features")))
    texts = _texts(source)
    headers, libraries = [], []
    if any("<torch/" in text for text in texts):
        root = Path(torch.__file__).parent
        headers, libraries = [f"-I{root / 'include'}"], [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    key = hashlib.sha256("\n".join([*texts, version, *_FLAGS, features, torch.__version__]).encode()).hexdigest()[:16]
    target = cache_folder() / f"{source.stem}-{key}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            unlinked, linked = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
            run = functools.partial(subprocess.run, capture_output=True, text=True, check=True)
            run([compiler, *_FLAGS, *headers, "-c", str(source), "-o", str(unlinked)])
            # Without -fopenmp: its symbols are then found in the OpenMP library that torch has loaded. A second one would bring
            # a second pool of threads, and the two would fight for the cores.
            run([compiler, "-shared", str(unlinked), "-o", str(linked), *libraries])
            os.replace(linked, target)  # at once, so that no other process sees half a file
    return target
