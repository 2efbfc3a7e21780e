"""Objects with options, as spec strings write them: `reencode(every=64)`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import keyword
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypeVar

from patchkit.errors import SpecError


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


S = TypeVar("S", bound=Spelled)


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
        raise SpecError(unknown(kind, ast.unparse(word), by_name))
    return made(by_name[word.id], node)


def made(cls: type[S], node: ast.expr) -> S:
    """An object of ``cls`` as ``node`` writes it: its bare name, or a call with options."""
    given = {option: _value_of(value, cls, option) for option, value in keywords_of(cls.name, node, options_of(cls)).items()}
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{ast.unparse(node)}: {error}") from error


def keywords_of(name: str, node: ast.expr, options: Iterable[str]) -> dict[str, ast.expr]:
    """The options that are given to the object called ``name``."""
    call = node if isinstance(node, ast.Call) else None
    if call and call.args:
        raise SpecError(
            f"{name}: {ast.unparse(call.args[0])!r} is given without its option's name: write {name}(option=value), "
            f"options: {listed(options)}"
        )
    given: dict[str, ast.expr] = {}
    for argument in call.keywords if call else []:
        if argument.arg is None:
            raise SpecError(f"{name}: '**' is not allowed in a spec: write every option as option=value")
        if argument.arg not in options:
            raise SpecError(unknown(f"option of {name}", argument.arg, options))
        if argument.arg in given:
            raise SpecError(f"{name}: the option {argument.arg!r} is given twice: give it once")
        given[argument.arg] = argument.value
    return given


def _value_of(node: ast.expr, cls: type[Spelled], option: str) -> Any:
    written = f"{cls.name}: {option}={ast.unparse(node)}"
    objects = options_of(cls)[option].metadata.get("objects", ())
    if objects and not isinstance(node, ast.Constant):
        return _object_of(node, f"{option} of {cls.name}", objects)
    if isinstance(node, ast.Call) and options_of(cls)[option].type in ("Any", Any):
        return ast.unparse(node)  # k=adaptive(target=0.8), draft=eagle("FILE"): the option reads it
    try:
        value = ast.literal_eval(_Words().visit(node))
    except (ValueError, TypeError, SyntaxError):
        raise SpecError(
            f"{written} is not a literal: write a number, True, False, None, a word, a quoted string, or a list of these"
        ) from None
    # `true` is a bare word, hence a non-empty string, hence true wherever a bool is tested: so would be `false`.
    if isinstance(options_of(cls)[option].default, bool) and not isinstance(value, bool):
        raise SpecError(f"{written} must be True or False")
    return value


class _Words(ast.NodeTransformer):
    """Bare words become strings: positions=cache means positions="cache"."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(node.id), node)


def options_of(cls: type[Spelled]) -> dict[str, dataclasses.Field[Any]]:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {field.name: field for field in fields if field.init}


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
    return f"unknown {kind} {word!r}{guess} available: {listed(names)}"


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def is_word(text: str) -> bool:
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
        return value if is_word(value) else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(_spell(item) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(_spell(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, bool | int | float | dict | None):
        return repr(value)
    return f"<{type(value).__name__}>"
