"""Machine and versions, which are recorded with every figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = (
    *("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve"),
)


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "not installed" (patchkit itself, when it runs from its sources)."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def environment() -> dict[str, Any]:
    """Return machine and versions as plain data: `cpu`, `cpu_flags`, `cores`, `threads`, `gpu`, `platform`, a version per package.

    `cpu_flags` are the CPU's instruction sets that matter for matrix products; None where the system does not tell.
    """
    return {
        "cpu": _cpu_name(),
        "cpu_flags": _cpu_flags(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "transformers", "patchkit")},
    }


def _cpu_name() -> str:
    return _cpuinfo("model name") or platform.processor() or "unknown"


def _cpu_flags() -> list[str] | None:
    # x86 calls them flags, Arm Features.
    found = _cpuinfo("flags") or _cpuinfo("Features")
    return None if found is None else [flag for flag in _FLAGS if flag in found.split()]


def _cpuinfo(key: str) -> str | None:
    """Value of a key in /proc/cpuinfo, of the first processor; None if it is missing."""
    if not _CPUINFO.is_file():
        return None
    for line in _CPUINFO.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
