"""Handle: a stack of all edits of one model, by which they are undone. Patches edit models only through it."""

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


# The instance attribute of a patched model that holds its root Handle.
ATTRIBUTE = "_patchkit"


class Handle:
    """The edits of one `patch_model` call.

    `patch_model` makes one handle and gives every patch its own (`for_patch`), with the same undo stack and a separate record.

    A patched model can be copied (`copy.deepcopy`) and pickled, and the copy can be unpatched independently. For that, every function
    that a patch puts on the model, as a hook, an attribute or an undo step, must be a module-level function, a `functools.partial` over
    one, or a bound method: deepcopy and pickle rebind those to the copy. A lambda or a nested function would still refer to the first
    model, so the handle refuses it. Give a hook that counts `handle.record.hits`, not the handle, which would bring the whole model into
    a copy of one module.

    Attributes:
        model: the patched model.
        record: the patch's report of its changes, with its run-time counters and warnings.
        records: on the first handle, the records of all patches, in the order of application.
        final: the reason why the edits can no longer be undone; None while they can.
    """

    def __init__(self, model: nn.Module | None = None, record: Record | None = None) -> None:
        self.model = model
        self.record = record or Record()
        self.records: list[Record] = []
        self.final: str | None = None
        self._steps: list[Callable[[], object]] = []
        self._last: list[tuple[str, Callable[[], object]]] = []
        self._refreshers: list[Callable[[bool], bool]] = []

    def for_patch(self, patch: Named) -> Handle:
        """Make a handle for one patch, with this handle's undo stack and a new record."""
        own = Handle(self.model, Record(patch))
        own._steps, own._last, own._refreshers = self._steps, self._last, self._refreshers
        self.records.append(own.record)
        return own

    def pre_hook(self, module: nn.Module, fn: Callable[..., Any], **kw: Any) -> None:
        """Register a forward pre-hook: `module.register_forward_pre_hook(fn, **kw)`; `kw` is `prepend` and `with_kwargs`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_forward_pre_hook(fn, **kw)))

    def hook(self, module: nn.Module, fn: Callable[..., Any], **kw: Any) -> None:
        """Register a forward hook: `module.register_forward_hook(fn, **kw)`; `kw` is `prepend`, `with_kwargs` and `always_call`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_forward_hook(fn, **kw)))

    def state_dict_hook(self, module: nn.Module, fn: Callable[..., Any]) -> None:
        """Register a state-dict hook: `module.register_state_dict_post_hook(fn)`."""
        _require_portable(fn, "hook")
        self._steps.append(functools.partial(_remove_hook, module.register_state_dict_post_hook(fn)))

    def set_attribute(self, obj: object, name: str, value: Any) -> None:
        """Set an instance attribute; undo restores the old instance value, or deletes the attribute where there was none.

        On an `nn.Module` the value stays a plain attribute whatever its type, so a module or a parameter set this way is not
        in `state_dict`. A property is set, and restored, through its setter.

        Raises:
            PatchError: `name` is a parameter, a buffer or a submodule, to be replaced directly, with an undo step for `on_undo`;
                or `value` is a function that a copy or pickle of the model cannot hold.
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
                "Replace it in that dictionary and give handle.on_undo a step that restores it."
            )
        attributes = vars(obj)
        old = attributes[name] if name in attributes else getattr(obj, name, None)
        existed = name in attributes
        _set_plain(obj, name, value)
        # A property, or a config's alias, redirects the write: there is no attribute of this name to delete, only a value to restore.
        if existed or name not in attributes:
            self._steps.append(functools.partial(_set_plain, obj, name, old))
        else:
            self._steps.append(functools.partial(_delete_plain, obj, name))

    def set_shared(self, obj: object, name: str, value: Any, original: Any = None) -> None:
        """Set an attribute of an object that several patched models may share, such as a config; the last of them to be undone restores it.

        Until then, the value is that of the model patched last.

        Args:
            original: the value to restore; None for the present one.
        """
        token = _Token()
        with _shared_guard:
            found = _shared.get((id(obj), name))
            if found is None or found.obj() is not obj:
                before = getattr(obj, name, _MISSING) if original is None else original
                forget = functools.partial(_forget, (id(obj), name))
                found = _shared[id(obj), name] = _Shared(weakref.ref(obj, forget), before, {})
            found.values[token] = value
            setattr(obj, name, value)
        self._steps.append(functools.partial(_release, obj, name, token, found.original))

    def on_undo(self, callback: Callable[[], object]) -> None:
        """Add an undo step for any other edit: `on_undo(functools.partial(restore, module, weight))`.

        Call it before the edit if the edit can fail half-way.
        """
        _require_portable(callback, "undo step")
        self._steps.append(callback)

    def on_refresh(self, callback: Callable[[bool], bool]) -> None:
        """Register the function that derives again what a patch has derived from the model's weights, for `patchkit.refresh`.

        It takes ``thorough``, as `refresh` does, and returns whether anything was out of date.
        """
        _require_portable(callback, "refresh step")
        self._refreshers.append(callback)

    def refresh(self, thorough: bool = False) -> bool:
        """Bring what all patches have derived from the model's weights up to date. Returns whether anything was not.

        Args:
            thorough: derive it again even where no sign of a change is seen.
        """
        return any([callback(thorough) for callback in self._refreshers])

    def make_final(self, why: str, discard: Callable[[], object]) -> None:
        """Discard what undoing would need, by ``discard()`` once all patches are applied; `unpatch_model` then refuses with ``why``."""
        self._last.append((why, discard))

    def commit(self) -> None:
        """Start the counters and run the steps of `make_final`, after all patches have been applied."""
        for record in self.records:
            record.start()
        for why, discard in self._last:
            self.final = why
            discard()
        self._last.clear()

    def undo(self) -> None:
        """Undo every edit, last first. Every step runs, even after one has failed; a second call does nothing.

        Raises:
            IrreversiblePatch: the edits are final, and nothing was undone; or at least one step failed. The message then lists the
                failures, and the first is the cause.
        """
        if self.final is not None:
            raise IrreversiblePatch(self.final)
        self._refreshers.clear()
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


def refresh_patches(model: Any, thorough: bool = False) -> bool:
    """Bring what patches have derived from the weights of ``model`` up to date: `Handle.refresh`. False for an unpatched model."""
    handle = vars(model).get(ATTRIBUTE)
    return isinstance(handle, Handle) and handle.refresh(thorough)


class _Token:
    """An identity of one use of a shared attribute; a copy is another identity."""


class _Missing:
    """A marker for the value of an attribute that did not exist. Copies are recognised by type."""


_MISSING = _Missing()


class _Shared(NamedTuple):
    """An attribute that patched models share: its object, its value before the first of them, and the value of each."""

    obj: weakref.ReferenceType[Any]
    original: Any
    values: dict[_Token, Any]


_shared: dict[tuple[int, str], _Shared] = {}
_shared_guard = threading.Lock()


def _forget(key: tuple[int, str], reference: weakref.ReferenceType[Any]) -> None:
    """Drop the entry of an object that is gone. Without the guard: garbage may be collected while this thread holds it."""
    found = _shared.get(key)
    if found is not None and found.obj is reference:
        _shared.pop(key, None)


def _release(obj: object, name: str, token: _Token, original: Any) -> None:
    with _shared_guard:
        found = _shared.get((id(obj), name))
        if found is None or found.obj() is not obj or token not in found.values:  # the object belongs to a copied model alone
            if found is None or found.obj() is not obj or not found.values:
                _restore(obj, name, original)
            return
        del found.values[token]
        if found.values:
            setattr(obj, name, list(found.values.values())[-1])
        else:
            _restore(obj, name, found.original)
            del _shared[id(obj), name]


def _restore(obj: object, name: str, original: Any) -> None:
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
            f"the {what} is {function.__qualname__}, which a copy or a pickle of the model cannot hold: "
            "use a module-level function, or functools.partial over one."
        )
