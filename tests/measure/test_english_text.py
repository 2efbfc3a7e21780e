from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from patchkit.measure import english_text
from patchkit.measure.english_text import REFERENCE, english_documents, english_ids, is_prose, paragraphs
from patchkit.measure.perplexity import TextError
from patchkit.measure.stdlib_text import stdlib_root
from patchkit.models import load_model

PROSE = (
    "When a file is opened for writing, it will be created if it does not exist, and it is truncated if it does; all that was in it before "
    "is lost."
)


@pytest.mark.parametrize(
    "text, prose",
    [
        (PROSE, True),
        ("Return the value of the key if the key is in the mapping.", False),  # short
        (PROSE.replace("When", "when"), False),  # goes on from something
        (PROSE[:-1], False),  # ends in the middle
        (PROSE + " " + "self.buffer[index:index+1] = {key: value}, *args, **kwargs.", False),  # code
        ("Name size type offset value " * 8 + "end.", False),  # a table: no words that hold sentences together
        ("The 1 2 3 4 5 of the 6 7 8 9 10 and the 11 12 13 14 15 16 in the list.", False),  # numbers
    ],
)
def test_what_counts_as_prose(text: str, prose: bool) -> None:
    assert is_prose(text) is prose


def test_paragraphs_are_blocks_of_one_indent() -> None:
    text = "A title\n\n   one line\n   and its end\n \n* a list\n  with its end\n\n\tby a tab\n        or by blanks\n\n\n"
    assert list(paragraphs(text)) == ["A title", "one line and its end", "by a tab or by blanks"]


def _write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def _sentence(subject: str) -> str:
    return f"The {subject} is one of those that are used when all of the others have been read, and it may not be changed by any of them."


@pytest.fixture
def library(tmp_path: Path) -> Path:
    _write(tmp_path, REFERENCE, f"topics = {{'b': {_sentence('second')!r}, 'a': {_sentence('third')!r}, 'c': 'short'}}\n")
    first, again = _sentence("first"), _sentence("second")
    method = f'    def f(self):\n        """{_sentence("inner")}\n\n        >>> f(1)\n        """\n'
    late = f'class C:\n{method}\ndef g():\n    """{_sentence("later")}"""\n'
    _write(tmp_path, "aaa.py", f'"""{first}\n\n{again}"""\n{late}')
    _write(tmp_path, "test/test_aaa.py", f'"""{_sentence("test")}"""\n')
    _write(tmp_path, "site-packages/other.py", f'"""{_sentence("package")}"""\n')
    _write(tmp_path, "broken.py", 'print "this is Python 2"\n')
    _write(tmp_path, "plain.py", f"text = {_sentence('string')!r}\n")
    return tmp_path


def _of_library(root: Path) -> list[tuple[str, list[str]]]:
    documents = itertools.takewhile(lambda each: ".dist-info/" not in each[0].name, english_documents(root))
    return [(source.name, found) for source, found in documents]


def test_documents_come_in_order_and_no_paragraph_twice(library: Path) -> None:
    assert _of_library(library) == [
        (REFERENCE, [_sentence("second"), _sentence("third")]),
        ("aaa.py", [_sentence("first"), _sentence("inner"), _sentence("later")]),
    ]


def test_sources_say_what_was_used(library: Path) -> None:
    source, found = next(english_documents(library))
    assert source.name == REFERENCE
    assert source.sha256 == hashlib.sha256((library / REFERENCE).read_bytes()).hexdigest()
    assert source.words == sum(len(text.split()) for text in found) == 2 * len(_sentence("any").split())


def test_packages_come_after_the_library_with_descriptions_and_licences(library: Path) -> None:
    names = [source.name for source, _ in english_documents(library)]
    packages = names[2:]
    assert packages and all(name.split("/")[0].endswith(".dist-info") for name in packages)
    assert any(name.endswith("/METADATA") for name in packages) and any("LICENSE" in name for name in packages)


def test_this_python_has_enough_without_any_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> Iterator[None]:
        yield pytest.fail("asked for packages")

    monkeypatch.setattr(english_text, "_installed", refuse)
    tokenizer = load_model("bundled")[1]
    ids, sources = english_ids(tokenizer, 16384)
    assert ids.shape == (16385,) and ids.dtype == torch.int64
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert sources[0].name == REFERENCE
    assert sources[0].sha256 == hashlib.sha256((stdlib_root() / REFERENCE).read_bytes()).hexdigest()
    text = tokenizer.decode(ids[1:])
    found = text.split("\n\n")
    assert len(found) > 100 and all(map(is_prose, found[:-1])) and len(set(found)) == len(found)
    shorter, _ = english_ids(tokenizer, 1000)
    assert torch.equal(shorter, ids[:1001])


def test_a_text_that_is_too_short_is_refused(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english_text, "stdlib_root", lambda: library)
    monkeypatch.setattr(english_text, "_installed", lambda: iter(()))
    with pytest.raises(TextError, match=r"ends after \d+ tokens"):
        english_ids(load_model("bundled")[1], 5000)


def test_a_python_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(english_text, "stdlib_root", lambda: tmp_path)
    with pytest.raises(TextError, match="complete Python"):
        english_ids(load_model("bundled")[1], 10)
