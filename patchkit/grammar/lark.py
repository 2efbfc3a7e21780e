"""Context-free grammars in Lark's notation: names of special tokens, and rules that never end."""

from __future__ import annotations

import re

from patchkit.errors import GrammarError
from patchkit.grammar.library import llguidance
from patchkit.grammar.vocabulary import Vocabulary

# Comments, strings and regular expressions, in which a name is text; then special tokens, and everything else.
_PIECES = re.compile(r"""//[^\n]*|\#[^\n]*|"(?:\\.|[^"\\\n])*"i?|/(?:\\.|[^/\\\n])+/[a-z]*|(?P<special><[^<>\s\[\]]+>)""")
# A rule begins with its name at the beginning of a line.
_RULE = re.compile(r"^[ \t]*[?!]?(?P<name>\w+)(?:\[[^\]\n]*\])?(?:\.-?\d+)?[ \t]*:", re.MULTILINE)
_BODY = re.compile(r"\"(?:\\.|[^\"\\\n])*\"i?|/(?:\\.|[^/\\\n])+/[a-z]*|<[^<>]+>|\w+|[()|?*+\[\]]|~|\{[^}]*\}|%\w+|\.\.|->|\S")


def lark_grammar(text: str, vocabulary: Vocabulary) -> str:
    """Return a grammar in Lark's notation in llguidance's form, with special tokens by their ids.

    Raises:
        GrammarError: the text names an end token, or no text of the grammar ends.
    """

    def by_id(match: re.Match[str]) -> str:
        name = match.group("special")
        if name is None or name not in vocabulary.special:
            return match.group(0)
        token = vocabulary.special[name]
        if token in vocabulary.ends:
            raise GrammarError(f"the grammar names the end token {name}: leave it out, it follows by itself where the grammar ends")
        return f"<[{token}]>"

    if not text.strip():
        raise GrammarError("the grammar is empty: give rules, the first of them named start")
    endless = never_end(text)
    if "start" in endless:
        raise GrammarError(
            f"no text of the grammar ever ends (rules {', '.join(sorted(endless))}): give one of these rules an alternative without itself"
        )
    result: str = llguidance().LLMatcher.grammar_from_lark(_PIECES.sub(by_id, text))
    return result


def ebnf_to_lark(text: str) -> str:
    """Return a grammar in the notation of llama.cpp (GBNF) in Lark's.

    Raises:
        GrammarError: the text does not read; the message has the place.
    """
    llguidance()
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return str(any_to_lark(text))
    except Exception as error:  # of several classes that are not exported
        raise GrammarError(f"the grammar does not read as EBNF ({error}): write rules as root ::= ...") from error


def never_end(text: str) -> set[str]:
    """Return the rules of a grammar in Lark's notation whose texts cannot end, such as ``x: "a" x``.

    A rule that is written in any other way than names, strings, groups and alternatives is taken to end.
    """
    if "::" in text:  # llguidance's rules with parameters
        return set()
    clean = _PIECES.sub(_without_comment, re.sub(r"(?m)^[ \t]*%.*$", "", text))
    heads = list(_RULE.finditer(clean))
    bodies: dict[str, list[str]] = {}
    for head, following in zip(heads, [*heads[1:], None], strict=False):  # without rules there is one None too many
        body = clean[head.end() : len(clean) if following is None else following.start()]
        bodies[head.group("name")] = _BODY.findall(body)
    ending: set[str] = set()
    while True:
        more = {name for name, body in bodies.items() if name not in ending and _ends(body, bodies, ending)}
        if not more:
            return set(bodies) - ending
        ending |= more


def _without_comment(piece: re.Match[str]) -> str:
    return "" if piece.group(0).startswith(("//", "#")) else piece.group(0)


def _ends(body: list[str], bodies: dict[str, list[str]], ending: set[str]) -> bool:
    """Whether a rule's body has an alternative of which every part can end."""
    position = 0

    def alternatives(closing: str) -> bool:
        nonlocal position
        result, sequence = False, True
        while position < len(body) and body[position] != closing:
            piece = body[position]
            position += 1
            if piece == "|":
                result, sequence = result or sequence, True
                continue
            if piece in "([":
                ends = alternatives(")" if piece == "(" else "]") or piece == "["
                position += 1
            else:
                ends = piece not in bodies or piece in ending
            if position < len(body) and (body[position] in "?*" or body[position].startswith(("{0", "{,"))):
                ends = True
            if body[position : position + 1] == ["~"] and body[position + 1 : position + 2] == ["0"]:
                ends = True
            sequence = sequence and ends
        return result or sequence

    return alternatives("")
