from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch
import transformers

from patchkit.measure import environment as environment_module
from patchkit.measure.environment import environment, version_of


def test_environment_names_machine_and_versions() -> None:
    found = environment()
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__
    assert found["cpu"] and found["cores"] >= 1
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    "text, cpu, flags",
    [
        (
            "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_vnni avx5\n",
            "A CPU @ 2 GHz",
            "avx2 avx512f avx512_vnni amx_bf16",
        ),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm\n", None, "asimd i8mm"),
        ("processor\t: 0\nmodel name\t: A CPU\n", "A CPU", None),
    ],
)
def test_what_the_cpu_can_do(text: str, cpu: str | None, flags: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(environment_module, "_CPUINFO", tmp_path / "cpuinfo")
    found = environment()
    assert found["cpu_flags"] == (None if flags is None else flags.split())
    assert found["cpu"] == (cpu or platform.processor() or "unknown")


def test_a_system_without_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "_CPUINFO", tmp_path / "none")
    assert environment()["cpu_flags"] is None and environment()["cpu"]


def test_a_package_that_is_not_there() -> None:
    assert version_of("no-such-distribution-of-any-name") == "not installed"
