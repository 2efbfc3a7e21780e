"""A model as the scheduler needs it, patched with `speculative`, and back."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

from patchkit.api import patch_model, unpatch_model
from patchkit.errors import PatchConflict
from patchkit.handle import ATTRIBUTE

# Without drafts: rows only join and leave.
WITHOUT_DRAFTS = "speculative(k=0)"

_served: weakref.WeakSet[Any] = weakref.WeakSet()
_lock = threading.Lock()


def base_of(model: Any) -> Any:
    """Return the transformers model itself, without PEFT's wrapper."""
    return model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model


def claim(model: Any) -> None:
    """Reserve a model for one server, until `release`.

    Raises:
        PatchConflict: another server has it.
    """
    with _lock:
        if model in _served:
            raise PatchConflict(f"another server runs this {type(model).__name__}: stop that one, or load the model a second time")
        _served.add(model)


def release(model: Any) -> None:
    """Let another server have a model."""
    with _lock:
        _served.discard(model)


def make_speculative(model: Any) -> Callable[[], Any]:
    """Patch a model with `speculative`, without drafts, unless it is patched with it already; return what undoes that.

    Other patches of the model stay; they are applied again, so their counters start at 0.

    Raises:
        PatchConflict: the model has a patch that cannot be undone.
        UnsupportedModel: the model cannot be speculated on.
    """
    handle = vars(model).get(ATTRIBUTE)
    if handle is None:
        patch_model(model, WITHOUT_DRAFTS, verbose=False)
        return functools.partial(unpatch_model, model)
    present = [record.patch for record in handle.records if record.patch is not None]
    if any(patch.name == "speculative" for patch in present):
        return _nothing
    if handle.final is not None:
        raise PatchConflict(f"this model cannot be patched again: load it again, and add {WITHOUT_DRAFTS} to its patches")
    unpatch_model(model)
    try:
        patch_model(model, *present, WITHOUT_DRAFTS, verbose=False)
    except Exception:
        patch_model(model, *present, verbose=False)
        raise
    return functools.partial(unpatch_model, model, "speculative")


def _nothing() -> None:
    """The undoing of nothing."""
