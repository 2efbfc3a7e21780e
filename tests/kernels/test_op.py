"""The contract of every op (docs/design.md), over the registry and its samples: there is no list of ops here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from patchkit.errors import KernelError
from patchkit.kernels import Op, available_ops, op, table
from patchkit.kernels.op import VARIABLE, _ops, known_backends
from patchkit.testing import TOLERANCES

CASES = [
    pytest.param(name, label, id=f"{name}: {label}") for name, found in available_ops().items() for label, _ in found.sample_inputs("cpu")
]


def arguments(name: str, label: str) -> tuple:
    return dict(available_ops()[name].sample_inputs("cpu"))[label]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that nobody has written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def ratio(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("name", "label"), CASES)
def test_every_backend_agrees_with_the_reference(name, label, poisoned, monkeypatch):
    found = available_ops()[name]
    args = arguments(name, label)
    expected = found.results(found.reference, *args)
    assert expected and all(tensor.isfinite().all() for tensor in expected)
    for backend, reason in found.explain(*args).items():
        if reason is not None:
            assert reason  # a refusal says why
            continue
        monkeypatch.setenv(VARIABLE, backend)
        got = found.results(found, *args)
        assert len(got) == len(expected)
        for tensor, right in zip(got, expected, strict=True):
            assert tensor.dtype == right.dtype and tensor.shape == right.shape and tensor.device == right.device
            if right.is_floating_point():
                assert ratio(tensor, right) <= TOLERANCES[right.dtype].ratio + found.backends[backend].rounding
            else:
                assert torch.equal(tensor, right)


def deviations(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> list[str]:
    """Outputs further from the definition than the tolerance of their dtype; integers have to be equal."""
    assert len(got) == len(exact)
    wrong = []
    for index, (tensor, right) in enumerate(zip(got, exact, strict=True)):
        assert tensor.shape == right.shape
        if tensor.is_floating_point():
            assert right.dtype == torch.float64
            if not ratio(tensor, right) <= TOLERANCES[tensor.dtype].ratio:
                wrong.append(f"output {index}: {ratio(tensor, right):.3g}")
        elif not torch.equal(tensor, right):
            wrong.append(f"output {index}: other integers")
    return wrong


@pytest.mark.parametrize(("name", "label"), CASES)
def test_the_reference_agrees_with_the_definition(name, label):
    found, args = available_ops()[name], arguments(name, label)
    assert deviations(found.results(found.reference, *args), found.exact(*args)) == []


@pytest.mark.parametrize("name", available_ops())
def test_a_wrong_definition_is_noticed(name, monkeypatch):
    found = available_ops()[name]
    args = next(found.sample_inputs("cpu"))[1]
    right, reference = found._definition, found.results(found.reference, *args)

    def wrong(*given: Any) -> tuple[torch.Tensor, ...]:
        made = right(*given)
        made = made if isinstance(made, tuple) else (made,)
        return tuple(tensor * 1.01 if tensor.is_floating_point() else tensor + 1 for tensor in made)

    assert deviations(reference, found.exact(*args)) == []
    monkeypatch.setattr(found, "_definition", wrong)
    assert len(deviations(reference, found.exact(*args))) == len(reference)


@pytest.mark.parametrize("name", available_ops())
def test_the_docstrings_are_a_row_of_the_table(name):
    found = available_ops()[name]
    for function in (found.reference, *(backend.run for backend in found.backends.values())):
        assert table.summary(function), f"{name}: {function} has no docstring"
    assert f"| `{name}`" in table.markdown()


def test_the_table_of_the_documents_is_the_printed_one():
    text = (Path(__file__).resolve().parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert f"\n{table.markdown()}\n" in text, "docs/kernels.md: put in the output of `patchkit kernels --markdown`"


@pytest.mark.parametrize("name", available_ops())
def test_an_op_is_a_custom_op_that_torch_compile_sees_around(name):
    found = available_ops()[name]
    args = next(found.sample_inputs("cpu"))[1]
    assert getattr(torch.ops.patchkit, name).default is not None

    def run(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor + 1 for tensor in found.results(found, *given))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert all(map(torch.equal, compiled(*args), run(*args)))
    torch.compiler.reset()


@pytest.mark.parametrize("name", available_ops())
def test_what_an_op_says_of_itself_is_so(name):
    """Which arguments it writes into, that nothing it returns shares their memory, and the shapes it is traced with."""
    args = next(available_ops()[name].sample_inputs("cpu"))[1]
    torch.library.opcheck(getattr(torch.ops.patchkit, name).default, args)


@pytest.mark.parametrize("name", available_ops())
def test_the_reference_can_be_asked_for(name, monkeypatch):
    found = available_ops()[name]
    args = next(found.sample_inputs("cpu"))[1]
    monkeypatch.setenv(VARIABLE, "reference")
    assert found.choose(*args) == "reference"
    assert all(map(torch.equal, found.results(found, *args), found.results(found.reference, *args)))


def test_an_unknown_backend_is_refused_by_name(monkeypatch):
    found = next(iter(available_ops().values()))
    monkeypatch.setenv(VARIABLE, "cuad")
    with pytest.raises(KernelError, match=f"cuad.*{known_backends()[0]}"):
        found(*next(found.sample_inputs("cpu"))[1])


@pytest.fixture
def halve() -> Iterator[Op]:
    def halve(x: torch.Tensor) -> torch.Tensor:
        """``x / 2``, x of any shape."""
        return x / 2

    made = op(halve)
    made.fake(torch.empty_like)
    yield made
    del _ops["halve"]


_calls: list[str] = []


def test_selection_and_no_fallback(halve, monkeypatch):
    """One test for one op: an op cannot be defined twice in a process."""

    @halve.backend("broken", refuses=lambda x: None if len(x) == 3 else "x is not of length 3")
    def _(x):
        raise RuntimeError("the kernel failed")

    @halve.backend("second", refuses=lambda x: None)
    def _(x):
        _calls.append("second")
        return x * 0.5

    assert halve.choose(torch.ones(3)) == "broken" and halve.choose(torch.ones(4)) == "second"
    with pytest.raises(RuntimeError, match="the kernel failed"):  # no fallback to the second, or to the reference
        halve(torch.ones(3))
    assert not _calls and torch.equal(halve(torch.ones(4)), torch.full((4,), 0.5)) and _calls == ["second"]
    monkeypatch.setenv(VARIABLE, "broken")
    with pytest.raises(KernelError, match="x is not of length 3"):
        halve(torch.ones(4))
    monkeypatch.setenv(VARIABLE, "cpu")  # a backend of other ops
    assert halve.choose(torch.ones(4)) == "second"
    monkeypatch.delenv(VARIABLE)
    x = torch.ones(4, requires_grad=True)
    with pytest.raises(KernelError, match="no gradient"):
        halve(x).sum().backward()
    with pytest.raises(KernelError, match="no samples"):
        halve.sample_inputs("cpu")
    with pytest.raises(KernelError, match="no definition"):
        halve.exact(torch.ones(4))
    halve.definition(lambda x: x.double() / 2)
    assert halve.exact(torch.ones(2))[0].tolist() == [0.5, 0.5]


def followed(found: Op, args: tuple[Any, ...]) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What calls that torch transforms give, and what they should, by the name of the transform."""
    x, rest = args[0], args[1:]
    other = x.flip(-1)
    yield "vmap", torch.vmap(lambda each: found(each, *rest))(torch.stack([x, other])), torch.stack([found(x, *rest), found(other, *rest)])
    yield "trace", torch.jit.trace(lambda each: found(each, *rest), x, check_trace=False)(other), found(other, *rest)
    yield "a sign to be applied", found(torch._neg_view(x), *rest), found(-x, *rest)


@pytest.mark.filterwarnings("ignore")  # torch warns of vmap's loop, and of the age of torch.jit
@pytest.mark.parametrize("name", ["gemv", "int8_linear"])
def test_torch_can_follow_calls_without_gradients(name: str) -> None:
    found = available_ops()[name]
    args = next(iter(found.sample_inputs("cpu")))[1]
    with torch.no_grad():
        for transform, got, right in followed(found, args):
            assert ratio(got, right) <= TOLERANCES[right.dtype].ratio, transform


@pytest.mark.parametrize("grad", [False, True])
def test_a_derivative_in_forward_mode_is_refused(grad: bool) -> None:
    found = available_ops()["gemv"]
    x, *rest = next(iter(found.sample_inputs("cpu")))[1]
    with torch.set_grad_enabled(grad), pytest.raises(KernelError, match="no derivative in forward mode"):
        torch.func.jvp(lambda each: found(each, *rest), (x,), (x,))


def test_an_op_that_mutates():
    @op(mutates=("x",))
    def double_in_place(x: torch.Tensor, times: int = 1) -> None:
        """``x = x * 2 ** times``, x of any shape."""
        x.mul_(2**times)

    double_in_place.fake(lambda x, times=1: None)
    try:
        x = torch.ones(3)
        assert double_in_place(x) is None and x.tolist() == [2.0] * 3
        # A clone is written into, wherever the call comes from.
        assert [given.tolist() for given in double_in_place.results(double_in_place, x, 2)] == [[8.0] * 3]
        assert x.tolist() == [2.0] * 3
        double_in_place.definition(lambda x, times=1: x.double().mul_(2**times))
        wide = x.double()
        assert double_in_place.exact(wide, 2)[0].tolist() == [8.0] * 3 and wide.tolist() == [2.0] * 3
        with pytest.raises(KernelError, match="no gradient"):
            double_in_place(torch.ones(3, requires_grad=True))
        with torch.no_grad():
            assert double_in_place(torch.ones(3, requires_grad=True)) is None
    finally:
        del _ops["double_in_place"]


def test_a_definition_without_words_is_refused():
    def undocumented(x: torch.Tensor) -> torch.Tensor:
        return x

    with pytest.raises(KernelError, match="docstring"):
        op(undocumented)
