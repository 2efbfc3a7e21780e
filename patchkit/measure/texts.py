"""Texts: read from files or from the held-out library, and encoded as token ids."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from patchkit.errors import PatchError
from patchkit.measure.stdlib_text import read_texts, stdlib_files

T = TypeVar("T")


class TextError(PatchError):
    """A text cannot be read or scored; the message names the cause and the remedy."""


def read_text(path: str | Path) -> str:
    """Read the text of a UTF-8 file.

    Raises:
        TextError: the file is missing, a directory, unreadable, empty or not UTF-8 text.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise TextError(f"no such text file: {path}. Check the path") from error
    except IsADirectoryError as error:
        raise TextError(f"{path} is a directory: give one text file") from error
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}): convert it first") from error
    except OSError as error:
        raise TextError(f"{path} cannot be read ({error.strerror}): check its permissions") from error
    if "\0" in text:
        raise TextError(f"{path} holds NUL bytes, so it is binary, not text: give a text file")
    if not text.strip():
        raise TextError(f"{path} is empty: give a file with text in it")
    return text


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of one document, preceded by the boundary token (BOS, or EOS if the tokenizer has no BOS).

    With the boundary token, even the first token of the text is predicted. A tokenizer that has neither adds nothing.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    boundary = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids if boundary is None else [boundary, *ids]


def read_prompts(path: Path) -> list[str]:
    """Read prompts from a UTF-8 file: every line that is not blank, or the list of texts in a `.json` file.

    Raises:
        TextError: no such file, or no list of texts.
    """
    content = read_text(path)
    if path.suffix != ".json":
        return [line for line in content.splitlines() if line.strip()]
    try:
        texts = json.loads(content)
    except json.JSONDecodeError as error:
        raise TextError(f"{path} is not JSON ({error}): give a list of texts, or a text file with one prompt per line") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise TextError(f'{path} is not a JSON list of texts: write it like ["first prompt", "second prompt"]')
    return texts


def heldout_texts(remedy: str) -> Iterator[str]:
    """Held-out files of Python's standard library, in a fixed order.

    Args:
        remedy: for the message of the error: how to go on without the library.

    Raises:
        TextError: this interpreter ships without its library's sources.
    """
    try:
        files = stdlib_files("heldout")
    except FileNotFoundError as error:
        raise TextError(f"{error}: {remedy}") from error
    yield from read_texts(files)


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly spread over all of them."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def heldout_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[torch.Tensor, int]:
    """Token ids of the start of the held-out standard library text, every file preceded by the boundary token.

    Returns:
        At most tokens + 1 ids [T], and the number of files that they come from.

    Raises:
        TextError: this interpreter ships without its library's sources.
    """
    ids: list[int] = []
    files = 0
    for text in heldout_texts("run the demo with a complete Python, or score a file of your own with `patchkit ppl`"):
        ids += encode(tokenizer, text)
        files += 1
        if len(ids) > tokens:
            break
    return torch.tensor(ids[: tokens + 1]), files
