"""Modules of torch: their registries of parameters, buffers, submodules and hooks, and the call that runs hooks and forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchkit._compat.declared import Names

if TYPE_CHECKING:
    import torch
    from torch import nn

RELIED_ON: Names = {
    "torch.nn:Module()._parameters": None,
    "torch.nn:Module()._buffers": None,
    "torch.nn:Module()._modules": None,
    "torch.nn:Module()._forward_pre_hooks": None,
    "torch.nn:Module()._forward_hooks": None,
    "torch.nn:Module._call_impl": None,
    "torch.nn:Module._compiled_call_impl": None,
    "torch.nn:Module()._non_persistent_buffers_set": None,
    "torch:Tensor._version": None,
}

# The attribute of a module that holds the function that runs in the place of a call, hooks included. Copies and pickles leave it out.
COMPILED_CALL = "_compiled_call_impl"

MAY_BE_MISSING = {"_orig_mod": "it is looked for on what a caller gives"}

_REGISTRIES = ("_parameters", "_buffers", "_modules")


def registry_with(obj: object, name: str) -> str | None:
    """The name of the registry of a module that holds ``name``: parameters, buffers or submodules. None for a plain attribute."""
    return next((registry for registry in _REGISTRIES if name in getattr(obj, registry, ())), None)


def is_compiled_copy(model: object) -> bool:
    """Whether ``model`` is what ``torch.compile(model)`` returns, a module around the model (``_orig_mod``)."""
    return hasattr(model, "_orig_mod")


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """The parameters that ``module`` itself holds, by name; a value of this dictionary can be replaced."""
    return _plain(module._parameters)


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """The buffers that ``module`` itself holds, by name; a value of this dictionary can be replaced."""
    return _plain(module._buffers)


def _plain(registry: Any) -> dict[str, Any]:
    # compressed-tensors has a mapping of its own here, which copies what is assigned into the tensor that it holds.
    plain: dict[str, Any] = getattr(registry, "offloaded_values", registry)
    return plain


def weights_and_modules(model: nn.Module) -> tuple[list[Any], list[nn.Module]]:
    """The parameters and saved buffers of ``model``, each once, and its modules. Quicker than torch's own iterators."""
    tensors: dict[int, Any] = {}
    modules: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) in modules:
            continue
        modules[id(module)] = module
        for parameter in module._parameters.values():
            if parameter is not None:
                tensors[id(parameter)] = parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                tensors[id(buffer)] = buffer
        waiting += [child for child in module._modules.values() if child is not None]
    return list(tensors.values()), list(modules.values())


def forward_hooks_of(module: nn.Module) -> tuple[int, ...]:
    """The ids of the hooks before and after the forward of ``module``."""
    return *module._forward_pre_hooks, *module._forward_hooks


def forward_pre_hooks_of(module: nn.Module) -> list[Any]:
    """The functions that run before the forward of ``module``."""
    return list(module._forward_pre_hooks.values())


def run_hooks_and_forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The call of ``module``, its hooks and its forward, without the function that is in `COMPILED_CALL`."""
    return module._call_impl(*args, **kwargs)


def version_of(tensor: torch.Tensor) -> int:
    """Number of times that ``tensor`` was written to in place; 0 for a tensor of inference mode, which does not count that."""
    return 0 if tensor.is_inference() else tensor._version
