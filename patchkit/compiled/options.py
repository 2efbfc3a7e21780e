"""The options of the patch `compile`, and those of torch.compile that follow from them."""

from __future__ import annotations

from typing import Any, Protocol

from patchkit import _compat


class Options(Protocol):
    """The options of the patch `compile`."""

    @property
    def mode(self) -> str: ...
    @property
    def fullgraph(self) -> bool: ...
    @property
    def cudagraphs(self) -> bool: ...
    @property
    def backend(self) -> str: ...
    @property
    def scope(self) -> str: ...


def uses_cudagraphs(patch: Options, decoder: Any) -> bool:
    """Whether steps of this decoder are recorded as CUDA graphs."""
    return patch.cudagraphs or (patch.mode == "reduce-overhead" and decoder.device.type == "cuda")


def compiler_options(patch: Options, decoder: Any) -> dict[str, Any]:
    """Return ``options`` for torch.compile; ``mode`` is spelled out among them, since torch.compile accepts only one of the two."""
    # Layers share the code of their kind; what follows a graph break may be shared too, with other models even.
    options: dict[str, Any] = _compat.guard_options(own_weights=patch.scope == "model" and patch.fullgraph)
    if patch.backend == "inductor":
        options.update({"size_asserts": False, "nan_asserts": False, "scalar_asserts": False})
        options["triton.cudagraphs"] = uses_cudagraphs(patch, decoder)
        if patch.mode == "max-autotune":
            options.update({"max_autotune": True, "coordinate_descent_tuning": True})
        if patch.mode == "reduce-overhead" and decoder.device.type == "cpu":
            options["cpp_wrapper"] = True
    return options
