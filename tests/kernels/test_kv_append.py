"""kv_append against plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from patchkit.errors import KernelError
from patchkit.kernels.kv_append import kv_append
from patchkit.kernels.op import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
FORMS = pytest.mark.parametrize("form", ["reference", "chosen"])


def append(form: str, *args: torch.Tensor) -> None:
    (kv_append.reference if form == "reference" else kv_append)(*args)


def expected(cache: torch.Tensor, new: torch.Tensor, offsets: list[int]) -> torch.Tensor:
    """[B, G, C, K] float64: the cache with new tokens, one by one."""
    result = cache.double().tolist()
    for b, heads in enumerate(new.double().tolist()):
        for g, tokens in enumerate(heads):
            for t, vector in enumerate(tokens):
                result[b][g][offsets[b] + t] = vector
    return torch.tensor(result, dtype=torch.float64)


def random_case(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Arguments of three rows with 20 slots and 5 new tokens."""
    torch.manual_seed(0)
    shapes = (3, 2, 20, 16), (3, 2, 20, 9), (3, 2, 5, 16), (3, 2, 5, 9)
    return [*(torch.randn(shape).to(dtype) for shape in shapes), torch.tensor([0, 15, 7])]


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_key_and_value_is_where_it_belongs(form, dtype):
    keys, values, new_keys, new_values, offsets = random_case(dtype)
    places = offsets.tolist()
    right_keys, right_values = expected(keys, new_keys, places), expected(values, new_values, places)
    before = keys.clone()
    append(form, keys, values, new_keys, new_values, offsets)
    assert torch.equal(keys.double(), right_keys) and torch.equal(values.double(), right_values)
    for b, place in enumerate(places):  # all the others are unchanged
        assert torch.equal(keys[b, :, :place], before[b, :, :place]) and torch.equal(keys[b, :, place + 5 :], before[b, :, place + 5 :])


@FORMS
def test_slips_would_show(form):
    keys, values, new_keys, new_values, offsets = random_case()
    places = offsets.tolist()
    wrong = {
        "one slot further": expected(keys, new_keys, [(place + 1) % 16 for place in places]),
        "one offset for all": expected(keys, new_keys, places[:1] * 3),
        "the tokens of another row": expected(keys, new_keys.flip(0), places),
        "the tokens in reverse": expected(keys, new_keys.flip(2), places),
    }
    append(form, keys, values, new_keys, new_values, offsets)
    for slip, other in wrong.items():
        assert not torch.equal(keys.double(), other), slip


@FORMS
def test_a_part_of_a_larger_cache(form):
    """Slots 3 to 14 of 20, of two rows in four; keys and values come with tokens before heads."""
    *_, new_keys, new_values, _offsets = random_case()
    room = torch.randn(4, 2, 20, 16), torch.randn(4, 2, 20, 9)
    before = [x.clone() for x in room]
    offsets = torch.tensor([0, 7])
    given = [x[:2].transpose(1, 2).contiguous().transpose(1, 2) for x in (new_keys, new_values)]
    append(form, *(x[1:3, :, 3:15] for x in room), *given, offsets)
    assert torch.equal(room[0][1:3].double(), expected(before[0][1:3], new_keys[:2], [3, 10]))
    assert torch.equal(room[1][1:3].double(), expected(before[1][1:3], new_values[:2], [3, 10]))
    for x, old in zip(room, before, strict=True):
        assert torch.equal(x[[0, 3]], old[[0, 3]]) and torch.equal(x[:, :, :3], old[:, :, :3]) and torch.equal(x[:, :, 15:], old[:, :, 15:])


@FORMS
@pytest.mark.parametrize("offset", [-1, 16, 20])
def test_a_row_that_does_not_fit_is_refused_before_anything_is_written(form, offset):
    keys, values, new_keys, new_values, offsets = random_case()
    offsets[2] = offset
    before = keys.clone(), values.clone()
    with pytest.raises(KernelError, match=r"5 tokens at offsets .* do not fit into 20 slots"):
        append(form, keys, values, new_keys, new_values, offsets)
    assert torch.equal(keys, before[0]) and torch.equal(values, before[1])


def test_torch_compile_sees_what_is_written():
    keys, values, *rest = random_case()

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
    keys, values, new_keys, *rest = random_case()
    with pytest.raises(KernelError, match="no gradient"):
        kv_append(keys, values, new_keys.requires_grad_(), *rest)


INTERPRETED = """
import sys, pytest, torch
from patchkit.kernels.triton.kv_append import run
# without the check that only tensors on a CPU get: slots outside are skipped, and the memory around the cache is not touched
room = torch.zeros(2, 1, 12, 4)
keys, values = room[:, :, 4:8], torch.zeros(2, 1, 4, 2)
new = torch.arange(1, 13.0).view(1, 1, 3, 4).expand(2, 1, 3, 4)
run(keys, values, new, new[..., :2], torch.tensor([-2, 3]))
assert keys[0, 0].tolist() == [[9, 10, 11, 12]] + [[0] * 4] * 3, keys
assert keys[1, 0].tolist() == [[0] * 4] * 3 + [[1, 2, 3, 4]], keys
assert values[:, 0, [0, 3]].tolist() == [[[9, 10], [0, 0]], [[0, 0], [1, 2]]]
assert room.count_nonzero() == 8
# and every test of this file that Triton serves
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@pytest.mark.matrix
def test_under_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", VARIABLE: "triton", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", INTERPRETED, str(Path(__file__)), "-k", "chosen and not float64 and not bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout + done.stderr
