"""Documents and passkeys that `patchkit prove` scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


def documents(tokenizer: PreTrainedTokenizerBase, contents: list[str] | None, tokens: int, reach: int = 0) -> list[list[int]]:
    """Token ids of about ``tokens`` in all, in eight documents where the texts allow: intervals are over documents.

    Fewer, down to four, if they would not be longer by half than the ``reach`` tokens beyond which the patches act.
    """
    from patchkit.measure.perplexity import TextError
    from patchkit.measure.stdlib_text import read_texts, stdlib_files
    from patchkit.measure.texts import encode

    length = max(64, tokens // 8, min(tokens // 4, reach + reach // 2))
    found: list[list[int]] = []
    try:
        for content in read_texts(stdlib_files("heldout")) if contents is None else contents:
            ids = encode(tokenizer, content)
            # Of the library the beginning of each file; of a text that was given, all of it.
            last = length if contents is None else len(ids)
            found += [ids[start : start + length] for start in range(0, min(last, len(ids)), length)]
            if sum(map(len, found)) >= tokens:
                break
    except FileNotFoundError as error:
        raise TextError(f"{error}: give texts of your own with --text") from error
    return found[: max(1, -(-tokens // length))] if contents is not None else found


def passkeys(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], tuple[list[int], int]]:
    """Texts of Python in which a string is given, and wanted again."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def make(distance: int, trial: int) -> tuple[list[int], int]:
        key, tail = ids(str(10007 + 7919 * trial)), ids('\nassert PASSKEY == "')
        lines = "".join(f"value_{i} = {i * 37 % 101} + {(i + trial) * 53 % 89}\n" for i in range(distance))
        filler = ids(lines)[: max(0, distance - len(tail))]
        return [*ids('PASSKEY = "'), *key, *filler, *tail, *key], len(key)

    return make
