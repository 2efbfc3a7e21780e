# ruff: noqa: E402  (the path is set before patchkit is imported)
"""Registers, spills and shared memory of every Triton kernel; needs no GPU. Writes evals/results/triton_resources.json.

    python evals/triton_resources.py

Every kernel under patchkit/kernels/triton/ is compiled to PTX and to machine code for compute capability 8.0 and 9.0, for the types
and tiles that its `signatures()` yields.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import patchkit.kernels.triton as folder
from patchkit.kernels.triton import Signature

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel: registers and bytes spilled to memory per thread, bytes of shared memory per block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    cubin_bytes: int


def signatures() -> Iterator[tuple[str, Signature]]:
    """Pairs of name and signature of every Triton kernel, found by folder."""
    for module in pkgutil.iter_modules(folder.__path__):
        for signature in importlib.import_module(f"{folder.__name__}.{module.name}").signatures():
            yield f"{module.name}.{signature.launch.kernel.__name__}: {signature.label}", signature


def compiled(signature: Signature, capability: int) -> Resources:
    """Compile a kernel for a compute capability; no GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = signature.launch.kernel, dict(signature.launch.constants)
    types = {}
    for name in kernel.arg_names:
        kind = signature.types.get(name)
        if kind == "none":
            constants[name] = None
        types[name] = "constexpr" if kind in (None, "none") else kind
    places = {name: (index,) for index, name in enumerate(kernel.arg_names)}
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    divisible = [name for name, kind in types.items() if kind != "constexpr" and name not in unspecialized and kind not in ("fp32",)]
    attributes = {places[name]: [["tt.divisibility", 16]] for name in divisible} if signature.aligned else {}
    source = ASTSource(kernel, types, {places[name]: value for name, value in constants.items()}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=signature.launch.options)
    printed = _assembler_output(made.asm["ptx"], capability)
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", printed))
    registers = max(int(count) for count in re.findall(r"Used (\d+) registers", printed))
    return Resources(registers, spilled, made.metadata.shared, len(made.asm["cubin"]))


def _assembler_output(ptx: str, capability: int) -> str:
    from triton.backends.nvidia.compiler import get_ptxas

    try:
        assembler = get_ptxas(capability).path
    except AttributeError:  # before Triton 3.5
        assembler = get_ptxas()[0]
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "kernel.ptx"
        file.write_text(ptx)
        target = re.search(r"\.target (sm_\w+)", ptx)
        assert target is not None
        command = [assembler, "-v", f"--gpu-name={target[1]}", str(file), "-o", str(Path(place) / "kernel.cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main() -> None:
    """Compile all kernels, print a table, write the JSON."""
    import triton

    rows = []
    for name, signature in signatures():
        for capability in CAPABILITIES:
            found = compiled(signature, capability)
            rows.append({"kernel": name, "capability": capability, **asdict(found)})
            figures = f"{found.registers:4} registers {found.spilled_bytes:4} B spilled {found.shared_bytes:6} B shared"
            print(f"{name:75} sm_{capability} {figures}")
    result = {"triton": triton.__version__, "command": "python evals/triton_resources.py", "kernels": rows}
    (ROOT / "evals" / "results" / "triton_resources.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
