"""Classes that register themselves by name: drafters, controllers, acceptance policies.

A kind of objects is a direct subclass with a folder; what is derived from it with a name is known to spec strings from then on,
wherever it is defined:

    class Drafter(Registered, kind="drafter", folder="patchkit.speculation.drafters"): ...

    @dataclass(frozen=True)
    class Repeat(Drafter, name="repeat"):
        times: int = 1

    patch_model(model, "speculative(draft=repeat(times=2))")

Modules of the folder are imported when the first name is looked up; there is no list to edit.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any, ClassVar

from patchkit.errors import PatchConflict
from patchkit.spelled import Spelled, is_word

if TYPE_CHECKING:
    from typing_extensions import Self


class Registered(Spelled):
    """A kind of objects of which spec strings name the classes; a subclass of a kind is a frozen dataclass.

    Attributes:
        kind: what an object of this kind is, for messages.
        folder: the package whose modules define those that patchkit has.
        example: a spec string of the class that works on any model; the bare name unless the class sets it.
    """

    positional = True

    kind: ClassVar[str]
    folder: ClassVar[str]
    _classes: ClassVar[dict[str, type[Any]]]

    def __init_subclass__(cls, name: str | None = None, kind: str | None = None, folder: str | None = None, **kwargs: Any) -> None:
        """Register ``cls`` as ``name``; without a name it can be used as an object only. A new kind gives ``kind`` and ``folder``.

        Defining the same class again (a notebook cell run twice, a reload) replaces it.

        Raises:
            ValueError: the name is not an identifier.
            PatchConflict: another class has this name.
        """
        super().__init_subclass__(**kwargs)
        if kind is not None and folder is not None:
            cls.kind, cls.folder, cls._classes = kind, folder, {}
        if name is None:
            if "name" in vars(cls) and _is_made_again(cls._classes.get(cls.name), cls):
                cls._classes[cls.name] = cls
            return
        if not is_word(name):
            raise ValueError(f"{cls.kind} {name!r} cannot be written in a spec string: use a Python identifier such as 'my_{cls.kind}'")
        holder = cls._classes.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PatchConflict(
                f"the {cls.kind} {name!r} is {holder.__module__}.{holder.__qualname__}: register {cls.__qualname__} under another name"
            )
        cls.name = name
        cls.example = cls.__dict__.get("example", name)
        cls._classes[name] = cls

    @classmethod
    def available(cls) -> dict[str, type[Self]]:
        """All classes of this kind by name, sorted."""
        import_folder(cls.folder)
        return dict(sorted(cls._classes.items()))


def _is_made_again(holder: type[Any] | None, cls: type[Any]) -> bool:
    """Whether ``cls`` is the class that `dataclass(slots=True)` makes in the place of ``holder``, with its fields and without its name."""
    fields = "__dataclass_fields__"
    return holder is not None and fields in vars(cls) and vars(holder).get(fields) is vars(cls)[fields]


@functools.cache
def import_folder(package: str) -> None:
    """Import every module of a package, once."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
