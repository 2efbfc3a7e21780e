"""torch.compile: its names, its guards, and the code that it keeps."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from packaging.version import Version

from patchkit._compat.declared import Names, check_when_used
from patchkit._compat.names import REMEDY

RELIED_ON: Names = {"torch.compiler:reset": ()}

RELIED_ON_WHEN_USED: Names = {
    "torch.nn:Module._compiled_call_impl": None,
    "torch.compiler:cudagraph_mark_step_begin": (),
    "torch.compiler:list_backends": None,
    "torch._dynamo:mark_static_address": ("t", "guard"),
    "torch._dynamo.exc:TorchDynamoException": None,
    "torch._dynamo.utils:counters": None,
    "torch._inductor.runtime.cache_dir_utils:cache_dir": (),
}

MAY_BE_MISSING = {
    "_compiled_call": "what `generate` of transformers compiles; it is taken away where it is there",
    "_last_compile_config": "of transformers too; it is taken away where it is there",
}


class CompiledCalls:
    """The compiled forwards that a model keeps, set aside while it is patched.

    Two facts force this. A compiled callable does not notice hooks that were added after its compilation; and dynamo keeps
    compiled code by code object, not by callable, so that even a new ``model.compile()`` would run the code of the other state.
    """

    _NAMES = ("_compiled_call", "_compiled_call_impl", "_last_compile_config")

    def __init__(self, model: Any) -> None:
        self._model = model
        self._kept: dict[str, Any] = {}

    def set_aside(self) -> bool:
        """Take the compiled callables off the model and forget all compiled code.

        Returns:
            Whether ``model.compile()`` was in force. What `generate` compiles, it compiles again by itself.
        """
        attributes = vars(self._model)
        self._kept = {name: attributes.pop(name) for name in self._NAMES if name in attributes}
        _forget_compiled_code()
        return self._kept.get("_compiled_call_impl") is not None

    def restore(self) -> None:
        """Drop what was compiled since, and put back what was there before; it compiles again when it is next called."""
        attributes = vars(self._model)
        for name in self._NAMES:
            attributes.pop(name, None)
        attributes.update(self._kept)
        _forget_compiled_code()

    def __getstate__(self) -> dict[str, Any]:
        # A compiled callable cannot be pickled, and a deep copy of one would run the first model.
        return {"_model": self._model, "_kept": {}}


def _forget_compiled_code() -> None:
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


# Guards of dynamo that ask whether hooks were added, attributes were set on a module, or functions were replaced.
_DROPPED_GUARDS = {
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "NOT_PRESENT_IN_GENERIC_DICT",
    "HASATTR",
    "DICT_NOT_CONTAINS",
    "CLOSURE_MATCH",
    "FUNCTION_MATCH",
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "MODULE_MATCH",
}


def compiler_check() -> None:
    """Check the names of torch.compile that the patch `compile` relies on, once.

    Raises:
        PatchError: a name is missing or has changed.
    """
    check_when_used("compiler", "torch", REMEDY)


def compiler_backends() -> list[str]:
    """The backends of torch.compile, debugging ones included."""
    return list(torch.compiler.list_backends(exclude_tags=()))


def compile_errors() -> tuple[type[Exception], ...]:
    """The exceptions that torch.compile raises when something does not compile."""
    from torch._dynamo.exc import TorchDynamoException

    return (TorchDynamoException,)


def graphs_compiled() -> int:
    """Number of graphs that dynamo has compiled in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def inductor_cache() -> str:
    """The folder in which inductor keeps compiled code between runs (TORCHINDUCTOR_CACHE_DIR)."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir()


def mark_static_address(tensor: torch.Tensor) -> None:
    """Tell CUDA graphs that ``tensor`` stays where it is, and may be written in place."""
    torch._dynamo.mark_static_address(tensor, guard=False)


def guard_options(own_weights: bool) -> dict[str, Any]:
    """The option of torch.compile that leaves guards out (`kept_guards`); none on torch 2.8, which fails on guards about missing names.

    Args:
        own_weights: the compiled code is called with the same weights every time.
    """
    kept = functools.partial(kept_guards, own_weights=own_weights)
    return {"guard_filter_fn": kept} if Version(torch.__version__).release >= (2, 9) else {}


def kept_guards(guards: Any, own_weights: bool) -> list[bool]:
    """Return, for each guard of compiled code, whether it is checked at every call.

    Two guards of each weight that is a subclass of a tensor call Python. Those of a class with a true ``fixed_context`` always hold in
    code that has weights of its own.
    """
    fixed = {
        guard.name
        for guard in guards
        if own_weights and guard.guard_type == "TENSOR_SUBCLASS_METADATA_MATCH" and getattr(type(guard.value), "fixed_context", False)
    }
    held = fixed | {f"{name}.__tensor_flatten__()[0]" for name in fixed}
    python = ("TENSOR_SUBCLASS_METADATA_MATCH", "EQUALS_MATCH")
    return [guard.guard_type not in _DROPPED_GUARDS and not (guard.guard_type in python and guard.name in held) for guard in guards]
