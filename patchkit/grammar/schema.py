"""JSON schemas as grammars, and the keywords that are not enforced."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator
from typing import Any, Literal

from patchkit.errors import GrammarError
from patchkit.grammar.library import llguidance

Whitespace = Literal["flexible"] | None

# Of JSON Schema 2020-12 and the drafts before it. llguidance itself refuses those that it does not implement.
_KEYWORDS = frozenset(
    (
        *("$anchor", "$comment", "$defs", "$dynamicAnchor", "$dynamicRef", "$id", "$recursiveAnchor", "$recursiveRef", "$ref", "$schema"),
        *("$vocabulary", "additionalItems", "additionalProperties", "allOf", "anyOf", "const", "contains", "contentEncoding"),
        *("contentMediaType", "contentSchema", "default", "definitions", "dependencies", "dependentRequired", "dependentSchemas"),
        *("deprecated", "description", "discriminator", "else", "enum", "example", "examples", "exclusiveMaximum", "exclusiveMinimum"),
        *("format", "id", "if", "items", "maxContains", "maxItems", "maxLength", "maxProperties", "maximum", "minContains", "minItems"),
        *("minLength", "minProperties", "minimum", "multipleOf", "not", "nullable", "oneOf", "pattern", "patternProperties", "prefixItems"),
        *("properties", "propertyNames", "readOnly", "required", "strict", "then", "title", "type", "unevaluatedItems"),
        *("unevaluatedProperties", "uniqueItems", "writeOnly", "x-guidance"),
    )
)
# Where a schema holds schemas: by name, in a list, or one.
_BY_NAME = ("$defs", "definitions", "dependentSchemas", "patternProperties", "properties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SINGLE = (
    "additionalItems",
    "additionalProperties",
    "contains",
    "else",
    "if",
    "items",
    "not",
    "propertyNames",
    "then",
    "unevaluatedProperties",
)

# As `json.dumps` writes, which is what models have read.
_FIXED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
_FLEXIBLE = {"item_separator": ",", "key_separator": ":", "whitespace_flexible": True}

_TOO_DEEP = "the schema is nested too deeply: give inner parts names in $defs, and refer to them"


def read_schema(schema: Any) -> Any:
    """Return a schema that is given as an object or as text.

    Raises:
        GrammarError: text that is not JSON, or what no schema can be.
    """
    if isinstance(schema, str | bytes):
        try:
            schema = json.loads(schema)
        except RecursionError as error:
            raise GrammarError(_TOO_DEEP) from error
        except ValueError as error:
            raise GrammarError(f"the schema is not JSON ({error}): give a JSON schema as text or as a dict") from error
    if not isinstance(schema, dict | bool):
        raise GrammarError(
            f"the schema is a {type(schema).__name__}: give a JSON schema as text or as a dict, such as {{'type': 'object'}}"
        )
    if schema is False:
        raise GrammarError("the schema is false, which describes nothing: give a JSON schema such as {'type': 'object'}")
    return {} if schema is True else schema


def schema_grammar(schema: Any, whitespace: Whitespace, lenient: bool) -> str:
    """Return a schema, as `read_schema` gives it, in llguidance's form.

    Raises:
        GrammarError: an unknown keyword without ``lenient``, or values that JSON does not have.
    """
    if whitespace not in (None, "flexible"):
        raise GrammarError(f"whitespace={whitespace!r}: give 'flexible', or None for ', ' and ': ' as json.dumps writes them")
    unknown = unknown_keywords(schema)
    if unknown and not lenient:
        near = difflib.get_close_matches(unknown[0], _KEYWORDS, n=1, cutoff=0.7)
        hint = f", did you mean {near[0]!r}?" if near else ":"
        raise GrammarError(
            f"the schema has unknown keywords ({', '.join(unknown)}){hint} take them out, or give lenient=True to ignore them"
        )
    try:
        ends = can_end(schema, schema)
    except RecursionError as error:
        raise GrammarError(_TOO_DEEP) from error
    if not ends:
        raise GrammarError("every text of this schema holds another of the same kind, without end: let it be null, or not required")
    options = {**(_FIXED if whitespace is None else _FLEXIBLE), "lenient": lenient}
    try:
        text: str = llguidance().LLMatcher.grammar_from_json_schema(json.dumps(schema, allow_nan=False), overrides=options)
    except (TypeError, ValueError) as error:
        raise GrammarError(f"the schema cannot be written as JSON ({error}): use what JSON has") from error
    return text


def can_end(part: Any, root: Any) -> bool:
    """Return whether a part of a schema describes a text of finite length.

    Args:
        part: a schema in ``root``.
        root: the whole schema, to which references refer.
    """
    ending: set[str] = set()  # references whose texts end, found one after the other
    met: set[str] = set()
    while True:
        known = len(ending), len(met)
        if _ends(part, root, ending, met):
            return True
        ending |= {each for each in list(met) if each not in ending and _ends(_resolved(each, root), root, ending, met)}
        if known == (len(ending), len(met)):
            return False


def _ends(part: Any, root: Any, ending: set[str], met: set[str]) -> bool:
    """Whether a part ends if only the references in ``ending`` do. What llguidance refuses as no schema is taken to end."""
    if not isinstance(part, dict):
        return part is not False
    reference = part.get("$ref")
    if isinstance(reference, str) and reference not in ending:
        met.add(reference)
        return False
    for name in ("anyOf", "oneOf"):
        if _list(part, name) and not any(_ends(each, root, ending, met) for each in part[name]):
            return False
    needed, kinds = _list(part, "allOf"), part.get("type")
    if kinds in ("object", ["object"]) and isinstance(part.get("properties"), dict):
        needed = needed + [
            part["properties"][name] for name in _list(part, "required") if isinstance(name, str) and name in part["properties"]
        ]
    least = part.get("minItems")
    if kinds in ("array", ["array"]) and isinstance(least, int | float) and least > 0:
        needed = needed + [*_list(part, "prefixItems"), part.get("items", True)][: math.ceil(least)]
    return all([_ends(each, root, ending, met) for each in needed])


def _list(part: dict[str, Any], name: str) -> list[Any]:
    return part[name] if isinstance(part.get(name), list) else []


def _resolved(reference: Any, root: Any) -> Any:
    """What a reference into the schema itself refers to; True, which describes anything, for others, of which llguidance complains."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return True
    part = root
    for name in reference.removeprefix("#").split("/")[1:]:
        if not isinstance(part, dict):
            return True
        part = part.get(name.replace("~1", "/").replace("~0", "~"), True)
    return part


def unknown_keywords(schema: Any) -> list[str]:
    """Return the keywords of a schema and its parts that JSON Schema does not have, sorted; those that begin with x- are left out."""
    found = {key for part in _parts(schema) for key in map(str, part) if key not in _KEYWORDS and not key.startswith("x-")}
    return sorted(found)


def _parts(schema: Any) -> Iterator[dict[str, Any]]:
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        for name in _BY_NAME:
            waiting += part[name].values() if isinstance(part.get(name), dict) else []
        for name in _LISTS:
            waiting += part[name] if isinstance(part.get(name), list) else []
        waiting += [part[name] for name in _SINGLE if name in part]
        waiting += part["items"] if isinstance(part.get("items"), list) else []
