"""What is no grammar, or none that could be kept: each is refused with a message that names the cause."""

from __future__ import annotations

import functools
import sys
import warnings
from typing import Any

import pytest
import torch
from grammar_cases import bundled, tiny_vocabulary

from patchkit import Grammar, GrammarError, PatchError
from patchkit.grammar import library
from patchkit.grammar.lark import never_end
from patchkit.grammar.schema import can_end

SCHEMAS: list[tuple[Any, str]] = [
    ("nope", "not JSON.*line 1 column 1"),
    ([1], "the schema is a list"),
    (None, "the schema is a NoneType"),
    ({"const": float("nan")}, "cannot be written as JSON"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, '"not"'),
    ({"if": {"type": "string"}, "then": {}}, '"if"'),
    ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
    ({"type": "string", "format": "telephone"}, "Unknown format: telephone"),
    ({"$ref": "https://example.com/schema.json"}, "https://example.com/schema.json"),
    ({"type": "strin"}, "Invalid type: strin"),
    ({"type": "object", "propertys": {}}, "propertys.*did you mean 'properties'"),
    ({"type": "object", "properties": {"a": {"maxLenght": 3}}}, "maxLenght.*did you mean 'maxLength'"),
    ({"type": "array", "items": {"anyOf": [{"wibble": 1}]}}, "wibble"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum .5. is greater than maximum .3."),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems .3. is greater"),
    (False, "the schema is false"),
    ({"enum": []}, "anyOf is empty"),
    ({"type": "string", "pattern": "a(?=b)"}, "look-around"),
    ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "without end"),
    ({"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "without end"),
    ({"type": "array", "minItems": 1, "items": {"anyOf": [{"$ref": "#"}]}}, "without end"),
    ({"type": "array", "minItems": 1.0, "items": {"$ref": "#"}}, "without end"),
    ({"type": ["object"], "properties": {"next": {"$ref": "#"}}, "required": ["next"]}, "without end"),
    ({"type": "array", "minItems": "2"}, "minItems"),
    ({"type": "array", "minItems": 1, "prefixItems": 5}, "prefixItems"),
    ({"type": "object", "required": 5}, "required"),
    ({"type": "object", "properties": {"a": {}}, "required": [["a"]]}, "required"),
    ({"$ref": ["#"]}, "ref"),
    ({1: 2}, "unknown keywords .1."),
    (functools.reduce(lambda inner, _: {"type": "array", "minItems": 1, "items": inner}, range(400), {}), "nested too deeply|recursion"),
    ("[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("schema", "message"), SCHEMAS, ids=lambda value: str(value)[:40])
def test_schemas(schema: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        Grammar.json_schema(schema, tiny_vocabulary())
    assert isinstance(caught.value, PatchError) and isinstance(caught.value, ValueError)
    assert len(str(caught.value)) < 700 and "<state>" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "unclosed group"),
        ("a(?=b)", "look-around"),
        (r"(a)\1", "backreferences"),
        ("[z-a]", "invalid character class range"),
        (r"[^\s\S]", "no text follows this grammar"),
        (3, "the regular expression is a int"),
    ],
)
def test_regular_expressions(pattern: Any, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammar.regex(pattern, tiny_vocabulary())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the grammar is empty"),
        ("no rules", "Expected token"),
        ("start: a b", 'unknown name: "a"'),
        ("start: (", "Expected|expected|unexpected"),
        ('start: x\nx: "a" x', "no text of the grammar ever ends .rules start, x."),
        ('start: "b" x\nx: ("a" | "c") x | "(" x ")"', "ever ends"),
        ("start: <|nobody|>", "nobody"),
    ],
)
def test_lark(text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammar.lark(text, bundled()[1])


def test_an_end_token_by_name() -> None:
    with pytest.raises(GrammarError, match=r"names the end token <.endoftext.>"):
        Grammar.lark('start: "a" <|endoftext|> "b"', bundled()[1])
    Grammar.lark('start: "a" // not <|endoftext|>\n  | "<|endoftext|>" | /<x>/', bundled()[1])


@pytest.mark.parametrize(("text", "message"), [('root ::= "a" | ( "b" root', "Expected"), ('root ::= "a" root', "ever ends")])
def test_ebnf(text: str, message: str) -> None:
    with pytest.raises(GrammarError, match=message):
        Grammar.ebnf(text, tiny_vocabulary())


def test_which_rules_never_end() -> None:
    assert never_end('start: x\nx: "a" x') == {"start", "x"}
    for ends in (
        'start: x\nx: "a" x | "b"',
        'start: x*\nx: "a" x',
        'start: x?\nx: "a" x',
        'start: [x] "b"\nx: "a" x',
        'start: x{0,3}\nx: "a" x',
        'start: x~0..3\nx: "a" x',
        'start: A\nA: /a"|:b/\n// x: x\n%ignore /x/',
        'start: "x: y |" start | ""',
        'start: "a" x // after start\nx: "b"',
        'start: "a" # start',
        'start: "//" x /#/ "#"\nx: "b" // start |',
    ):
        assert "start" not in never_end(ends), ends
    assert never_end('start: "a" start // | "b"') == {"start"}
    assert never_end('start: a | b\na: "x"\nb: "(" b ")"') == {"b"}


def test_tokenizers() -> None:
    class Slow:
        eos_token_id = 0

    with pytest.raises(GrammarError, match="Slow is no fast tokenizer"):
        Grammar.json(Slow())
    tokenizer = bundled()[1]
    with pytest.raises(GrammarError, match="no end token"):
        Grammar.json(tokenizer, ends=[])
    with pytest.raises(GrammarError, match="no token 5000"):
        Grammar.json(tokenizer, ends=[0, 5000])
    with pytest.raises(GrammarError, match="different tokenizers"):
        Grammar.batch([Grammar.json(tokenizer), Grammar.json(tiny_vocabulary())])
    with pytest.raises(GrammarError, match="batch of no grammars"):
        Grammar.batch([])


def test_whitespace() -> None:
    with pytest.raises(GrammarError, match="whitespace='any'"):
        Grammar.json_schema({}, tiny_vocabulary(), whitespace="any")  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="blanks without end"):
        grammar = Grammar.json_schema({"type": "array", "items": {"type": "null"}}, tiny_vocabulary(), whitespace="flexible")
    tokens = tiny_vocabulary().tokens.tokenize_str("[ null,null ]")
    matcher = grammar.matchers(1)[0]
    matcher.bring([*tokens, 0])
    assert matcher.ended
    strict = Grammar.json_schema({"type": "array", "items": {"type": "null"}}, tiny_vocabulary()).matchers(1)[0]
    strict.bring([*tokens, 0])
    assert strict.lost
    strict.bring([*tiny_vocabulary().tokens.tokenize_str("[null, null]"), 0])
    assert strict.ended


def test_lenient_lists_what_is_not_enforced() -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "string", "wibble": 3}}
    with pytest.warns(UserWarning, match="wibble.*uniqueItems"):
        grammar = Grammar.json_schema(schema, tiny_vocabulary(), lenient=True)
    assert len(grammar.unenforced) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Grammar.json_schema({"type": "array", "x-note": 1}, tiny_vocabulary(), lenient=True).unenforced == ()


def test_a_limit_of_the_parser_is_an_error_and_no_free_text() -> None:
    # In the parser's row after the first letter, each rule has an item.
    rules = "\n".join(f'r{i}: ("a" "{i}")+ | "b" r{i}' for i in range(2500))
    grammar = f'start: "z" x | "y"\nx: {" | ".join(f"r{i}" for i in range(2500))}\n{rules}'
    processor = Grammar.lark(grammar, tiny_vocabulary()).for_row(0, 1, 0)
    letter = tiny_vocabulary().tokens.tokenize_str("z")[0]
    assert processor(torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 128)).isfinite().sum() == 2
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"llguidance stopped after [01] tokens: .*max is 2000"):
            processor(torch.full((1, 1), letter), torch.zeros(1, 128))


def test_schemas_that_can_end() -> None:
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}}}, "required": ["kids"]}
    chain = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["next"]}
    assert all(can_end(schema, schema) for schema in (tree, chain, {}, True, {"required": ["a"]}, {"$ref": "#/nowhere/else"}))


def test_references_are_followed_once() -> None:
    """A definition that refers to the next one twice: 2^60 paths."""
    both = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    every = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(60)}
    for definitions in (both, every):
        for last, ends in (({"type": "null"}, True), ({"$ref": "#/$defs/d0"}, False)):
            schema = {"$defs": definitions | {"d60": last}, "$ref": "#/$defs/d0"}
            assert can_end(schema, schema) == ends


def test_packed_tokens_are_refused() -> None:
    with pytest.raises(GrammarError, match="generate_batch"):
        Grammar.json(tiny_vocabulary())(torch.tensor([1, 2]), torch.zeros(1, 128))


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    library.llguidance.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    try:
        with pytest.raises(GrammarError, match=r"patchkit.grammar."):
            Grammar.json(bundled()[1], ends=[7])
    finally:
        library.llguidance.cache_clear()
