"""Handle: the only way to edit a model. It remembers every edit and undoes them last-in-first-out."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from patchkit._compat.modules import registry_with
from patchkit.errors import IrreversiblePatch, PatchError
from patchkit.record import Named, Record

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.hooks import RemovableHandle


class Handle:
    """The edits of one `patch_model` call.

    `patch_model` makes one handle and gives every patch its own (`for_patch`), with the same undo stack and a record of its own.

    A patched model can be copied (`copy.deepcopy`) and pickled, and the copy can be unpatched on its own. That holds because
    every function that a patch leaves on the model, as a hook, an attribute or an undo step, is a module-level function, a
    `functools.partial` over one, or a bound method: deepcopy and pickle carry those over to the copy. A lambda or a function
    defined inside another would go on working for the first model, so the handle refuses it. A hook that counts is best given
    `handle.record.hits`, not the handle, which would drag the whole model into a copy of one module.

    Attributes:
        model: the patched model.
        record: where the patch tells what it did; also its run-time counters and warnings.
        records: on the first handle, the records of all patches, in the order of application.
        final: why the edits can no longer be undone; None while they can.
    """

    def __init__(self, model: nn.Module | None = None, record: Record | None = None) -> None:
        self.model = model
        self.record = record or Record()
        self.records: list[Record] = []
        self.final: str | None = None
        self._steps: list[Callable[[], object]] = []
        self._last: list[tuple[str, Callable[[], object]]] = []

    def for_patch(self, patch: Named) -> Handle:
        """A handle for one patch, with this handle's undo stack and a new record."""
        own = Handle(self.model, Record(patch))
        own._steps, own._last = self._steps, self._last
        self.records.append(own.record)
        return own

    def pre_hook(self, module: nn.Module, fn: Callable[..., Any], **kw: Any) -> None:
        """`module.register_forward_pre_hook(fn, **kw)`; `kw` is `prepend` and `with_kwargs`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_forward_pre_hook(fn, **kw)))

    def hook(self, module: nn.Module, fn: Callable[..., Any], **kw: Any) -> None:
        """`module.register_forward_hook(fn, **kw)`; `kw` is `prepend`, `with_kwargs` and `always_call`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_forward_hook(fn, **kw)))

    def state_dict_hook(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """`module.register_state_dict_post_hook(fn)`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_state_dict_post_hook(fn)))

    def set_attribute(self, obj: object, name: str, value: Any) -> None:
        """Set an instance attribute; undo restores the old instance value, or deletes the attribute where there was none.

        On an `nn.Module` the value stays a plain attribute whatever its type, so a module or a parameter set this way is not
        in `state_dict`. A property is set, and restored, through its setter.

        Raises:
            PatchError: `name` is a parameter, a buffer or a submodule; swap those yourself and give `on_undo` the way back.
                Or `value` is a function that a copy of the model could not take along.
        """
        _require_portable(value, f"value of {name}")
        # Pickle stores such a method as a name to look up on obj, and would load the class's own method instead.
        if isinstance(value, types.MethodType) and value.__self__ is obj:
            raise PatchError(
                f"the value of {name} is a method bound to the object it is set on, which pickle cannot store: "
                f"use functools.partial({value.__func__.__qualname__}, obj)."
            )
        registry = registry_with(obj, name)
        if registry is not None:
            raise PatchError(
                f"{type(obj).__name__}.{name} is in {registry}: set_attribute is for plain attributes. "
                "Swap it in that dictionary and give handle.on_undo the way back."
            )
        attributes = vars(obj)
        old = attributes[name] if name in attributes else getattr(obj, name, None)
        existed = name in attributes
        _set_plain(obj, name, value)
        # A property, or a config's alias, redirects the write: there is nothing of this name to delete, only a value to set back.
        if existed or name not in attributes:
            self._steps.append(functools.partial(_set_plain, obj, name, old))
        else:
            self._steps.append(functools.partial(_delete_plain, obj, name))

    def set_shared(self, obj: object, name: str, value: Any, original: Any = None) -> None:
        """`set_attribute` on an object that several patched models may share, a config: undo waits for the last of them.

        While some are patched, the value is that of the one patched last.

        Args:
            original: what the last of them leaves there; None for what is there now.
        """
        token = _Token()
        with _shared_guard:
            found = _shared.get((id(obj), name))
            if found is None or found.obj() is not obj:
                before = getattr(obj, name, _MISSING) if original is None else original
                found = _shared[id(obj), name] = _Shared(weakref.ref(obj), before, {})
            found.values[token] = value
            setattr(obj, name, value)
        self._steps.append(functools.partial(_release, obj, name, token, found.original))

    def on_undo(self, callback: Callable[[], object]) -> None:
        """Any other edit brings its own way back: `on_undo(functools.partial(put_back, module, weight))`.

        Call it before the edit if the edit can fail half-way.
        """
        _require_portable(callback, "undo step")
        self._steps.append(callback)

    def make_final(self, why: str, discard: Callable[[], object]) -> None:
        """When all patches have been applied, ``discard`` what undoing would need; `unpatch_model` then refuses, saying ``why``."""
        self._last.append((why, discard))

    def commit(self) -> None:
        """All patches are applied: counters start, and what was to be discarded is."""
        for record in self.records:
            record.start()
        for why, discard in self._last:
            self.final = why
            discard()
        self._last.clear()

    def undo(self) -> None:
        """Undo every edit, last first. Every step runs, even after one has failed; a second call does nothing.

        Raises:
            IrreversiblePatch: the edits are final, and nothing was undone; or at least one step failed: the message lists the
                failures, the first is the cause.
        """
        if self.final is not None:
            raise IrreversiblePatch(self.final)
        failures: list[BaseException] = []
        while self._steps:
            step = self._steps.pop()
            try:
                step()
            except BaseException as error:
                failures.append(error)
        for failure in failures:
            if not isinstance(failure, Exception):
                raise failure
        if failures:
            listed = "; ".join(f"{type(failure).__name__}: {failure}" for failure in failures)
            raise IrreversiblePatch(
                f"{len(failures)} undo step(s) failed ({listed}). All others ran, but the model may not be what it was: load it again."
            ) from failures[0]


class _Token:
    """One use of a shared attribute. A copy of it is another one."""


class _Missing:
    """In the place of the value of an attribute that was not there; a copy of it says the same."""


_MISSING = _Missing()


class _Shared(NamedTuple):
    """An attribute that patched models share: on what, its value before the first of them, and the value of each."""

    obj: weakref.ReferenceType[Any]
    original: Any
    values: dict[_Token, Any]


_shared: dict[tuple[int, str], _Shared] = {}
_shared_guard = threading.Lock()


def _release(obj: object, name: str, token: _Token, original: Any) -> None:
    with _shared_guard:
        found = _shared.get((id(obj), name))
        if found is None or found.obj() is not obj or token not in found.values:  # of a copy, which nobody else has
            if found is None or found.obj() is not obj or not found.values:
                _put_back(obj, name, original)
            return
        del found.values[token]
        if found.values:
            setattr(obj, name, list(found.values.values())[-1])
        else:
            _put_back(obj, name, found.original)
            del _shared[id(obj), name]


def _put_back(obj: object, name: str, original: Any) -> None:
    if isinstance(original, _Missing):
        _delete_plain(obj, name)
    else:
        setattr(obj, name, original)


def _remove_hook(removable: RemovableHandle) -> None:
    removable.remove()


def _set_plain(obj: object, name: str, value: Any) -> None:
    from torch import nn

    # nn.Module.__setattr__ would register a module or a parameter, and so change state_dict.
    if isinstance(obj, nn.Module):
        object.__setattr__(obj, name, value)
    else:
        setattr(obj, name, value)


def _delete_plain(obj: object, name: str) -> None:
    vars(obj).pop(name, None)


def _require_portable(value: Any, what: str) -> None:
    function = value
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, types.FunctionType) and "<" in function.__qualname__:
        raise PatchError(
            f"the {what} is {function.__qualname__}, which a copy or a pickle of the model could not take along: "
            "use a module-level function, or functools.partial over one with what it needs."
        )
