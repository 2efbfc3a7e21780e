"""Direct forms of ops: what torch's dispatcher calls without Python. The same bits as the op, and every call that they do not serve."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_configs import tiny_model

from patchkit import patch_model
from patchkit.int8.weight import Int8Weight
from patchkit.kernels import native
from patchkit.kernels.int8_linear import int8_linear
from patchkit.kernels.op import VARIABLE, Op, available_ops

OPS = [op for op in available_ops().values() if op._serves_directly is not None]


@pytest.fixture(params=OPS, ids=lambda op: op.name)
def direct(request: pytest.FixtureRequest) -> Op:
    if (reason := request.param.load_direct()) is not None:
        pytest.skip(reason)
    torch.compiler.reset()  # the tests compile one function for each op, and torch counts all of these together
    return request.param


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch, direct: Op) -> list[str]:
    """Labels of the calls that reach the op's backends in Python."""
    calls: list[str] = []
    for name, backend in direct.backends.items():
        run = lambda *args, name=name, run=backend.run: (calls.append(name), run(*args))[1]  # noqa: E731
        monkeypatch.setitem(direct.backends, name, type(backend)(name, run, backend.refuses, backend.rounding))
    return calls


def test_there_are_direct_forms() -> None:
    assert {op.name for op in OPS} >= {"gemv", "int8_linear"}


def test_all_samples_have_the_bits_of_the_op(direct: Op, in_python: list[str]) -> None:
    served = 0
    for label, args in direct.sample_inputs("cpu"):
        expected = direct._dispatch(*args)
        del in_python[:]
        found = direct._direct(*args)  # type: ignore[misc]
        assert torch.equal(found, expected) or (found.isnan() == expected.isnan()).all(), label
        assert found.dtype is expected.dtype, label
        served += not in_python
        # A direct call that was promised must not go through Python.
        if direct._serves_directly(*args) and direct.choose(*args) == "native":  # type: ignore[misc]
            assert not in_python, label
    assert served > 3


@torch.no_grad()
def test_few_rows_do_not_reach_python_and_others_do(direct: Op, in_python: list[str]) -> None:
    _, args = next(iter(direct.sample_inputs("cpu")))
    many = [torch.randn(1, 40, args[0].shape[-1]), *args[1:]]
    expected = direct(*args), direct(*many)
    assert len(in_python) <= 1  # the many rows, where a backend serves them
    compiled = torch.compile(lambda *given: direct(*given), backend="eager", fullgraph=True, dynamic=True)
    del in_python[:]
    assert torch.equal(compiled(*args), expected[0])
    assert not in_python
    assert torch.equal(compiled(*many), expected[1])


@torch.no_grad()
def test_the_variable_is_obeyed(direct: Op, in_python: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = next(iter(direct.sample_inputs("cpu")))
    compiled = torch.compile(lambda *given: direct(*given), backend="eager", fullgraph=True)
    compiled(*args)
    monkeypatch.setenv(VARIABLE, "reference")
    expected = direct.reference(*args)
    assert torch.equal(direct(*args), expected)
    assert torch.equal(compiled(*args), expected)
    monkeypatch.setenv(VARIABLE, "native")
    assert torch.equal(compiled(*args), direct.backends["native"].run(*args))


def test_no_native_code_reads_the_environment(direct: Op) -> None:
    """torch has released Python's lock there, and the C library's getenv reads what setenv frees: another thread that changes os.environ
    would crash the process, now and then. The names of the functions that a library calls are in its file."""
    for name in (direct.name, f"{direct.name}_direct"):
        library = native._compiled(Path(native.__file__).with_name(f"{name}.cpp"), native._compiler() or "")
        names = library.read_bytes()
        assert b"patchkit_" in names
        assert b"getenv" not in names, name


def test_compiled_models_follow_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of patchkit's own steps and of torch.compile on an int8 model, whose op is chosen behind dynamo."""
    if (reason := int8_linear.load_direct()) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 32)
    layer.weight = torch.nn.Parameter(Int8Weight.quantize(layer.weight), requires_grad=False)
    x, called = torch.randn(1, 64), []
    reference = int8_linear.reference
    monkeypatch.setattr(int8_linear, "reference", lambda *args: (called.append("layer"), reference(*args))[1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    model = patch_model(tiny_model("llama"), "int8(scope='all', mode=weight_only) + compile(backend=aot_eager)", verbose=False)
    ids = torch.arange(5, 13)[None]
    with torch.no_grad():
        compiled(x)
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert not called
        monkeypatch.setenv(VARIABLE, "reference")
        compiled(x)
        assert called
        called.clear()
        before = model(ids[:, :1], use_cache=True)  # a prompt of one token is no step yet
        called.clear()
        model(ids[:, 1:2], past_key_values=before.past_key_values)
        assert len(called) >= 14  # seven products in each of two layers


def test_where_a_gradient_is_asked_for_the_op_says_that_it_has_none(direct: Op) -> None:
    _, args = next(iter(direct.sample_inputs("cpu")))
    x = args[0].clone().requires_grad_()
    compiled = torch.compile(lambda *given: direct(*given), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="has no gradient"):
        compiled(x, *args[1:]).sum().backward()


def test_compiled_and_eager_code_work_without_a_direct_form(direct: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    _, args = next(iter(direct.sample_inputs("cpu")))
    expected = direct._dispatch(*args)
    monkeypatch.setattr(direct, "_direct", None)
    monkeypatch.setattr(sys.modules[Op.__module__], "load_direct", lambda name: "no headers")
    assert direct.load_direct() == "no headers"
    with torch.no_grad():
        assert torch.equal(direct(*args), expected)


@torch.no_grad()
def test_shapes_of_no_linear_layer_are_refused(direct: Op) -> None:
    _, args = next(iter(direct.sample_inputs("cpu")))
    # 140: a packed weight knows its number of groups of inputs, not that of its inputs.
    for x in (torch.randn(1, args[0].shape[-1] - 140), torch.randn(args[0].shape[-1] + 140), torch.randn(())):
        with pytest.raises((RuntimeError, IndexError)):
            direct._direct(x, *args[1:])  # type: ignore[misc]


@torch.no_grad()
def test_a_bias_and_scales_of_other_shapes_are_the_ops(direct: Op) -> None:
    """The kernel reads as many of each as the weight has outputs."""
    _, args = next(iter(direct.sample_inputs("cpu")))
    outputs = direct.reference(*args).shape[-1]
    names = direct._arguments[: len(args)]
    others = [("bias", torch.ones(1)), ("bias", torch.ones(1, outputs))]
    others += [("scale", torch.full((1,), 1e-3)), ("scale", torch.full((outputs + 1,), 1e-3))] if "scale" in names else []
    for name, other in others:
        given = [other if each == name else value for each, value in zip(names, args, strict=True)]
        if name == "scale" and len(other) > 1:
            with pytest.raises(RuntimeError):
                direct(*given)
        else:
            assert torch.equal(direct(*given), direct.reference(*given)), (name, other.shape)


@torch.no_grad()
def test_calls_leave_no_memory(direct: Op) -> None:
    """torch's own conversion of a text, such as int8_linear's activation, loses some 48 bytes in every call."""
    args = list(next(iter(direct.sample_inputs("cpu")))[1])
    if args[1].ndim == 2:  # not packed: fewer inputs take less time
        args[:2] = [arg[..., :64].contiguous() for arg in args[:2]]

    def grown(calls: int) -> int:
        before = allocated()
        for _ in range(calls):
            direct._direct(*args)  # type: ignore[misc]
        return allocated() - before

    grown(200)
    assert min(grown(2000) for _ in range(3)) < 8 * 2000


def allocated() -> int:
    """Bytes that the C library has handed out and not got back."""

    class Mallinfo(ctypes.Structure):
        _fields_: ClassVar = [
            (name, ctypes.c_size_t)
            for name in ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
        ]

    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("glibc 2.33 or newer counts what is allocated")
    library.mallinfo2.restype = Mallinfo
    return int(library.mallinfo2().uordblks)


def test_a_folder_of_headers_is_a_part_of_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "a.cpp").write_text('#include "b.h"\n')
    (tmp_path / "b.h").write_text("one")
    first = native._texts(tmp_path / "a.cpp")
    (tmp_path / "b.h").write_text("two")
    assert first != native._texts(tmp_path / "a.cpp")
