"""Patch, its registry, and spec strings such as "streaming(sinks=4, window=1020) + mlp_int8"."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import importlib
import keyword
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from patchkit.errors import PatchConflict, SpecError

if TYPE_CHECKING:
    from patchkit.handle import Handle
    from patchkit.target import Target


class Stage(enum.IntEnum):
    """When a patch is applied. `patch_model` sorts by it, so that the order in which patches are given does not matter."""

    ATTENTION = 0
    WEIGHTS = 1
    GENERATION = 2
    COMPILE = 3


@dataclass(frozen=True)
class Patch:
    """One technique with its options. Options are frozen fields, validated in `__post_init__`; a patch holds no run-time state.

    A subclass is a frozen dataclass, sets `stage`, and is registered under its spec name:

        @register_patch("halve")
        @dataclass(frozen=True)
        class Halve(Patch):
            stage = Stage.WEIGHTS
            factor: float = 0.5

    `__post_init__` raises a ValueError that names the value and the remedy.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage]
    # Whether logits stay those of the model without the patch, up to rounding. A patch that is not exact must be seen to act.
    exact: ClassVar[bool] = False

    def check(self, target: Target) -> None:
        """Refuse a model that this patch cannot serve, by raising a `PatchError`. Must not touch the model."""

    def apply(self, target: Target, handle: Handle) -> None:
        """Edit the model, every edit through `handle`. An exception undoes everything that went through the handle."""
        raise NotImplementedError(f"{type(self).__name__} has no apply(target, handle): define it")

    @property
    def irreversible(self) -> bool:
        """Whether, with these options, the patch cannot be undone."""
        return False

    @property
    def spec(self) -> str:
        """The spec string of this patch, with every option that differs from its default: `streaming(window=508)`.

        `parse_spec` reads it back, unless an option is an object that no spec string can spell (a draft model, say); such a
        value is shown as `<ClassName>`.
        """
        options = [
            f"{field.name}={_spell(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.init and not _is_default(field, getattr(self, field.name))
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name


P = TypeVar("P", bound=Patch)

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

    Option values are Python literals (int, float, string, list, tuple, dict, None, True, False); a bare word is a string.

    Raises:
        SpecError: bad syntax, an unknown patch or option (with the nearest valid name), or a value that the patch refuses.
    """
    if not text.strip():
        raise SpecError(f"empty spec: name at least one patch, available: {_listed(available_patches())}")
    try:
        # In brackets, so that a spec may run over several lines (YAML).
        tree = ast.parse(f"({text.strip()}\n)", mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise SpecError(
            f"cannot read the spec {text!r}: {getattr(error, 'msg', error)}. "
            "Write it like 'streaming(sinks=4, window=1020) + mlp_int8', and quote values that are not single words"
        ) from None
    return [_patch_of(node, text) for node in _summands(tree.body)]


def _summands(node: ast.expr) -> Iterable[ast.expr]:
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    terms.append(node)
    return reversed(terms)


def _patch_of(node: ast.expr, text: str) -> Patch:
    call = node if isinstance(node, ast.Call) else None
    word = call.func if call else node
    if not isinstance(word, ast.Name):
        raise SpecError(
            f"{ast.unparse(node)!r} in the spec {text!r} is not a patch: join patches with '+', like 'streaming(window=1020) + mlp_int8'"
        )
    patches = available_patches()
    if word.id not in patches:
        raise SpecError(_unknown("patch", word.id, patches))
    cls = patches[word.id]
    if call and call.args:
        raise SpecError(
            f"{cls.name}: {ast.unparse(call.args[0])!r} is given without its option's name: write {cls.name}(option=value), "
            f"options: {_listed(_options(cls))}"
        )
    given: dict[str, Any] = {}
    for argument in call.keywords if call else []:
        if argument.arg is None:
            raise SpecError(f"{cls.name}: '**' is not allowed in a spec: write every option as option=value")
        if argument.arg not in _options(cls):
            raise SpecError(_unknown(f"option of {cls.name}", argument.arg, _options(cls)))
        if argument.arg in given:
            raise SpecError(f"{cls.name}: the option {argument.arg!r} is given twice: give it once")
        given[argument.arg] = _value_of(argument.value, cls, argument.arg)
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{ast.unparse(node)}: {error}") from error


def _value_of(node: ast.expr, cls: type[Patch], option: str) -> Any:
    written = f"{cls.name}: {option}={ast.unparse(node)}"
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


def _options(cls: type[Patch]) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


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
    if isinstance(value, str):
        return value if _is_word(value) else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_spell(item) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_spell(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool | int | float | dict | None):
        return repr(value)
    return f"<{type(value).__name__}>"
