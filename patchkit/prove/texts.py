"""Documents and passkeys that `patchkit prove` scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchkit.measure.texts import encode, heldout_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


def documents(tokenizer: PreTrainedTokenizerBase, contents: list[str] | None, tokens: int, reach: int = 0) -> list[list[int]]:
    """Token ids of documents of about ``tokens`` tokens in total; eight documents if possible, because intervals are over documents.

    Fewer, down to four, if eight would not be 1.5 times as long as the ``reach`` tokens beyond which the patches act.
    """
    length = max(64, tokens // 8, min(tokens // 4, reach + reach // 2))
    found: list[list[int]] = []
    for content in heldout_texts("give texts of your own with --text") if contents is None else contents:
        ids = encode(tokenizer, content)
        # Use the beginning of each library file, but all of a given text.
        last = length if contents is None else len(ids)
        found += [ids[start : start + length] for start in range(0, min(last, len(ids)), length)]
        if sum(map(len, found)) >= tokens:
            break
    return found[: max(1, -(-tokens // length))] if contents is not None else found


def passkeys(tokenizer: PreTrainedTokenizerBase) -> Callable[[int, int], tuple[list[int], int]]:
    """Return a function that makes Python code in which a string is stated and asked for ``distance`` tokens later."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def make(distance: int, trial: int) -> tuple[list[int], int]:
        key, tail = ids(str(10007 + 7919 * trial)), ids('\nassert PASSKEY == "')
        lines = "".join(f"value_{i} = {i * 37 % 101} + {(i + trial) * 53 % 89}\n" for i in range(distance))
        filler = ids(lines)[: max(0, distance - len(tail))]
        return [*ids('PASSKEY = "'), *key, *filler, *tail, *key], len(key)

    return make
