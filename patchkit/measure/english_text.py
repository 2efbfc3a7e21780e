"""Fluent English that is on every machine: the prose in the running Python's library, then in the installed packages.

The order is fixed:

1. Python's own reference (`pydoc_data/topics.py`, the text of `help()`), then the docstrings of the library's modules by path. These are
   some 80,000 words, so shorter texts are the same on every installation of one Python release.
2. Licences and descriptions of the installed distributions, by name.

`is_prose` decides paragraph by paragraph; repeated paragraphs are left out.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import Parser
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from patchkit.measure.perplexity import TextError
from patchkit.measure.stdlib_text import stdlib_root
from patchkit.measure.texts import encode

REFERENCE = "pydoc_data/topics.py"

# Folders that are no library, and parts of it that some distributions of Python leave out: the text must not depend on them.
_NO_LIBRARY = "site-packages dist-packages __pycache__ _bundled"
_OFTEN_LEFT_OUT = "test tests idlelib lib2to3 distutils tkinter turtledemo ensurepip venv"
_SKIPPED = frozenset(f"{_NO_LIBRARY} {_OFTEN_LEFT_OUT}".split())
_LEGAL = re.compile(r"(licen[cs]e|copying|notice)[^.]*(\.(txt|md|rst))?$", re.IGNORECASE)

_MIN_WORDS = 20
_MIN_COMMON, _MIN_LETTERS = 0.30, 0.96
# The words that hold English sentences together; tables, code, signatures and lists of names have few of them.
_FUNCTION_WORDS = (
    "the of to and a in is that it for as with be by on not this are or from at which an if has have but can was will used when all one "
    "may other than into its only any no so"
)
_COMMON = frozenset(_FUNCTION_WORDS.split())
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class TextSource:
    """A file that prose was taken from.

    Attributes:
        name: path inside the library, or inside the installed packages.
        words: how many were taken.
        sha256: of the file.
    """

    name: str
    words: int
    sha256: str


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph (one line) is running English.

    It has 20 words or more, begins with a capital and ends with a full stop; at least 30 % of the words are among 43 function words, and
    96 % of the characters are letters, spaces and , . ' -
    """
    words = paragraph.split()
    if len(words) < _MIN_WORDS or not paragraph[0].isupper() or paragraph[-1] != ".":
        return False
    common = sum(word.lower().strip(".,;:()\"'") in _COMMON for word in words) / len(words)
    letters = sum(character.isalpha() or character in " ,.'-" for character in paragraph) / len(paragraph)
    return common >= _MIN_COMMON and letters >= _MIN_LETTERS


def paragraphs(text: str) -> Iterator[str]:
    """Blocks between blank lines whose lines have equal indentation, each as one line; lists and hanging indents are left out."""
    for block in re.split(r"\n[^\S\n]*\n", text.expandtabs()):
        lines = [line for line in block.splitlines() if line.strip()]
        if len({len(line) - len(line.lstrip()) for line in lines}) == 1:
            yield " ".join(block.split())


def english_documents(root: Path | None = None) -> Iterator[tuple[TextSource, list[str]]]:
    """Yield every file that has prose, with its new paragraphs: first the library's, then the installed distributions'.

    Args:
        root: of the library; None for the running interpreter's.

    Raises:
        FileNotFoundError: the interpreter has no library sources (a frozen or stripped Python).
    """
    seen: set[str] = set()
    for name, content, texts in itertools.chain(_library(root or stdlib_root()), _installed()):
        found = []
        for paragraph in itertools.chain.from_iterable(map(paragraphs, texts)):
            if is_prose(paragraph) and paragraph not in seen:
                seen.add(paragraph)
                found.append(paragraph)
        if found:
            yield TextSource(name, sum(len(each.split()) for each in found), hashlib.sha256(content).hexdigest()), found


def english_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[torch.Tensor, list[TextSource]]:
    """Token ids of the start of this text as one document: the boundary token, then paragraphs with a blank line after each.

    Returns:
        tokens + 1 ids [T], and the files that they come from.

    Raises:
        TextError: this interpreter ships without its library's sources, or there is no text of that many tokens.
    """
    ids, sources = encode(tokenizer, ""), []
    try:
        for source, found in english_documents():
            text = "".join(f"{paragraph}\n\n" for paragraph in found)
            ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            sources.append(source)
            if len(ids) > tokens:
                return torch.tensor(ids[: tokens + 1]), sources
    except FileNotFoundError as error:
        raise TextError(f"{error}: use a complete Python, or score a file of your own with `patchkit ppl`") from error
    raise TextError(f"the English text on this machine ends after {len(ids) - 1:,} tokens: ask for at most that many")


def _library(root: Path) -> Iterator[tuple[str, bytes, list[str]]]:
    files = {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*.py"))}
    kept = [name for name in files if not _SKIPPED.intersection(name.split("/"))]
    if not kept:
        raise FileNotFoundError(f"no Python sources under {root}: this interpreter ships without its library's text")
    for name in sorted(kept, key=lambda name: (name != REFERENCE, name)):
        content = files[name].read_bytes()
        yield name, content, _documentation(name, content)


def _documentation(name: str, source: bytes) -> list[str]:
    """Docstrings of a Python file in source order, or the topics of the reference; empty if the file cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in old sources
            tree = ast.parse(source)
    except SyntaxError:
        return []  # the library has files for other grammars, on purpose
    if name == REFERENCE:
        values = [
            value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict) for value in node.value.values
        ]
        return [value.value for value in values if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    nodes = [node for node in ast.walk(tree) if isinstance(node, _DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _installed() -> Iterator[tuple[str, bytes, list[str]]]:
    distributions = sorted(importlib.metadata.distributions(), key=lambda each: (each.metadata["Name"] or "").lower())
    for file, distribution in [(file, each) for each in distributions for file in sorted(each.files or [], key=str)]:
        described, path = file.name == "METADATA", Path(str(distribution.locate_file(file)))
        if not file.parts[0].endswith(".dist-info") or not (described or _LEGAL.match(file.name)) or not path.is_file():
            continue
        content = path.read_bytes()
        text = content.decode("utf-8", errors="replace").replace("\r\n", "\n")
        yield file.as_posix(), content, [str(Parser().parsestr(text).get_payload()) if described else text]
