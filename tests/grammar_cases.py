"""What tests of grammars share: schemas, prompts, a checker without llguidance, and tokens for models without a tokenizer."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest
import torch

from patchkit import Grammar
from patchkit.grammar.vocabulary import Vocabulary, vocabulary_of_bytes
from patchkit.models import load_model

pytest.importorskip("llguidance", reason="grammars need llguidance: pip install 'patchkit[grammar]'")

PROMPTS = ("def main():\n    user = ", "import json\n\ncall = ", "# The settings of the server\nCONFIG = ", "    return ")


def record(**properties: Any) -> dict[str, Any]:
    """An object that has all of these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def text(longest: int = 16) -> dict[str, Any]:
    return {"type": "string", "maxLength": longest}


def whole(largest: int = 999) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": largest}


def several(items: Any, most: int = 3, least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most, "minItems": least}


FLAG: dict[str, Any] = {"type": "boolean"}
USER = record(
    name=text(24), age=whole(120), email=text(24), active=FLAG, role={"enum": ["admin", "editor", "viewer"]}, tags=several(text(12))
)
CALL = record(
    name={"const": "read_file"},
    arguments=record(path=text(24), encoding={"enum": ["utf-8", "latin-1", "ascii"]}, offset=whole(99999), follow_symlinks=FLAG),
)
_NODE = {"type": "object", "properties": {"v": whole(9), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}}
SCHEMAS: dict[str, Any] = {
    "user": USER,
    "call": CALL,
    "colours": record(first={"enum": ["red", "green", "blue"]}, second={"enum": ["red", "green", "blue", "grey"]}),
    "levels": record(level={"enum": ["debug", "info", "warning", "error", "critical"]}, code={"enum": [200, 301, 404, 500]}),
    "mixed enum": record(value={"enum": [1, "one", None, True, [1, 2], {"a": 1}]}),
    "long enum": {"enum": [f"option_{i}" for i in range(40)]},
    "const": {"const": {"a": [1, 2, {"b": None}], "c": "fixed text"}},
    "numbers": record(a=whole(5), b=whole(10_000), c={"type": "integer", "minimum": -5, "maximum": 5}),
    "nested": record(a=record(b=record(c=record(d=text(8), e=FLAG)))),
    "matrix": several(several(whole(9), 2, 2), 2, 2),
    "pairs": {"type": "array", "prefixItems": [text(8), whole(99)], "items": False, "minItems": 2},
    "list of records": several(record(key=text(6), value=whole(99)), 3, 1),
    "any of": record(id={"anyOf": [whole(99), text(8), {"type": "null"}]}),
    "two types": record(id={"type": ["integer", "null"], "minimum": 0, "maximum": 99}),
    "optional": {
        "type": "object",
        "properties": {"a": whole(9), "b": text(6), "c": FLAG},
        "required": ["b"],
        "additionalProperties": False,
    },
    "pattern": record(date={"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}),
    "version": record(version={"type": "string", "pattern": "^v[0-9]\\.[0-9]{1,2}$"}, beta=FLAG),
    "format": record(day={"type": "string", "format": "date"}),
    "unicode keys": record(prénom=text(10), straße=text(10), 年齢=whole(99)),
    "unicode values": record(городе={"enum": ["Москва", "東京", "Zürich", "São Paulo"]}),
    "emoji": record(mood={"enum": ["🙂", "🙁", "😐"]}, **{"ключ 🔑": FLAG}),
    "quoted": record(**{'with "quotes"': FLAG, "back\\slash": FLAG, "new\nline": FLAG}),
    "list": {**_NODE, "required": ["v", "next"], "additionalProperties": False},
    "references": {"$defs": {"point": record(x=whole(9), y=whole(9))}, **record(a={"$ref": "#/$defs/point"}, b={"$ref": "#/$defs/point"})},
    "empty record": record(),
    "flags": record(**{f"flag_{i}": FLAG for i in range(8)}),
    "string alone": text(20),
    "number alone": whole(99999),
    "bools": several(FLAG, 5, 3),
    "settings": record(
        host=text(12), port=whole(65535), debug=FLAG, workers=whole(64), log=record(level={"enum": ["low", "high"]}, file=text(12))
    ),
}
SCHEMAS["list"]["$defs"] = {"node": record(v=whole(9), next={"type": "null"})}


def complaint(value: Any, schema: Any, root: Any = None) -> str | None:
    """Why a value is not one of a schema; None if it is. Knows the keywords of the schemas above."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return None if schema else "nothing is allowed here"
    if "$ref" in schema:
        schema = functools.reduce(lambda part, name: part[name], schema["$ref"].removeprefix("#/").split("/"), root)
    if "const" in schema and json.dumps(value) != json.dumps(schema["const"]):
        return f"{value!r} is not the constant"
    if "enum" in schema and json.dumps(value) not in map(json.dumps, schema["enum"]):
        return f"{value!r} is not in the enum"
    if "anyOf" in schema and all(complaint(value, each, root) for each in schema["anyOf"]):
        return f"{value!r} is none of anyOf"
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    wanted = schema.get("type", [])
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if wanted and not any(type(value) is kinds[each] for each in wanted):
        return f"{value!r} is no {wanted}"
    if isinstance(value, str):
        if len(value) > schema.get("maxLength", 10**6) or len(value) < schema.get("minLength", 0):
            return f"{value!r} is too long or too short"
        if "pattern" in schema and not re.search(schema["pattern"], value):
            return f"{value!r} does not match"
        if schema.get("format") == "date" and not re.fullmatch(r"\d{4}-\d\d-\d\d", value):
            return f"{value!r} is no date"
    if type(value) is int and not schema.get("minimum", value) <= value <= schema.get("maximum", value):
        return f"{value} is out of range"
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        if missing := [name for name in schema.get("required", []) if name not in value]:
            return f"{missing} are missing"
        if schema.get("additionalProperties") is False and (extra := set(value) - set(properties)):
            return f"{extra} are too many"
        return next((why for name in value if (why := complaint(value[name], properties.get(name, True), root))), None)
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(schema.get("prefixItems", value)) or len(value)):
            return f"{len(value)} items"
        first = schema.get("prefixItems", [])
        parts = [*first, *[schema.get("items", True)] * (len(value) - len(first))]
        return next((why for each, part in zip(value, parts, strict=False) if (why := complaint(each, part, root))), None)
    return None


@functools.cache
def bundled() -> tuple[Any, Any]:
    """stdlib-7m and its tokenizer. Tests leave it unpatched."""
    return load_model("stdlib-7m")


@functools.cache
def grammar_of(name: str) -> Grammar:
    return Grammar.json_schema(SCHEMAS[name], bundled()[1])


def written(ids: torch.Tensor, prompt: int, end: int = 0) -> str:
    """The text of ids [T] after the prompt, up to the end token, which has to be there."""
    new = ids[prompt:].tolist()
    assert end in new, f"no end in {bundled()[1].decode(new)!r}"
    return str(bundled()[1].decode(new[: new.index(end)]))


@functools.cache
def tiny_vocabulary() -> Vocabulary:
    """128 tokens for the tiny models: 0 is the end, 95 single characters, and pairs of letters."""
    pairs = [a + b for a in "abcde" for b in "abcdefg"][:32]
    return vocabulary_of_bytes([b"<end>", *(bytes([32 + i]) for i in range(95)), *(pair.encode() for pair in pairs)], [0])


def tiny_decoded(ids: list[int]) -> str:
    vocabulary = tiny_vocabulary()
    return str(vocabulary.tokens.decode_str(ids[: ids.index(0)] if 0 in ids else ids))
