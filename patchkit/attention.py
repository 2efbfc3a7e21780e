"""How patchkit puts a function of its own between a model and its attention: by name, per model, reversibly.

transformers looks the attention function up by ``config._attn_implementation`` at every call, and the function that
builds the mask by the same name. `alias_of` registers, for an implementation such as ``"sdpa"``, one alias that

* runs ``module._patchkit_attention(original, module, query, ...)`` on the attention modules that carry that attribute
  (a patch sets it through its `Handle`), and the original implementation, bit for bit, on every other module; so two
  models may share a config and only one of them be patched;
* builds the original's mask, unless a patched forward is under way that makes its own (`swap_mask_builder`).

The alias has the original encoded in its name, because nothing but the module and the config reaches these functions.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.errors import UnsupportedModel

AttentionOutput = tuple[torch.Tensor, torch.Tensor | None]
AttentionFunction = Callable[..., AttentionOutput]
MaskBuilder = Callable[[], torch.Tensor | None]

_this_thread = threading.local()


def alias_of(implementation: str) -> str:
    """The registered name under which ``implementation`` runs with patchkit's functions in front of it.

    The name avoids "sdpa", "flash" and "flex", which transformers looks for as substrings and treats specially.
    """
    alias = f"patchkit_{zlib.crc32(implementation.encode()):08x}"
    _compat.register_attention(alias, _in_front_of(implementation), _mask_of(implementation))
    return alias


def swap_mask_builder(builder: MaskBuilder | None) -> MaskBuilder | None:
    """From now on, in this thread, an alias's masks come from ``builder`` (None: from the original's function).

    Returns the builder that was in force, for the caller to put back when its forward ends.
    """
    before = getattr(_this_thread, "builder", None)
    _this_thread.builder = builder
    return before


@contextlib.contextmanager
def recorded(on_call: Callable[[dict[str, Any]], None], on_mask: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within this context (and thread) every attention call under an alias, and every mask built, is shown to the callbacks."""
    _this_thread.recorders = on_call, on_mask
    try:
        yield
    finally:
        _this_thread.recorders = None


def original_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """The attention function that ``module`` would call under ``implementation``.

    ``"eager"`` is not in transformers' registry: each modeling file defines its own.

    Raises:
        UnsupportedModel: an eager implementation is wanted, and the module's file defines none.
    """
    if implementation != "eager":
        return _compat.attention_function(implementation)
    for cls in type(module).__mro__:
        eager = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise UnsupportedModel(
        f"{type(module).__name__} has no eager attention function in its modeling file. Load the model with attn_implementation='sdpa'."
    )


def _in_front_of(implementation: str) -> AttentionFunction:
    def attention(
        module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> AttentionOutput:
        original = original_function(implementation, module)
        recorders = getattr(_this_thread, "recorders", None)
        if recorders is not None:
            recorders[0](dict(module=module, query=query, key=key, value=value, attention_mask=attention_mask, kwargs=kwargs))
        ours = module.__dict__.get("_patchkit_attention")
        if ours is None:
            return original(module, query, key, value, attention_mask, **kwargs)
        return ours(original, module, query, key, value, attention_mask, **kwargs)

    return attention


def _mask_of(implementation: str) -> Callable[..., torch.Tensor | None]:
    def mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
        builder = getattr(_this_thread, "builder", None)
        if builder is not None:
            return builder()
        built = _compat.mask_function(implementation)(*args, **kwargs)
        recorders = getattr(_this_thread, "recorders", None)
        if recorders is not None and torch.is_tensor(built):
            recorders[1](built)
        return built

    return mask
