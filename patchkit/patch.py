"""Patch, its registry, and spec strings such as "streaming(sinks=4, window=1020) + mlp_int8"."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import importlib
import keyword
import os
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from patchkit.errors import PatchConflict, SpecError

# The spec of no patch.
NO_PATCH = "none"

if TYPE_CHECKING:
    import torch

    from patchkit.handle import Handle
    from patchkit.record import PatchReport
    from patchkit.target import Target

    # (model without the patch, token ids [1, T], what the patch reports) -> logits [1, T, V]
    Definition = Callable[[Any, torch.Tensor, PatchReport], torch.Tensor]


class Stage(enum.IntEnum):
    """When a patch is applied. `patch_model` sorts by it, so that the order in which patches are given does not matter."""

    ATTENTION = 0
    WEIGHTS = 1
    GENERATION = 2
    COMPILE = 3


@dataclass(frozen=True)
class Promises:
    """What a patch promises about a model, beside the same model without this one patch; `patchkit prove` checks each.

    Attributes:
        same_logits: logits are the same, up to rounding.
        same_tokens: greedy `generate` gives the same tokens.
        same_up_to: texts of at most this many tokens have the same logits; beyond it the patch begins to act.
        definition: works out the patched logits by definition, in a way that shares no code with the patch.
        any_feeding: logits do not depend on how tokens are fed: as a whole, in chunks, one by one.
        greedy: greedy `generate` takes the likeliest token of the patched model's own forwards.
        bounded: the cache stops growing after ``same_up_to`` tokens.
        rounds: it rounds weights or activations, so that differences in the last bit of its inputs may jump by a step of its own; the
            modules that it reports with an ``snr_db`` keep that signal-to-noise ratio in 16 bits too, and do not overflow.
    """

    same_logits: bool = False
    same_tokens: bool = False
    same_up_to: int = 0
    definition: Definition | None = None
    any_feeding: bool = True
    greedy: bool = True
    bounded: bool = False
    rounds: bool = False


class Spelled:
    """What a spec string writes as a call: a patch, or the value of an option that has options of its own, `refresh=reencode(every=64)`.

    A subclass is a frozen dataclass with a ``name``. The field of an option names the classes that it takes, beside literals, as
    ``metadata={"objects": (Reencode, ...)}``.
    """

    name: ClassVar[str]

    @property
    def spec(self) -> str:
        """The spec string of this object, with every option that differs from its default: `streaming(window=508)`.

        `parse_spec` reads it back, unless an option is an object that no spec string can spell (a draft model, say); such a
        value is shown as `<ClassName>`.
        """
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(self)  # type: ignore[arg-type]
        options = [
            f"{field.name}={_spell(getattr(self, field.name))}"
            for field in fields
            if field.init and not _is_default(field, getattr(self, field.name))
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name


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
    """

    stage: ClassVar[Stage]
    # Whether logits stay those of the model without the patch, up to rounding. A patch that is not exact must be seen to act.
    exact: ClassVar[bool] = False
    # The run-time counters (`handle.hits`) of which one moves when the patch does what it is for; empty: any that it keeps.
    acts: ClassVar[tuple[str, ...]] = ()
    # A spec under which the patch shows what it does on texts of some 500 tokens; None: its defaults do.
    example: ClassVar[str | None] = None

    def check(self, target: Target) -> None:
        """Refuse a model that this patch cannot serve, by raising a `PatchError`. Must not touch the model."""

    def apply(self, target: Target, handle: Handle) -> None:
        """Edit the model, every edit through `handle`. An exception undoes everything that went through the handle."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(target, handle): define it")

    def promises(self, target: Target) -> Promises:
        """What the patch, with these options, promises about this model. ``target`` is unpatched, and `check` has passed."""
        return Promises(same_logits=self.exact, same_tokens=self.exact)

    def exercised(self) -> Patch:
        """The same patch with options under which all that it does happens within a short text."""
        return self

    @classmethod
    def candidates(cls, target: Target) -> Sequence[Patch]:
        """The options that `patchkit tune` tries on this model; none where the patch needs what only the user has."""
        missing = dataclasses.MISSING
        required = [name for name, field in _options(cls).items() if field.default is missing and field.default_factory is missing]
        return [] if required else [cls()]

    @property
    def irreversible(self) -> bool:
        """Whether, with these options, the patch cannot be undone."""
        return False


P = TypeVar("P", bound=Patch)
S = TypeVar("S", bound=Spelled)
T = TypeVar("T")

# What names patches: an object, a spec string, or a file that holds one.
Given = Patch | str | os.PathLike[str]

_registry: dict[str, type[Patch]] = {}
_discovered = False


def register_patch(name: str) -> Callable[[type[P]], type[P]]:
    """Class decorator: the class becomes a patch, known to spec strings, the command line and the contract tests as `name`.

    Defining the same class again (a notebook cell run twice, a reload) replaces it.

    Raises:
        ValueError: `name` is not an identifier.
        TypeError: the class is not a frozen dataclass derived from `Patch`, or has no `stage`.
        PatchConflict: another class has this name.
    """
    if not _is_word(name):
        raise ValueError(f"patch name {name!r} cannot be written in a spec string: use a Python identifier such as 'my_patch'")

    def register(cls: type[P]) -> type[P]:
        if not (isinstance(cls, type) and issubclass(cls, Patch)):
            raise TypeError(f"@register_patch({name!r}) decorates {cls!r}, which is not a subclass of patchkit.Patch: derive it from Patch")
        own_parameters = cls.__dict__.get("__dataclass_params__")
        if own_parameters is None or not own_parameters.frozen:
            raise TypeError(f"{cls.__qualname__} is not a frozen dataclass: put @dataclass(frozen=True) under @register_patch({name!r})")
        if not isinstance(getattr(cls, "stage", None), Stage):
            raise TypeError(f"{cls.__qualname__} has no stage: set `stage = Stage.ATTENTION` (or WEIGHTS, GENERATION, COMPILE) in its body")
        holder = _registry.get(name)
        if holder is not None and (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise PatchConflict(
                f"the patch name {name!r} belongs to {holder.__module__}.{holder.__qualname__}: "
                f"register {cls.__qualname__} under another name"
            )
        cls.name = name
        _registry[name] = cls
        return cls

    return register


def available_patches() -> dict[str, type[Patch]]:
    """All patches by spec name, sorted. The first call imports every module of `patchkit/patches/`; there is no list to edit."""
    global _discovered
    if not _discovered:
        package = importlib.import_module("patchkit.patches")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
        _discovered = True
    return dict(sorted(_registry.items()))


def parse_spec(text: str) -> list[Patch]:
    """Read a spec string: `streaming(sinks=4, window=1020) + mlp_int8`.

    Option values are Python literals (int, float, string, list, tuple, dict, None, True, False); a bare word is a string. Options that
    take objects are written as calls: `streaming(refresh=reencode(every=64))`, `speculative(k=adaptive(target=0.8))`. `none` is no patch,
    and `@FILE` what the file says (`read_spec`).

    Raises:
        SpecError: bad syntax, an unknown patch or option (with the nearest valid name), or a value that the patch refuses.
    """
    return read_spec(text.strip()[1:]) if text.strip().startswith("@") else _parsed(text)


def read_spec(path: str | os.PathLike[str]) -> list[Patch]:
    """Read the spec string in a UTF-8 file, such as `patchkit tune` writes: over one line or several, with comments after `#`.

    Raises:
        SpecError: the file cannot be read, or what it says.
    """
    return _in_file(path, _parsed)


def resolve(patches: Sequence[Any]) -> list[Patch]:
    """Patch objects from whatever the user gave, in the order of application."""
    if not any(True for _ in _flat(patches)):
        raise SpecError(f"no patch given: name at least one, available: {', '.join(available_patches())}, or {NO_PATCH!r}")
    chosen: list[Patch] = []
    for given in _flat(patches):
        if isinstance(given, str):
            chosen.extend(parse_spec(given))
        elif isinstance(given, os.PathLike):
            chosen.extend(read_spec(given))
        elif isinstance(given, type) and issubclass(given, Patch):
            raise SpecError(f"{given.__name__} is a class: write {given.__name__}()")
        elif not isinstance(given, Patch):
            raise SpecError(f"{given!r} is not a patch: give a Patch object, or a spec string such as 'streaming(window=1020)'")
        elif not hasattr(given, "name"):
            raise SpecError(f"{type(given).__name__} is not registered: decorate the class with @register_patch('a_name')")
        else:
            chosen.append(given)
    names = [patch.name for patch in chosen]
    for name in names:
        if names.count(name) > 1:
            raise PatchConflict(f"the patch {name!r} is given {names.count(name)} times: give it once")
    return sorted(chosen, key=lambda patch: patch.stage)


def _flat(patches: Sequence[Any]) -> Iterator[Any]:
    for given in patches:
        if isinstance(given, list | tuple):
            yield from _flat(given)
        else:
            yield given


def check_spelling(text: str) -> None:
    """Raise what `parse_spec` raises about syntax and about the names of patches and options, within a moment.

    Patches take seconds to import, so their names and options are read in their source. What this lets pass may still be wrong: values
    are for `parse_spec`.

    Raises:
        SpecError: as `parse_spec`.
    """
    known = _declared()
    if known is None:
        return
    if text.strip().startswith("@"):
        _in_file(text.strip()[1:], functools.partial(_check_names, known=known))
    else:
        _check_names(text, known)


def _in_file(path: str | os.PathLike[str], read: Callable[[str], T]) -> T:
    try:
        return read(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r} cannot be read ({error.strerror}): check the path") from error
    except UnicodeDecodeError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r} is not UTF-8 text: give one that `patchkit tune` wrote") from error
    except SpecError as error:
        raise SpecError(f"the spec file {os.fspath(path)!r}: {error}") from error


def _parsed(text: str) -> list[Patch]:
    return [_patch_of(node, text) for node in _terms(text, available_patches())]


def _terms(text: str, known: Iterable[str]) -> list[ast.expr]:
    """What is joined with '+' in a spec; nothing in the spec of no patch."""
    try:
        # In brackets, so that a spec may run over several lines (YAML).
        tree = ast.parse(f"({text.strip()}\n)", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {getattr(error, 'msg', error)}. "
            "Write it like 'streaming(sinks=4, window=1020) + mlp_int8', and quote values that are not single words"
        ) from None
    if isinstance(tree.body, ast.Tuple) and not tree.body.elts:  # nothing, or nothing but comments
        raise SpecError(f"empty spec: name at least one patch, or write none; available: {_listed(known)}")
    if isinstance(tree.body, ast.Name) and tree.body.id == NO_PATCH:
        return []
    return list(_summands(tree.body))


def _check_names(text: str, known: dict[str, tuple[str, ...] | None]) -> None:
    for node in _terms(text, known):
        name = _name_of(node, text, known)
        options = known[name]
        if options is not None:
            _keywords(name, node, options)


def _declared() -> dict[str, tuple[str, ...] | None] | None:
    """The patches by spec name, with the names of their options: of those in `patchkit/patches/` as their source says, and of those
    that are registered already. None for the options of a class, or for everything, where the source does not say it plainly."""
    known: dict[str, tuple[str, ...] | None] = {name: tuple(_options(cls)) for name, cls in _registry.items()}
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


def parse_object(text: str, kind: str, classes: Sequence[type[S]]) -> S:
    """Read one object of ``classes`` as a spec string writes it: `reencode(every=64)`. ``kind`` says in errors what it is.

    Raises:
        SpecError: bad syntax, an unknown name or option, or a value that the class refuses.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(f"cannot read the {kind} {text!r}: {getattr(error, 'msg', error)}. Write it like '{classes[0].name}'") from None
    return _object_of(node, kind, classes)


def _object_of(node: ast.expr, kind: str, classes: Sequence[type[S]]) -> S:
    by_name = {each.name: each for each in classes}
    word = node.func if isinstance(node, ast.Call) else node
    if not isinstance(word, ast.Name) or word.id not in by_name:
        raise SpecError(_unknown(kind, ast.unparse(word), by_name))
    return _made(by_name[word.id], node)


def _summands(node: ast.expr) -> Iterable[ast.expr]:
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    terms.append(node)
    return reversed(terms)


def _patch_of(node: ast.expr, text: str) -> Patch:
    patches = available_patches()
    return _made(patches[_name_of(node, text, patches)], node)


def _name_of(node: ast.expr, text: str, known: Iterable[str]) -> str:
    word = node.func if isinstance(node, ast.Call) else node
    if not isinstance(word, ast.Name):
        raise SpecError(
            f"{ast.unparse(node)!r} in the spec {text!r} is not a patch: join patches with '+', like 'streaming(window=1020) + mlp_int8'"
        )
    if word.id not in known:
        raise SpecError(_unknown("patch", word.id, known))
    return word.id


def _made(cls: type[S], node: ast.expr) -> S:
    """An object of ``cls`` as ``node`` writes it: its bare name, or a call with options."""
    given = {option: _value_of(value, cls, option) for option, value in _keywords(cls.name, node, _options(cls)).items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{ast.unparse(node)}: {error}") from error


def _keywords(name: str, node: ast.expr, options: Iterable[str]) -> dict[str, ast.expr]:
    """The options that are given to the object called ``name``."""
    call = node if isinstance(node, ast.Call) else None
    if call and call.args:
        raise SpecError(
            f"{name}: {ast.unparse(call.args[0])!r} is given without its option's name: write {name}(option=value), "
            f"options: {_listed(options)}"
        )
    given: dict[str, ast.expr] = {}
    for argument in call.keywords if call else []:
        if argument.arg is None:
            raise SpecError(f"{name}: '**' is not allowed in a spec: write every option as option=value")
        if argument.arg not in options:
            raise SpecError(_unknown(f"option of {name}", argument.arg, options))
        if argument.arg in given:
            raise SpecError(f"{name}: the option {argument.arg!r} is given twice: give it once")
        given[argument.arg] = argument.value
    return given


def _value_of(node: ast.expr, cls: type[Spelled], option: str) -> Any:
    written = f"{cls.name}: {option}={ast.unparse(node)}"
    objects = _options(cls)[option].metadata.get("objects", ())
    if objects and not isinstance(node, ast.Constant):
        return _object_of(node, f"{option} of {cls.name}", objects)
    if isinstance(node, ast.Call) and _options(cls)[option].type in ("Any", Any):
        return ast.unparse(node)  # k=adaptive(target=0.8), draft=eagle("FILE"): the option reads it
    try:
        value = ast.literal_eval(_Words().visit(node))
    except (ValueError, TypeError, SyntaxError):
        raise SpecError(
            f"{written} is not a literal: write a number, True, False, None, a word, a quoted string, or a list of these"
        ) from None
    # `true` is a bare word, hence a non-empty string, hence true wherever a bool is tested: so would be `false`.
    if isinstance(_options(cls)[option].default, bool) and not isinstance(value, bool):
        raise SpecError(f"{written} must be True or False")
    return value


class _Words(ast.NodeTransformer):
    """Bare words become strings: positions=cache means positions="cache"."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(node.id), node)


def _options(cls: type[Spelled]) -> dict[str, dataclasses.Field[Any]]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {field.name: field for field in fields if field.init}


def _unknown(kind: str, word: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
    return f"unknown {kind} {word!r}{guess} available: {_listed(names)}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _is_word(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    # The type too: 1 == True == 1.0. And identity first, for values whose == is not a bool (tensors).
    return value is default or (type(value) is type(default) and isinstance(value, _SPELT) and bool(value == default))


_SPELT = (bool, int, float, str, list, tuple, dict, type(None))


def _spell(value: Any) -> str:
    if isinstance(value, Spelled):
        return value.spec
    if isinstance(value, str):
        return value if _is_word(value) else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_spell(item) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_spell(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool | int | float | dict | None):
        return repr(value)
    return f"<{type(value).__name__}>"
