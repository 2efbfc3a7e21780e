"""Readers of JSON values: each checks a value, and has the JSON schema of what it accepts, from which /openapi.json is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from patchkit.serving.api_error import bad


@dataclass(frozen=True)
class Reader:
    """A kind of JSON value.

    Attributes:
        schema: JSON schema of the values.
        read: takes a value and its path, and returns the value; raises `ApiError`.
        required: an object has to have this field.
    """

    schema: dict[str, Any]
    read: Callable[[Any, str], Any]
    required: bool = False


def number(least: float, most: float) -> Reader:
    """Finite numbers from ``least`` to ``most``, as float."""

    def read(value: Any, at: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(at, f"give a number, not {_kind(value)}")
        if not least <= value <= most:  # nan neither
            raise bad(at, f"{str(value)[:40]} is not from {least:g} to {most:g}")
        return float(value)

    return Reader({"type": "number", "minimum": least, "maximum": most}, read)


def integer(least: int, most: int) -> Reader:
    """Integers from ``least`` to ``most``."""

    def read(value: Any, at: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise bad(at, f"give a whole number, not {_kind(value)}")
        if not least <= value <= most:
            raise bad(at, f"{value} is not from {least} to {most}")
        return value

    return Reader({"type": "integer", "minimum": least, "maximum": most}, read)


def text(shortest: int = 0, required: bool = False) -> Reader:
    """Strings of at least ``shortest`` characters."""

    def read(value: Any, at: str) -> str:
        if not isinstance(value, str):
            raise bad(at, f"give text, not {_kind(value)}")
        if len(value) < shortest:
            raise bad(at, "the text is empty")
        return value

    return Reader({"type": "string"} | ({"minLength": shortest} if shortest else {}), read, required)


def flag() -> Reader:
    """True or false."""

    def read(value: Any, at: str) -> bool:
        if not isinstance(value, bool):
            raise bad(at, f"give true or false, not {_kind(value)}")
        return value

    return Reader({"type": "boolean"}, read)


def anything(required: bool = False) -> Reader:
    """JSON objects whose content another library reads, such as a JSON schema."""

    def read(value: Any, at: str) -> Any:
        if not isinstance(value, dict):
            raise bad(at, f"give an object, not {_kind(value)}")
        return value

    return Reader({"type": "object"}, read, required)


def one_of(*values: Any, required: bool = False) -> Reader:
    """Any of a few values. One value alone: the only one that this server can serve."""

    def read(value: Any, at: str) -> Any:
        if not any(type(value) is type(each) and value == each for each in values):
            raise bad(at, f"{_short(value)} is not served: give {' or '.join(map(_short, values))}", "unsupported_value")
        return value

    return Reader({"enum": list(values)}, read, required)


def list_of(items: Reader, least: int = 0, most: int | None = None, required: bool = False) -> Reader:
    """Lists of ``least`` to ``most`` items."""

    def read(value: Any, at: str) -> list[Any]:
        if not isinstance(value, list):
            raise bad(at, f"give a list, not {_kind(value)}")
        if len(value) < least:
            raise bad(at, "the list is empty")
        if most is not None and len(value) > most:
            raise bad(at, f"{len(value)} items, give at most {most}")
        return [items.read(item, f"{at}[{i}]") for i, item in enumerate(value)]

    limits = ({"minItems": least} if least else {}) | ({} if most is None else {"maxItems": most})
    return Reader({"type": "array", "items": items.schema, **limits}, read, required)


def record(fields: dict[str, Reader], required: bool = False) -> Reader:
    """Objects with these fields and no others, as a dict without the fields that are null."""

    def read(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise bad(at or None, f"give an object, not {_kind(value)}")
        prefix = f"{at}." if at else ""
        for name in value:
            if name not in fields:
                raise bad(f"{prefix}{name}"[:200], "this server has no such field", "unknown_parameter")
        given = {name: each for name, each in value.items() if each is not None}
        for name, reader in fields.items():
            if reader.required and name not in given:
                raise bad(f"{prefix}{name}", "is missing", "missing_required_parameter")
        return {name: fields[name].read(each, f"{prefix}{name}") for name, each in given.items()}

    # A field of null is a field that is left out.
    properties = {name: each.schema if each.required else {"anyOf": [each.schema, {"type": "null"}]} for name, each in fields.items()}
    needed = [name for name, each in fields.items() if each.required]
    schema = {"type": "object", "properties": properties, "additionalProperties": False} | ({"required": needed} if needed else {})
    return Reader(schema, read, required)


def either(*readers: tuple[Callable[[Any], bool], Reader], expected: str, required: bool = False) -> Reader:
    """Values of several kinds: the first reader whose test is true reads the value."""

    def read(value: Any, at: str) -> Any:
        for test, reader in readers:
            if test(value):
                return reader.read(value, at)
        raise bad(at, f"give {expected}, not {_kind(value)}")

    return Reader({"anyOf": [reader.schema for _, reader in readers]}, read, required)


def is_text(value: Any) -> bool:
    """Return whether a JSON value is a string."""
    return isinstance(value, str)


def is_list(value: Any) -> bool:
    """Return whether a JSON value is a list."""
    return isinstance(value, list)


def is_object(value: Any) -> bool:
    """Return whether a JSON value is an object."""
    return isinstance(value, dict)


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
