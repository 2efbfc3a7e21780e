"""Op: a reference function in plain PyTorch with faster backends, each of which refuses, with a reason, the calls that it cannot serve.

    @op
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @double.fake                                  # shapes and dtypes, for torch.compile
    def _(x): return torch.empty_like(x)

    @double.samples                               # inputs of the contract tests
    def _(device): yield "a vector", (torch.randn(7, device=device),)

    @double.definition                            # float64, by other means than the reference: what all forms are compared with
    def _(x): return x.double() + x.double()

    @double.backend("triton", refuses=lambda x: None if x.is_cuda else "x is not on a CUDA device")
    def _(x): ...

The docstrings of the reference and of the backends begin with one line that can be read alone: `patchkit kernels --markdown` prints them.

An op is a `torch.library` custom op, ``torch.ops.patchkit.double``: torch.compile calls it without a graph break. One that writes into
its arguments names them, ``@op(mutates=("x",))``, and returns nothing, or new tensors.

Which backend runs is decided before it runs, by predicates alone, and a backend that then fails raises: nothing falls back.
The environment variable ``PATCHKIT_KERNELS`` chooses among them, at every call:

* ``auto`` (default): the first backend, in the order of definition, that serves the call; else the reference.
* ``reference``: always the reference.
* ``cpu``, ``triton``, ...: that backend where the op has it, and an error where it refuses; an op without it, as in ``auto``.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, overload

import torch

from patchkit._compat.products import ENVIRONMENT, has_tangent, is_dispatch_watched, is_plain
from patchkit.errors import KernelError
from patchkit.kernels.native import load_direct

VARIABLE = "PATCHKIT_KERNELS"
_KEY: Any = os.environ.encodekey(VARIABLE)
_LIBRARY = torch.library.Library("patchkit", "FRAGMENT")
_ops: dict[str, Op] = {}

Samples = Callable[[torch.device], Iterator[tuple[str, tuple[Any, ...]]]]
Definition = Callable[..., "torch.Tensor | tuple[torch.Tensor, ...]"]


@dataclass(frozen=True)
class Backend:
    """A faster form of an op.

    Attributes:
        refuses: function of the op's arguments; it returns the reason why the backend cannot serve them, or None.
        rounding: relative RMSE that the backend's method costs, beyond the tolerance of the output's dtype.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[..., str | None]
    rounding: float = 0.0


class Op:
    """A callable custom op. Made by `op`.

    Attributes:
        name: as in ``torch.ops.patchkit.<name>``.
        reference: the op in plain torch, with sums in fp32.
        mutates: the names of the arguments that it writes into.
        backends: the faster forms by name, in order of preference.
    """

    def __init__(self, reference: Callable[..., Any], mutates: tuple[str, ...] = ()) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.mutates = mutates
        self.backends: dict[str, Backend] = {}
        self.__doc__ = reference.__doc__
        self._arguments = list(inspect.signature(reference).parameters)
        self._samples: Samples | None = None
        self._definition: Definition | None = None
        self._schema = torch.library.infer_schema(reference, mutates_args=mutates)
        self._fake: Callable[..., Any] | None = None
        self._direct: Callable[..., Any] | None = None
        self._serves_directly: Callable[..., bool] | None = None
        _LIBRARY.define(self.name + self._schema)
        _LIBRARY.impl(self.name, self._dispatch, "CompositeExplicitAutograd")
        self._call = getattr(torch.ops.patchkit, self.name).default
        self._backward: Callable[..., Any] = self._no_gradient
        self._setup_context: Callable[..., None] | None = None
        if not mutates:  # torch takes no gradient for an op that mutates; `__call__` refuses it instead
            # Once: torch warns of a gradient that takes the place of another.
            torch.library.register_autograd(
                f"patchkit::{self.name}", self._run_backward, setup_context=self._run_setup_context, lib=_LIBRARY
            )
        _ops[self.name] = self

    def __call__(self, *args: Any) -> Any:
        if self.mutates and torch.is_grad_enabled() and any(torch.is_tensor(arg) and arg.requires_grad for arg in args):
            self._no_gradient(None)
        # The dispatcher costs 50 microseconds of Python per call. Nobody but these can want to see the call pass through it.
        if torch.compiler.is_compiling():
            direct = self._is_direct() and args[0].is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_exporting()
            return (self._direct if direct else self._call)(*args)  # type: ignore[misc]
        if torch.is_grad_enabled() or is_dispatch_watched() or _holds_wrapper(args):
            if any(torch.is_tensor(arg) and has_tangent(arg) for arg in args):  # torch would give a derivative of zero
                raise KernelError(f"patchkit's op {self.name} has no derivative in forward mode: unpatch_model before jvp")
            return self._call(*args)
        if self._is_direct() and self._serves_directly(*args):  # type: ignore[misc]
            return self._direct(*args)  # type: ignore[misc]
        return self._dispatch(*args)

    def direct(self, serves: Callable[..., bool]) -> Callable[..., bool]:
        """Decorator: the op has a direct form, ``native/<name>_direct.cpp``, for calls of which ``serves`` is true.

        torch calls it without Python in between, which saves some 60 microseconds per call of compiled code and 10 of other code. It
        gives the bits of the backend "native", and hands calls that it does not serve to the op. `load_direct` puts it in force.
        """
        assert self._fake is not None, f"define the fake of {self.name} before its direct form"
        _LIBRARY.define(f"{self.name}_direct{self._schema}")
        torch.library.register_fake(f"patchkit::{self.name}_direct", self._fake, lib=_LIBRARY)
        self._serves_directly = serves
        return serves

    @property
    def form(self) -> str:
        """Name under which code of a CPU calls this op: of its direct form, if that is loaded and `VARIABLE` leaves the choice."""
        return f"{self.name}_direct" if self._is_direct() else self.name

    def _is_direct(self) -> bool:
        return self._direct is not None and _KEY not in ENVIRONMENT

    def load_direct(self) -> str | None:
        """Compile (once per machine) and load the direct form; return the reason where there is none, and the op works as before."""
        if self._serves_directly is None:
            return f"{self.name} has no direct form"
        if self._direct is None and (reason := load_direct(self.name)) is not None:
            return reason
        self._direct = getattr(torch.ops.patchkit, f"{self.name}_direct").default
        return None

    def backend(
        self, name: str, refuses: Callable[..., str | None], rounding: float = 0.0
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator: attach a backend. ``refuses`` and ``rounding`` are described at `Backend`."""

        def attach(run: Callable[..., Any]) -> Callable[..., Any]:
            self.backends[name] = Backend(name, run, refuses, rounding)
            return run

        return attach

    def fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: shapes, dtypes and devices of the outputs, as in `torch.library.register_fake`."""
        torch.library.register_fake(f"patchkit::{self.name}", function, lib=_LIBRARY)
        self._fake = function
        return function

    def autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None] | None = None) -> None:
        """Register the gradient as `torch.library.register_autograd` does. An op without one raises where a gradient is needed."""
        self._backward, self._setup_context = backward, setup_context

    def samples(self, function: Samples) -> Samples:
        """Decorator: a generator of (label, arguments) on a device, the typical case first, then ugly shapes and every dtype."""
        self._samples = function
        return function

    def sample_inputs(self, device: torch.device | str) -> Iterator[tuple[str, tuple[Any, ...]]]:
        """Labels and arguments of the op's samples on a device.

        Raises:
            KernelError: the op has no samples.
        """
        if self._samples is None:
            raise KernelError(
                f"the op {self.name!r} has no samples: define them with @{self.name}.samples, no test could hold it otherwise"
            )
        return self._samples(torch.device(device))

    def definition(self, function: Definition) -> Definition:
        """Decorator: the op in float64, sharing no code with the reference; its outputs are ordered like those of `results`."""
        self._definition = function
        return function

    def exact(self, *args: Any) -> tuple[torch.Tensor, ...]:
        """Outputs by the definition: float64 where they are floating point, ordered like those of `results`.

        Raises:
            KernelError: the op has no definition.
        """
        if self._definition is None:
            raise KernelError(f"the op {self.name!r} has no definition in float64: write one with @{self.name}.definition")
        found = self._definition(*self._with_clones(args))
        return found if isinstance(found, tuple) else (found,)

    def explain(self, *args: Any) -> dict[str, str | None]:
        """Reason of each backend for refusing these arguments, or None where it serves them."""
        return {name: backend.refuses(*args) for name, backend in self.backends.items()}

    def results(self, run: Callable[..., Any], *args: Any) -> tuple[torch.Tensor, ...]:
        """Outputs of ``run``, this op or a form of it, followed by the mutated arguments, which are clones of those given."""
        own = self._with_clones(args)
        returned = run(*own)
        if not isinstance(returned, tuple):
            returned = () if returned is None else (returned,)
        return *returned, *(arg for name, arg in zip(self._arguments, own, strict=False) if name in self.mutates)

    def _with_clones(self, args: tuple[Any, ...]) -> list[Any]:
        return [arg.clone() if name in self.mutates else arg for name, arg in zip(self._arguments, args, strict=False)]

    def choose(self, *args: Any) -> str:
        """Name of the backend, or "reference", that runs for these arguments.

        Raises:
            KernelError: ``PATCHKIT_KERNELS`` names no backend of any op, or one that refuses these arguments.
        """
        wanted = os.environ.get(VARIABLE, "auto")
        if wanted == "reference":
            return wanted
        if wanted in self.backends:
            reason = self.backends[wanted].refuses(*args)
            if reason is not None:
                raise KernelError(f"{VARIABLE}={wanted}, but the {wanted} backend of {self.name} refuses: {reason}. Use {VARIABLE}=auto")
            return wanted
        if wanted != "auto" and wanted not in known_backends():
            raise KernelError(f"{VARIABLE}={wanted} is unknown: use auto, reference, {' or '.join(known_backends())}")
        return next((name for name, backend in self.backends.items() if backend.refuses(*args) is None), "reference")

    def _dispatch(self, *args: Any) -> Any:
        name = self.choose(*args)
        return (self.reference if name == "reference" else self.backends[name].run)(*args)

    def _run_backward(self, ctx: Any, *gradients: Any) -> Any:
        return self._backward(ctx, *gradients)

    def _run_setup_context(self, ctx: Any, inputs: Any, output: Any) -> None:
        if self._setup_context is not None:
            self._setup_context(ctx, inputs, output)

    def _no_gradient(self, ctx: Any, *gradients: Any) -> Any:
        raise KernelError(f"patchkit's op {self.name} has no gradient: run it under torch.no_grad(); unpatch_model before training a model")


def _holds_wrapper(args: tuple[Any, ...]) -> bool:
    """Whether one of the arguments is a tensor whose memory the dispatcher has to unwrap."""
    return any(isinstance(arg, torch.Tensor) and not is_plain(arg) for arg in args)


@overload
def op(reference: Callable[..., Any]) -> Op: ...
@overload
def op(*, mutates: tuple[str, ...]) -> Callable[[Callable[..., Any]], Op]: ...
def op(reference: Callable[..., Any] | None = None, *, mutates: tuple[str, ...] = ()) -> Any:
    """Decorator: an `Op` from its reference function, which is annotated with tensors and plain types.

    Args:
        mutates: the names of the tensors that it writes into; it returns none of them.

    Raises:
        KernelError: the function has no docstring, where shapes, dtypes and the equation belong.
    """
    if reference is None:
        return functools.partial(op, mutates=mutates)
    if not inspect.getdoc(reference):
        raise KernelError(f"the op {reference.__name__!r} has no docstring: describe its result, with shapes and dtypes")
    return Op(reference, mutates)


def available_ops() -> dict[str, Op]:
    """All ops by name, sorted. Imports every module of `patchkit/kernels/` and its folder `research`; there is no list to edit."""
    for name in ("patchkit.kernels", "patchkit.kernels.research"):
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
            importlib.import_module(f"{name}.{module.name}")
    return dict(sorted(_ops.items()))


def known_backends() -> list[str]:
    """Names of all backends of all ops, sorted."""
    return sorted({name for found in available_ops().values() for name in found.backends})
