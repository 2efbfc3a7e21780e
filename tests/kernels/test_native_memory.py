"""The C++ kernels under AddressSanitizer: no access outside of an input, an output or a buffer of their own, under any default dtype."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Torch's tensors come from the sanitizer's allocator, which surrounds each with memory that must not be touched; the kernels, compiled with
# checks, end the process when they do. A native kernel is an op's backend of that name, whatever the op.
SANITIZED = """
import sys, torch
from patchkit.kernels import available_ops, native
native._FLAGS += ["-fsanitize=address", "-g", "-O1"]
"""
ALL_INPUTS = """
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    torch.set_default_dtype(dtype)
    ran = {}
    for name, op in available_ops().items():
        for case, args in op.sample_inputs(torch.device("cpu")) if "native" in op.backends else ():
            if op.explain(*args)["native"] is None:
                op.results(op.backends["native"].run, *args)
                ran[name] = ran.get(name, 0) + 1
    print(dtype, ran)
"""
# The kernel writes rows * n numbers, and is given room for one less.
TOO_SMALL = """
from patchkit.kernels.int8_linear import _kernel
x, weight, scale = torch.ones(2, 64), torch.ones(33, 64, dtype=torch.int8), torch.ones(33)
y = torch.empty(2 * 33 - 1)
_kernel()[0](x.data_ptr(), weight.data_ptr(), scale.data_ptr(), None, y.data_ptr(), 2, 33, 64, 1, 1)
"""


def sanitizer() -> str:
    """The sanitizer's library, or the reason why there is none."""
    try:
        found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("there is no g++")
    if not Path(found).is_file():
        pytest.skip("g++ has no AddressSanitizer")
    return found


def run(code: str, cache: Path) -> subprocess.CompletedProcess[str]:
    # Python itself leaves memory behind, and torch loads libraries that the sanitizer does not know.
    settings = {"LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": "detect_leaks=0", "CXX": "g++", "XDG_CACHE_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", SANITIZED + code], capture_output=True, text=True, timeout=300, env=os.environ | settings)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checked kernels are kept between the tests."""
    return tmp_path_factory.mktemp("cache")


def test_no_native_kernel_touches_memory_that_is_not_its_own(cache: Path) -> None:
    done = run(ALL_INPUTS, cache)
    if "{}" in done.stdout:
        pytest.skip("no native kernel serves this processor")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("linear_attention") == 4, done.stdout


def test_the_sanitizer_sees_a_kernel_that_writes_behind_its_output(cache: Path) -> None:
    from patchkit.kernels.int8_linear import _kernel

    if _kernel()[0] is None:
        pytest.skip(str(_kernel()[1]))
    done = run(TOO_SMALL, cache)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
