"""Data for the lm-eval tasks of `evals/tasks`: made when asked for, from the running Python's library and seeds. Nothing is downloaded.

Every document is held-out library text (`stdlib_text`). The text to recall is planted `distance` tokens before the end, where it is
asked for, in documents of `tokens` tokens; so one length serves all distances, and a window, which counts tokens too, divides them into
those inside and those outside. Streamed and cloze texts are measured in characters, so that they are the same for every model.

lm-eval passes on `--metadata`, so `--metadata documents=100 tokens=4000` makes longer runs; it passes on the model's
arguments too, which is why each function takes, and ignores, any others. The tokenizer is that of the model: `patchkit eval` names it;
elsewhere it is `pretrained` of the model's arguments, or `metadata={"tokenizer": ...}`.
"""

from __future__ import annotations

import functools
import keyword
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset

from patchkit.measure.stdlib_text import read_texts, stdlib_files

Splits = dict[str, Dataset]

# Common names, so that a small model of code knows them, and none is a part of another.
_NAMES = (
    "size index count line text data file key state node code mode type flag start stop end offset length width color point group "
    "field item result error message source target parent child root level queue stack table row block token buffer stream header "
    "body prefix suffix label title"
)
# Characters of one piece of a file at most: a good part of the files are longer.
_PIECE = 8000
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{4,}")


def perplexity(documents: int = 4, characters: int = 10_000, **others: Any) -> Splits:
    """The beginnings of `documents` held-out files, evenly spread over those that are long enough.

    Raises:
        ValueError: there are fewer files of this length.
    """
    long = [text for text in _texts() if len(text) > characters]
    if not 1 <= documents <= len(long):
        raise ValueError(
            f"documents={documents}: this Python has {len(long)} held-out files of {characters} characters: ask for 1 to those"
        )
    chosen = [long[index * len(long) // documents] for index in range(documents)]
    return _splits({"text": text[: text.rfind("\n", 0, characters) + 1]} for text in chosen)


def cloze(nearest: int, farthest: int, documents: int = 16, characters: int = 1800, seed: int = 0, **others: Any) -> Splits:
    """The last identifier of a piece of code that was written before, for the last time `nearest` to `farthest` characters ago."""
    rng = random.Random(f"cloze {nearest} {farthest} {seed}")

    def document() -> dict[str, str] | None:
        piece = _piece(rng, characters + 200)
        for match in reversed(list(_IDENTIFIER.finditer(piece, characters - 200))):
            word, before = match.group(), piece[: match.start()]
            seen = [earlier.start() for earlier in re.finditer(rf"\b{word}\b", before)]
            if seen and nearest <= len(before) - seen[-1] < farthest and not keyword.iskeyword(word):
                return {"text": before, "target": word}
        return None

    return _splits(_found(document) for _ in range(documents))


def passkey(distance: int, documents: int = 10, tokens: int = 540, seed: int = 0, **others: Any) -> Splits:
    """A random word, stated three times in a row, and asked for later."""
    rng = random.Random(f"passkey {distance} {seed}")

    def planted() -> tuple[str, str, str]:
        key = "".join(rng.choice("bcdfghklmnprst") + rng.choice("aeiou") for _ in range(3))
        return f'PASSKEY = "{key}"\n' * 3, 'PASSKEY = "', key

    return _recall(rng, planted, distance, documents, tokens, _tokenizer_of(others))


def key_value(distance: int, pairs: int = 4, documents: int = 16, tokens: int = 540, seed: int = 0, **others: Any) -> Splits:
    """Names with a digit each, stated twice; one of the digits is asked for later. Guessing is right once in ten times."""
    rng = random.Random(f"key_value {distance} {pairs} {seed}")

    def planted() -> tuple[str, str, str]:
        table = {name: str(rng.randrange(10)) for name in rng.sample(_NAMES.split(), pairs)}
        asked = rng.choice(list(table))
        return "".join(f"{name} = {digit}\n" for name, digit in table.items()) * 2, f"{asked} =", table[asked]

    return _recall(rng, planted, distance, documents, tokens, _tokenizer_of(others))


def copy(distance: int, words: int = 8, documents: int = 16, tokens: int = 540, seed: int = 0, **others: Any) -> Splits:
    """A list of names in random order, stated twice; its beginning is repeated later, and the next three names are asked for."""
    rng = random.Random(f"copy {distance} {words} {seed}")

    def planted() -> tuple[str, str, str]:
        names = rng.sample(_NAMES.split(), words)
        return f"    return call({', '.join(names)})\n" * 2, f"    return call({', '.join(names[:2])},", " ".join(names[2:5])

    return _recall(rng, planted, distance, documents, tokens, _tokenizer_of(others))


def bits_per_byte(document: dict[str, str], results: list[float]) -> dict[str, Any]:
    """lm-eval's `process_results` of streamed perplexity: documents have one length, so that their mean has a standard error."""
    (log_likelihood,) = results
    size = len(document["text"].encode())
    return {"bits_per_byte": -log_likelihood / size / math.log(2), "byte_perplexity": (log_likelihood, size)}


def share_of_words(document: dict[str, str], results: list[str]) -> dict[str, float]:
    """lm-eval's `process_results` of recall tasks: the share of words that are right and in the right place."""
    wanted, answered = document["target"].split(), re.findall(r"\w+", results[0])
    return {"acc": sum(word == answer for word, answer in zip(wanted, answered, strict=False)) / len(wanted)}


def _recall(
    rng: random.Random, planted: Callable[[], tuple[str, str, str]], distance: int, documents: int, tokens: int, tokenizer: Any
) -> Splits:
    """Make documents; `planted` returns the text to recall, the beginning of the question, and the answer."""
    if not 0 <= distance < tokens:
        raise ValueError(f"distance={distance} in {tokens} tokens: give a distance that is shorter than the text")

    def document() -> dict[str, str]:
        stated, asked, answer = planted()
        text = _lines(rng, tokens - distance, tokenizer) + stated + _lines(rng, distance, tokenizer) + asked
        return {"text": text, "target": answer}

    return _splits(document() for _ in range(documents))


def _found(document: Callable[[], dict[str, str] | None], attempts: int = 10_000) -> dict[str, str]:
    for _ in range(attempts):
        made = document()
        if made is not None:
            return made
    raise ValueError(f"no such place in {attempts} pieces of the library: give more characters, or a wider range of distances")


def _piece(rng: random.Random, characters: int) -> str:
    """Whole lines of a held-out file, at most ``characters`` characters.

    Raises:
        ValueError: no file is that long.
    """
    if characters >= max(map(len, _texts())):
        raise ValueError(f"no held-out file has {characters} characters: ask for shorter documents")
    while True:
        text = rng.choice(_texts())
        start = text.find("\n", rng.randrange(len(text))) + 1
        if len(text) - start >= characters:
            return text[start : text.rfind("\n", start, start + characters) + 1] if characters else ""


def _lines(rng: random.Random, tokens: int, tokenizer: Any) -> str:
    """Whole lines of held-out files, encoded line by line: at most ``tokens`` tokens, and hardly fewer."""
    if tokens == 0:
        return ""
    lines: list[str] = []
    total = 0
    while True:  # several pieces, if files are shorter than ``tokens``
        for line in _piece(rng, min(8 * tokens, _PIECE)).splitlines(keepends=True):
            total += len(tokenizer(line, add_special_tokens=False)["input_ids"])
            if total > tokens:
                return "".join(lines)
            lines.append(line)


def _tokenizer_of(arguments: Mapping[str, Any]) -> Any:
    """The tokenizer that distances are counted with.

    Raises:
        ValueError: no tokenizer is named.
    """
    name = arguments.get("tokenizer") or arguments.get("pretrained")
    if name is None:
        raise ValueError('distances are in tokens, and no tokenizer is named: give metadata={"tokenizer": "DIRECTORY"}')
    if isinstance(name, str):
        return _loaded_tokenizer(name)
    if not callable(name) or not hasattr(name, "chat_template"):
        raise ValueError(f'a {type(name).__name__} is no tokenizer: give metadata={{"tokenizer": ...}}, a name or a tokenizer')
    return name


@functools.cache
def _loaded_tokenizer(name: str) -> Any:
    from patchkit.models import load_tokenizer

    return load_tokenizer(name)


@functools.cache
def _texts() -> list[str]:
    return list(read_texts(stdlib_files("heldout")))


def _splits(documents: Iterator[dict[str, str]]) -> Splits:
    return {"test": Dataset.from_list(list(documents))}
