"""The one grammar of spec strings: objects with options, `reencode(every=64)`, written and read.

    object  = name | name "(" [value, ...] [option "=" value, ...] ")"
    value   = object | object "+" object ... | "[" value, ... "]" | literal | word

Where an option takes objects (``metadata={"objects": ...}`` of its field), a name is the object of that name, and several objects are
a list, a tuple, or joined with "+". Elsewhere a word is a string, and everything else a Python literal. A string that holds an object
in quotes is left to the class, which reads it with `parse_object`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import keyword
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from patchkit.errors import SpecError


class Spelled:
    """An object that a spec string writes as a call: a patch, or the value of an option that has options of its own.

    A subclass is a frozen dataclass with a ``name``. The field of an option that takes such objects has them in its metadata:

    * ``{"objects": (Reencode, DynamicSinks)}``: these classes, or a function that gives them by name (`Registered.available`);
    * ``{"objects": ..., "words": True}``: a word that names none of them is a string.

    Attributes:
        name: what spec strings call the class.
        example: a spec string of this class for tests and documents.
        bare: the options of the bare name without brackets, where they are not the defaults.
        positional: options may be given by their order: `topk_agree(2)`.
    """

    name: ClassVar[str]
    example: ClassVar[str]
    bare: ClassVar[Mapping[str, Any]] = {}
    positional: ClassVar[bool] = False

    @property
    def spec(self) -> str:
        """The spec string of this object, with every option that differs from its default: `streaming(window=508)`.

        `parse_spec` reads it back, unless an option is an object that no spec string can spell (a loaded draft model, say); such a
        value is shown as `<ClassName>`.
        """
        if "name" not in vars(type(self)):  # another class's name would be read back as an object of that class
            return f"<{type(self).__name__}>"
        fields = options_of(type(self))
        options = {name: getattr(self, name) for name, field in fields.items() if not _is_default(field, getattr(self, name))}
        if options == self.bare:
            return self.name
        return f"{self.name}({', '.join(f'{name}={spell(value)}' for name, value in options.items())})"


S = TypeVar("S", bound=Spelled)

Objects = Iterable[type[S]] | Callable[[], Mapping[str, type[S]]]


def parse_object(text: str, kind: str, objects: Objects[S]) -> S:
    """Read one of ``objects`` as a spec string writes it: `reencode(every=64)`.

    Args:
        kind: what it is, for messages.
        objects: its classes, or a function that gives them by name.

    Raises:
        SpecError: bad syntax, an unknown name or option, a missing option, or a value that the class refuses.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        like = next(iter(_by_name(objects)))
        raise SpecError(f"cannot read the {kind} {text!r}: {getattr(error, 'msg', error)}. Write it like '{like}'") from None
    with refusing_depth(kind):
        return _object_of(node, kind, objects)


@contextlib.contextmanager
def refusing_depth(kind: str) -> Iterator[None]:
    """Context in which a ``kind`` that is nested deeper than Python's stack raises a `SpecError`: Python's parser lets some pass."""
    try:
        yield
    except RecursionError:
        raise SpecError(f"cannot read the {kind}: it is nested too deep") from None


def made(cls: type[S], node: ast.expr) -> S:
    """An object of ``cls`` as ``node`` writes it: its bare name, or a call with options.

    Raises:
        SpecError: an unknown or missing option, or a value that is no literal or that the class refuses.
    """
    written, options = ast.unparse(node), options_of(cls)
    own = cls.__dict__.get("__dataclass_params__")
    if own is None or not own.frozen:
        raise SpecError(f"{cls.name}: {cls.__qualname__} is not a frozen dataclass: put @dataclass(frozen=True) above the class")
    if isinstance(node, ast.Call):
        given = {option: _value_of(value, cls, option) for option, value in arguments_of(cls, node).items()}
    else:
        given = dict(cls.bare)
    for name, field in options.items():
        if name not in given and is_required(field):
            raise SpecError(f"{written}: {cls.name} needs {name}: write {cls.name}({name}=...)")
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{written}: {error}") from error


def arguments_of(cls: type[Spelled], node: ast.Call) -> dict[str, ast.expr]:
    """The options of ``cls`` that a call gives, by name.

    Raises:
        SpecError: an option that there is not, or that is given twice.
    """
    options = options_of(cls)
    ordered = [name for name, field in options.items() if not field.kw_only] if cls.positional else []
    if len(node.args) > len(ordered) > 0:
        raise SpecError(f"{ast.unparse(node)}: {cls.name} takes {listed(ordered)}, and {len(node.args)} values are given")
    named = node.args if not ordered else [argument for argument in node.args if isinstance(argument, ast.Starred)]
    refuse_unnamed(cls.name, named, options)
    given = dict(zip(ordered, node.args, strict=False))
    return given | keywords_of(cls.name, node, options, given)


def refuse_unnamed(name: str, values: Iterable[ast.expr], options: Iterable[str]) -> None:
    """Raise a `SpecError` for the first of ``values``, which are given to ``name`` without the names of their options."""
    for value in values:
        raise SpecError(
            f"{name}: {ast.unparse(value)!r} is given without its option's name: write {name}(option=value), options: {listed(options)}"
        )


def keywords_of(name: str, node: ast.Call, options: Iterable[str], given: Iterable[str] = ()) -> dict[str, ast.expr]:
    """The options that a call of ``name`` gives by name, of which none may be in ``given``.

    Raises:
        SpecError: an option that is not in ``options``, or that is given twice.
    """
    found: dict[str, ast.expr] = {}
    for argument in node.keywords:
        if argument.arg is None:
            raise SpecError(f"{name}: '**' is not allowed in a spec: write every option as option=value")
        if argument.arg not in options:
            raise SpecError(unknown(f"option of {name}", argument.arg, options))
        if argument.arg in found or argument.arg in given:
            raise SpecError(f"{name}: the option {argument.arg!r} is given twice: give it once")
        found[argument.arg] = argument.value
    return found


def summands(node: ast.expr) -> list[ast.expr]:
    """The terms that a spec joins with "+", in their order."""
    terms: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def options_of(cls: type[Spelled]) -> dict[str, dataclasses.Field[Any]]:
    """The fields of the options of ``cls``, by name."""
    if not dataclasses.is_dataclass(cls):
        return {}
    return {field.name: field for field in dataclasses.fields(cls) if field.init}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether an option has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unknown(kind: str, word: str, known: Iterable[str]) -> str:
    """The message for a word that is not in ``known``, with the nearest that is."""
    names = list(known)
    nearest = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
    return f"unknown {kind} {word!r}{guess} available: {listed(names)}"


def listed(names: Iterable[str]) -> str:
    """The names, separated by commas; "none" for none."""
    return ", ".join(names) or "none"


def is_word(text: str) -> bool:
    """Whether a spec string may write ``text`` without quotes."""
    # Python normalises identifiers, so that another form of a letter would be read back as another word.
    return text.isidentifier() and not keyword.iskeyword(text) and unicodedata.normalize("NFKC", text) == text


def spell(value: Any) -> str:
    """The value of an option as a spec string writes it; `<ClassName>` for what none can write."""
    if isinstance(value, Spelled):
        return value.spec
    if isinstance(value, str):
        return str.__str__(value) if is_word(value) else str.__repr__(value)
    if isinstance(value, list):
        return f"[{', '.join(spell(item) for item in value)}]"
    if isinstance(value, tuple):
        return f"({', '.join(spell(item) for item in value)}{',' if len(value) == 1 else ''})"
    if type(value) is dict:
        return f"{{{', '.join(f'{spell(key)}: {spell(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool | dict | None):  # a dict of a class of its own has a repr of its own
        return repr(value)
    # Subclasses, such as numpy's float64 and IntEnum, have a repr that no literal is.
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float) and not math.isnan(value):
        return float.__repr__(value).replace("inf", "1e999")  # `inf` would be a word
    return f"<{type(value).__name__}>"


# -- reading ---------------------------------------------------------------------------------------------------------------


def _object_of(node: ast.expr, kind: str, objects: Objects[S]) -> S:
    by_name = _by_name(objects)
    word = node.func if isinstance(node, ast.Call) else node
    if not isinstance(word, ast.Name) or word.id not in by_name:
        raise SpecError(unknown(kind, ast.unparse(word), by_name))
    return made(by_name[word.id], node)


def _by_name(objects: Objects[S]) -> Mapping[str, type[S]]:
    return objects() if callable(objects) else {each.name: each for each in objects}


def _value_of(node: ast.expr, cls: type[Spelled], option: str) -> Any:
    field = options_of(cls)[option]
    if "objects" in field.metadata:
        return _objects_of(node, cls, field)
    written, value = ast.unparse(node), _literal(node, cls, option)
    # `true` is a bare word, hence a non-empty string, hence true wherever a bool is tested: so would be `false`.
    if isinstance(field.default, bool) and not isinstance(value, bool):
        raise SpecError(f"{cls.name}: {option}={written} must be True or False")
    return value


def _objects_of(node: ast.expr, cls: type[Spelled], field: dataclasses.Field[Any]) -> Any:
    """The value of an option that takes objects: one or several of them, or a literal such as None."""
    if isinstance(node, ast.List):
        return [_objects_of(each, cls, field) for each in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_objects_of(each, cls, field) for each in node.elts)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return tuple(_objects_of(each, cls, field) for each in summands(node))
    if isinstance(node, ast.Name) and field.metadata.get("words") and node.id not in _by_name(field.metadata["objects"]):
        return node.id
    if isinstance(node, ast.Name | ast.Call | ast.Attribute):
        return _object_of(node, f"{field.name} of {cls.name}", field.metadata["objects"])
    return _literal(node, cls, field.name)


def _literal(node: ast.expr, cls: type[Spelled], option: str) -> Any:
    written = ast.unparse(node)
    try:
        return ast.literal_eval(_Words().visit(node))
    except (ValueError, TypeError, SyntaxError):
        raise SpecError(
            f"{cls.name}: {option}={written} is not a literal: "
            "write a number, True, False, None, a word, a quoted string, or a list of these"
        ) from None


class _Words(ast.NodeTransformer):
    """Bare words become strings: positions=cache means positions="cache"."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.copy_location(ast.Constant(node.id), node)


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    # The type too: 1 == True == 1.0. And identity first, for values whose == is not a bool (tensors).
    return value is default or (type(value) is type(default) and isinstance(value, _SPELT) and bool(value == default))


_SPELT = (bool, int, float, str, list, tuple, dict, type(None), Spelled)
