"""Triton kernels without a GPU: run by Triton's interpreter against the references, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import matrix

pytest.importorskip("triton", reason="triton is not installed: it comes with torch for CUDA, or pip install triton on Linux")

from evals.triton_resources import CAPABILITIES, compiled, signatures

ROOT = Path(__file__).resolve().parents[2]
SIGNATURES = dict(signatures())
KERNELS = {name.partition(":")[0]: name for name in reversed(SIGNATURES)}  # the first signature of each


def interpreted(*command: str) -> subprocess.CompletedProcess[str]:
    """A process in which Triton interprets: it decides that when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PATCHKIT_KERNELS": "triton", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)


@pytest.mark.parametrize(("chosen", "least"), [("agrees and (typical or one)", 9), matrix("agrees", 61)])
def test_the_contract_holds_under_the_interpreter(chosen, least):
    done = interpreted("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_op.py", "-k", chosen)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= least


INTERPRETED = """
import torch
from patchkit.kernels.int8_linear import int8_linear
torch.manual_seed(0)
w, s = torch.randint(-127, 128, (70, 160), dtype=torch.int8), torch.rand(70) * 1e-3
for dtype in (torch.float16, torch.float32):
    for activation in ("float", "int8"):
        x = torch.randn(16, 160).to(dtype)
        assert int8_linear.choose(x, w, s, None, activation) == "triton"
        many = int8_linear(x, w, s, None, activation)
        alone = torch.cat([int8_linear(row[None], w, s, None, activation) for row in x])
        pairs, fours = (torch.cat([int8_linear(rows, w, s, None, activation) for rows in x.split(size)]) for size in (2, 4))
        assert torch.equal(alone, pairs) and torch.equal(alone, fours), (dtype, activation)
        assert torch.equal(many[:5], int8_linear(x[:5], w, s, None, activation)), (dtype, activation)
        # Another kernel: other bits in floating point, but no other sum of integers.
        assert torch.equal(many, alone) if activation == "int8" else (many - alone).norm() / alone.norm() < 1e-3, (dtype, activation)

# per-group scales matter, and a form that took the first group's for all would be seen
groups = torch.rand(70, 5) * 1e-3
for rows in (1, 2, 3, 4, 7):
    x = torch.randn(rows, 160)
    exact = x.double() @ (w.double() * groups.double().repeat_interleave(32, 1)).T
    wrong = x.double() @ (w.double() * groups.double()[:, :1]).T
    found = int8_linear(x, w, groups)
    assert (found - exact).norm() / exact.norm() < 1e-5 < (wrong - exact).norm() / exact.norm(), rows

# ties go to the even integer, as in torch.round: with the largest value 127 the step is 1
x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5] + [0.0] * 25])
identity = torch.eye(32, dtype=torch.int8)
assert int8_linear(x, identity, torch.ones(32), None, "int8")[0, :7].tolist() == [127.0, 0.0, 2.0, 2.0, 0.0, -2.0, 126.0]

# the case that overflows where the scale comes after a product in fp16
x, w, s = torch.full((1, 2560), 59 / (2560 * 0.08)).half(), torch.full((4, 2560), 127, dtype=torch.int8), torch.full((4,), 0.08 / 127)
for activation in ("float", "int8"):
    assert (int8_linear(x, w, s, None, activation) - 59).abs().max() < 0.1

bad = torch.ones(2, 64)
bad[0, 3] = float("nan")
y = int8_linear(bad, torch.ones(4, 64, dtype=torch.int8), torch.ones(4), None, "int8")
assert y[0].isnan().all() and y[1].isfinite().all()
print("all hold")
"""


@pytest.mark.matrix
def test_rows_groups_ties_and_overflow_under_the_interpreter():
    done = interpreted("-c", INTERPRETED)
    assert "all hold" in done.stdout, done.stdout + done.stderr


LINEAR = """
import torch
from patchkit.kernels.linear_attention import linear_attention
from patchkit.kernels.research.linear_attention_step import linear_attention_step
from patchkit.testing import TOLERANCES
tolerance = TOLERANCES[torch.float32].ratio

def off(found, expected):
    return float((found - expected).norm() / expected.norm())

torch.manual_seed(0)
q, k, v = torch.randn(2, 4, 70, 20), torch.randn(2, 2, 70, 20), torch.randn(2, 2, 70, 24)
mask = torch.rand(2, 70) > 0.3
state, normalizer = torch.randn(2, 2, 20, 24), torch.rand(2, 2, 20) * 5
given = [x.requires_grad_() for x in (q, k, v, state, normalizer)]
assert linear_attention.choose(*given, mask) == "triton"

# The interpreter computes in fp32 what a GPU does in TF32, so the bound of fp32 holds here.
found, expected = linear_attention(*given, mask), linear_attention.reference(*given, mask)
assert all(off(a, b) < tolerance for a, b in zip(found, expected))
weights = [torch.randn_like(x) for x in expected]
gradients = [torch.autograd.grad(sum((x * w).sum() for x, w in zip(form, weights)), given) for form in (found, expected)]
assert all(off(a, b) < 10 * tolerance for a, b in zip(*gradients))

with torch.no_grad():
    again = linear_attention(*given, mask)
    assert all(map(torch.equal, found, again))
    first = linear_attention(*(x[:, :, :33] for x in (q, k, v)), state, normalizer, mask[:, :33])
    second = linear_attention(*(x[:, :, 33:] for x in (q, k, v)), *first[2:], mask[:, 33:])
    assert off(torch.cat([first[0], second[0]], 2), expected[0]) < tolerance and off(second[2], expected[2]) < tolerance
    outs, memory = [], [state.clone(), normalizer.clone()]
    for t in range(70):
        token = [x[:, :, t : t + 1] for x in (q, k, v)]
        assert linear_attention_step.choose(*token, *memory, mask[:, t : t + 1]) == "triton"
        outs.append(linear_attention_step(*token, *memory, mask[:, t : t + 1])[0])
    assert off(torch.cat(outs, 2), expected[0]) < tolerance
    assert all(off(a, b) < tolerance for a, b in zip(memory, expected[2:]))
print("all hold")
"""


@pytest.mark.matrix
def test_linear_attention_and_its_gradient_under_the_interpreter():
    done = interpreted("-c", LINEAR)
    assert "all hold" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "capability"),
    [(name, CAPABILITIES[-1]) for name in KERNELS.values()]
    + [
        matrix(name, capability)
        for name in SIGNATURES
        for capability in CAPABILITIES
        if (name, capability) not in {(first, CAPABILITIES[-1]) for first in KERNELS.values()}
    ],
)
def test_it_compiles_within_bounds(name, capability):
    found = compiled(SIGNATURES[name], capability)
    assert found.cubin_bytes > 0
    # what a block may have on every GPU from compute capability 8.0 on, 8.6 and 8.9 included
    assert found.shared_bytes <= 99 * 1024
    assert found.spilled_bytes <= 64


def test_without_triton_the_backend_refuses_and_nothing_breaks():
    code = """
import sys
sys.modules["triton"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
import torch
from patchkit.kernels.int8_linear import int8_linear
args = torch.ones(1, 64), torch.ones(4, 64, dtype=torch.int8), torch.ones(4)
assert int8_linear.explain(*args)["triton"] == "triton is not installed"
assert int8_linear(*args).tolist() == [[64.0] * 4]
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr
