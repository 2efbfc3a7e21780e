"""kv_append against plain Python, complex numbers for the rotation, and against the rotation of transformers."""

from __future__ import annotations

import cmath
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from patchkit.errors import KernelError
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.op import VARIABLE
from patchkit.testing import TOLERANCES

ROOT = Path(__file__).resolve().parents[2]
FORMS = pytest.mark.parametrize("form", ["reference", "chosen"])


def append(form: str, *args: torch.Tensor | None) -> None:
    (kv_append.reference if form == "reference" else kv_append)(*args)


def rotated(key: list[float], angles: list[float]) -> list[float]:
    """Dimensions i and i + n / 2 are the parts of a complex number that is turned by angle i."""
    half = len(angles)
    turned = [complex(key[i], key[i + half]) * cmath.exp(1j * angle) for i, angle in enumerate(angles)]
    return [z.real for z in turned] + [z.imag for z in turned] + key[2 * half :]


def expected(cache: torch.Tensor, new: torch.Tensor, offsets: list[int], angles: torch.Tensor | None) -> torch.Tensor:
    """[B, G, C, K] float64: the cache with new tokens, one by one."""
    result = cache.double().tolist()
    for b, heads in enumerate(new.double().tolist()):
        for g, tokens in enumerate(heads):
            for t, vector in enumerate(tokens):
                result[b][g][offsets[b] + t] = vector if angles is None else rotated(vector, angles[b, t].tolist())
    return torch.tensor(result, dtype=torch.float64)


def random_case(dtype: torch.dtype = torch.float32, n: int = 12) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Arguments without rotation, and angles [B, T, n / 2] float64."""
    torch.manual_seed(0)
    shapes = (3, 2, 20, 16), (3, 2, 20, 9), (3, 2, 5, 16), (3, 2, 5, 9)
    return [*(torch.randn(shape).to(dtype) for shape in shapes), torch.tensor([0, 15, 7])], torch.rand(3, 5, n // 2).double() * 6


def cos_sin(angles: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat((angles, angles), -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def error(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [0, 2, 12, 16])
def test_every_key_and_value_is_where_it_belongs(form, dtype, n):
    (keys, values, new_keys, new_values, offsets), angles = random_case(dtype, n)
    places = offsets.tolist()
    right_keys = expected(keys, new_keys, places, angles if n else None)
    right_values = expected(values, new_values, places, None)
    before = keys.clone()
    append(form, keys, values, new_keys, new_values, offsets, *(cos_sin(angles, torch.float64) if n else (None, None)))
    assert torch.equal(values.double(), right_values)
    assert error(keys, right_keys) <= TOLERANCES[dtype].ratio
    for b, place in enumerate(places):  # all the others are as they were
        assert torch.equal(keys[b, :, :place], before[b, :, :place]) and torch.equal(keys[b, :, place + 5 :], before[b, :, place + 5 :])
        assert torch.equal(keys[b, :, place : place + 5, n:], new_keys[b, ..., n:])


@FORMS
def test_slips_would_show(form):
    (keys, values, new_keys, new_values, offsets), angles = random_case()
    places, differs = offsets.tolist(), TOLERANCES[torch.float32].differs
    right = expected(keys, new_keys, places, angles)
    interleaved = new_keys[..., :12].unflatten(-1, (6, 2)).transpose(-1, -2).flatten(-2)
    wrong = {
        "one slot further": expected(keys, new_keys, [(place + 1) % 16 for place in places], angles),
        "one offset for all": expected(keys, new_keys, places[:1] * 3, angles),
        "the other direction": expected(keys, new_keys, places, -angles),
        "the angles of another token": expected(keys, new_keys, places, angles.flip(1)),
        "pairs of neighbours": expected(keys, torch.cat((interleaved, new_keys[..., 12:]), -1), places, angles),
        "every dimension": expected(keys, new_keys, places, torch.cat((angles, angles[..., :2]), -1)),
        "no rotation": expected(keys, new_keys, places, None),
    }
    append(form, keys, values, new_keys, new_values, offsets, *cos_sin(angles))
    assert error(keys, right) <= TOLERANCES[torch.float32].ratio
    for slip, other in wrong.items():
        assert error(keys, other) > differs, slip


@FORMS
def test_in_fp32_the_bits_of_transformers(form):
    (keys, values, new_keys, new_values, offsets), angles = random_case(n=16)
    cos, sin = cos_sin(angles)
    _, turned = apply_rotary_pos_emb(new_keys, new_keys, cos, sin)
    append(form, keys, values, new_keys, new_values, offsets, cos, sin)
    for b, place in enumerate(offsets.tolist()):
        assert torch.equal(keys[b, :, place : place + 5], turned[b])


@FORMS
def test_a_part_of_a_larger_cache(form):
    """Slots 3 to 14 of 20, of two rows in four; keys and values come with tokens before heads."""
    (*_, new_keys, new_values, _offsets), angles = random_case()
    room = torch.randn(4, 2, 20, 16), torch.randn(4, 2, 20, 9)
    before = [x.clone() for x in room]
    offsets = torch.tensor([0, 7])
    given = [x[:2].transpose(1, 2).contiguous().transpose(1, 2) for x in (new_keys, new_values)]
    cos, sin = (x[:1].expand(2, -1, -1) for x in cos_sin(angles))
    append(form, *(x[1:3, :, 3:15] for x in room), *given, offsets, cos, sin)
    right = expected(before[0][1:3], new_keys[:2], [3, 10], angles[:1].expand(2, -1, -1))
    assert error(room[0][1:3], right) <= TOLERANCES[torch.float32].ratio
    assert torch.equal(room[1][1:3].double(), expected(before[1][1:3], new_values[:2], [3, 10], None))
    for x, old in zip(room, before, strict=True):
        assert torch.equal(x[[0, 3]], old[[0, 3]]) and torch.equal(x[:, :, :3], old[:, :, :3]) and torch.equal(x[:, :, 15:], old[:, :, 15:])


@FORMS
@pytest.mark.parametrize("offset", [-1, 16, 20])
def test_a_row_that_does_not_fit_is_refused_before_anything_is_written(form, offset):
    (keys, values, new_keys, new_values, offsets), angles = random_case()
    offsets[2] = offset
    before = keys.clone(), values.clone()
    with pytest.raises(KernelError, match=r"5 tokens at offsets .* do not fit into 20 slots"):
        append(form, keys, values, new_keys, new_values, offsets, *cos_sin(angles))
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_torch_compile_sees_what_is_written():
    (keys, values, *rest), _ = random_case()

    def step(keys: torch.Tensor, values: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        kv_append(keys, values, *rest)
        return keys.sum() + values.sum()  # of what is there now

    other = keys.clone(), values.clone()
    with torch.no_grad():
        total = torch.compile(step, fullgraph=True, backend="aot_eager")(keys, values, *rest)
        assert torch.equal(total, step(*other, *rest))
    assert torch.equal(keys, other[0]) and torch.equal(values, other[1])
    torch.compiler.reset()


def test_there_is_no_gradient():
    (keys, values, new_keys, *rest), _ = random_case()
    with pytest.raises(KernelError, match="no gradient"):
        kv_append(keys, values, new_keys.requires_grad_(), *rest)


INTERPRETED = """
import sys, pytest, torch
from patchkit.kernels.triton.kv_append import run
# without the check that only tensors on a CPU get: what lies outside is left out, and the memory around the cache is not touched
room = torch.zeros(2, 1, 12, 4)
keys, values = room[:, :, 4:8], torch.zeros(2, 1, 4, 2)
new = torch.arange(1, 13.0).view(1, 1, 3, 4).expand(2, 1, 3, 4)
run(keys, values, new, new[..., :2], torch.tensor([-2, 3]), None, None)
assert keys[0, 0].tolist() == [[9, 10, 11, 12]] + [[0] * 4] * 3, keys
assert keys[1, 0].tolist() == [[0] * 4] * 3 + [[1, 2, 3, 4]], keys
assert values[:, 0, [0, 3]].tolist() == [[[9, 10], [0, 0]], [[0, 0], [1, 2]]]
assert room.count_nonzero() == 8
# and every test of this file that Triton serves
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.matrix
def test_the_same_under_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", VARIABLE: "triton", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED, str(Path(__file__)), "-k", "chosen and not float64 and not bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0 and "14 passed" in done.stdout, done.stdout + done.stderr
