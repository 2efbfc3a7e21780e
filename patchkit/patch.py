"""Patch, and the registry of patches."""

from __future__ import annotations

import ast
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from patchkit.errors import PatchConflict
from patchkit.registered import import_folder
from patchkit.spelled import Spelled, is_required, is_word, options_of

if TYPE_CHECKING:
    import torch

    from patchkit.anatomy.target import Target
    from patchkit.handle import Handle
    from patchkit.record import PatchReport


# The spec of no patch.
NO_PATCH = "none"


if TYPE_CHECKING:
    # (model without the patch, token ids [1, T], what the patch reports) -> logits [1, T, V]
    Definition = Callable[[Any, torch.Tensor, PatchReport], torch.Tensor]


class Stage(enum.IntEnum):
    """When a patch is applied. `patch_model` sorts by it, so that the order in which patches are given does not matter."""

    ATTENTION = 0
    WEIGHTS = 1
    KERNELS = 2
    GENERATION = 3
    COMPILE = 4


@dataclass(frozen=True)
class Promises:
    """Promises of a patch about a model, compared with the same model without this one patch; `patchkit prove` checks each.

    Attributes:
        same_logits: logits are the same, up to rounding.
        same_tokens: greedy `generate` gives the same tokens.
        same_up_to: texts of at most this many tokens have the same logits; beyond it the patch begins to act.
        definition: works out the patched logits by definition, in a way that shares no code with the patch.
        any_feeding: logits do not depend on how tokens are fed: as a whole, in chunks, one by one.
        greedy: greedy `generate` takes the likeliest token of the patched model's own forwards.
        bounded: the cache stops growing after ``same_up_to`` tokens.
        rounds: it rounds weights or activations. An input difference of one unit in the last place may flip a rounding step, so outputs
            are compared by signal-to-noise ratio; the modules that it reports with an ``snr_db`` keep that ratio in 16 bits too, and do
            not overflow.
    """

    same_logits: bool = False
    same_tokens: bool = False
    same_up_to: int = 0
    definition: Definition | None = None
    any_feeding: bool = True
    greedy: bool = True
    bounded: bool = False
    rounds: bool = False


@dataclass(frozen=True)
class Facts:
    """A patch's row in the table of patches that `patchkit patches --markdown` prints, as Markdown without links to files.

    Attributes:
        goal: what one wants who wants this patch.
        exact: whether outputs are those of the unpatched model; empty: "yes" or "no", by `Patch.exact`.
        cost: costs and limits, whether it can be undone among them.
        source: the paper, or where the method comes from.
    """

    goal: str = ""
    exact: str = ""
    cost: str = ""
    source: str = ""


@dataclass(frozen=True)
class Patch(Spelled):
    """One technique with its options. Options are frozen fields, validated in `__post_init__`; a patch holds no run-time state.

    A subclass is a frozen dataclass, sets `stage`, and is registered under its spec name:

        @register_patch("halve")
        @dataclass(frozen=True)
        class Halve(Patch):
            stage = Stage.WEIGHTS
            factor: float = 0.5

    `__post_init__` raises a ValueError that names the value and the remedy.

    Attributes:
        stage: when it is applied.
        exact: whether logits are those of the model without the patch, up to rounding. A patch that is not exact must be seen to act.
        acts: the run-time counters (`handle.record.hits`) of which one moves when the patch does what it is for; empty: any that it keeps.
        example: a spec under which the patch acts on 30 tokens of a tiny model; the bare name unless the class sets it.
        evaluated: the spec that `patchkit eval --every-patch` evaluates, on texts of some 500 tokens; None: the bare name.
        facts: its row in the table of patches.
    """

    stage: ClassVar[Stage]
    exact: ClassVar[bool] = False
    acts: ClassVar[tuple[str, ...]] = ()
    evaluated: ClassVar[str | None] = None
    facts: ClassVar[Facts] = Facts()

    def check(self, target: Target) -> None:
        """Refuse a model that this patch cannot serve, by raising a `PatchError`. Must not touch the model."""

    def apply(self, target: Target, handle: Handle) -> None:
        """Edit the model, every edit through `handle`. An exception undoes everything that went through the handle."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(target, handle): define it")

    def promises(self, target: Target) -> Promises:
        """Promises of the patch, with these options, about this model. ``target`` is unpatched, and `check` has passed."""
        return Promises(same_logits=self.exact, same_tokens=self.exact)

    def exercised(self) -> Patch:
        """Return this patch with options under which all that it does happens within a short sequence."""
        return self

    @classmethod
    def candidates(cls, target: Target) -> Sequence[Patch]:
        """The options that `patchkit tune` tries on this model; none where the patch needs what only the user has."""
        return [] if _required(cls) else [cls()]

    @classmethod
    def drafting(cls, patches: tuple[Patch, ...]) -> Patch | None:
        """The patch under which the model patched with ``patches`` only drafts for the model itself; None if this class cannot do that.

        `patch_model(lossless=True)` applies it.
        """
        return None

    @property
    def irreversible(self) -> bool:
        """Whether, with these options, the patch cannot be undone."""
        return False


P = TypeVar("P", bound=Patch)

_registry: dict[str, type[Patch]] = {}

_discovered = False


def _required(cls: type[Patch]) -> list[str]:
    return [name for name, field in options_of(cls).items() if is_required(field)]


def register_patch(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: the class becomes a patch, known to spec strings, the command line and the contract tests as `name`.

    Defining the same class again (a notebook cell run twice, a reload) replaces it.

    Raises:
        ValueError: `name` is not an identifier, or the class's `example` is a spec of another patch.
        TypeError: the class is not a frozen dataclass derived from `Patch`, has no `stage`, or has an option without a default and no
            `example`.
        PatchConflict: another class has this name.
    """
    if not is_word(name):
        raise ValueError(f"patch name {name!r} cannot be written in a spec string: use a Python identifier such as 'my_patch'")

    def register(cls: type[P]) -> type[P]:
        if not (isinstance(cls, type) and issubclass(cls, Patch)):
            raise TypeError(f"@register_patch({name!r}) decorates {cls!r}, which is not a subclass of patchkit.Patch: derive it from Patch")
        own_parameters = cls.__dict__.get("__dataclass_params__")
        if own_parameters is None or not own_parameters.frozen:
            raise TypeError(f"{cls.__qualname__} is not a frozen dataclass: put @dataclass(frozen=True) under @register_patch({name!r})")
        if not isinstance(getattr(cls, "stage", None), Stage):
            raise TypeError(
                f"{cls.__qualname__} has no stage: set `stage = Stage.ATTENTION` (or WEIGHTS, KERNELS, GENERATION, COMPILE) in its body"
            )
        holder = _registry.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PatchConflict(
                f"the patch name {name!r} belongs to {holder.__module__}.{holder.__qualname__}: "
                f"register {cls.__qualname__} under another name"
            )
        example = cls.__dict__.get("example", name)  # an example that is inherited is one of another patch
        if "example" not in cls.__dict__ and _required(cls):
            raise TypeError(
                f"{cls.__qualname__} has no example, and {', '.join(_required(cls))} no default: "
                f"set `example = '{name}(...)'` in its body, a spec under which it acts on 30 tokens of a tiny model"
            )
        if example.partition("(")[0].strip() != name:
            raise ValueError(f"the example of {cls.__qualname__} is {example!r}, which is no spec of it: start it with {name!r}")
        cls.name, cls.example = name, example
        _registry[name] = cls
        return cls

    return register


def available_patches() -> dict[str, type[Patch]]:
    """All patches by spec name, sorted. The first call imports every module of `patchkit/patches/`; there is no list to edit."""
    global _discovered
    if not _discovered:
        import_folder("patchkit.patches")
        _discovered = True
    return dict(sorted(_registry.items()))


def declared() -> dict[str, tuple[str, ...] | None] | None:
    """The patches by spec name, with the names of their options: of those in `patchkit/patches/` as in their source, and of those
    that are registered already. None for the options of a class, or for everything, where the source does not say it plainly."""
    known: dict[str, tuple[str, ...] | None] = {name: tuple(options_of(cls)) for name, cls in _registry.items()}
    for path in sorted(Path(__file__).with_name("patches").glob("*.py")) if not _discovered else []:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found = {name: node for node in tree.body if isinstance(node, ast.ClassDef) for name in _registered_as(node)}
        if not found and path.name != "__init__.py":
            return None
        for name, node in found.items():
            fields = [each for each in node.body if isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation)]
            plain = [ast.unparse(base) for base in node.bases] == [Patch.__name__]
            known.setdefault(name, tuple(ast.unparse(each.target) for each in fields) if plain else None)
    return dict(sorted(known.items()))


def _registered_as(node: ast.ClassDef) -> list[str]:
    calls = [each for each in node.decorator_list if isinstance(each, ast.Call) and ast.unparse(each.func) == register_patch.__name__]
    return [each.args[0].value for each in calls if isinstance(each.args[0], ast.Constant) and isinstance(each.args[0].value, str)]
