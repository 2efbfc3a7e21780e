"""The tokens of a tokenizer as bytes, as the parser sees them.

Special tokens get names that no text contains. Under its own name, a special token is what the tokenizer makes of the same characters in a
string of the grammar: the parser would then force `<|endoftext|>` as the end token in the middle of a JSON string.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from patchkit.errors import GrammarError
from patchkit.grammar.library import llguidance

# Unicode guarantees that this is no character of any text.
_NO_CHARACTER = "\ufdd0"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens that a grammar chooses from.

    Attributes:
        tokens: llguidance's form of them.
        ends: ids of the tokens that end a text.
        special: name of each special token -> id.
    """

    tokens: Any
    ends: tuple[int, ...]
    special: dict[str, int]

    @property
    def size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.tokens.vocab_size)

    @property
    def words(self) -> int:
        """Number of int32 words of a mask."""
        return -(-self.size // 32)


_known: weakref.WeakKeyDictionary[Any, dict[Any, Vocabulary]] = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any, ends: Sequence[int] | None = None) -> Vocabulary:
    """Return the vocabulary of a tokenizer; it is built once for each number of tokens and each set of end tokens.

    Args:
        tokenizer: a fast tokenizer, or a `Vocabulary`, which is returned.
        ends: ids of the end tokens; None: the tokenizer's own.

    Raises:
        GrammarError: the tokenizer is slow, or there is no end token.
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise GrammarError(
            f"{type(tokenizer).__name__} is no fast tokenizer, whose tokens a grammar needs as bytes: load it with AutoTokenizer and "
            "use_fast=True"
        )
    if ends is None:
        ends = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
    if not ends:
        raise GrammarError(
            "this tokenizer has no end token, so that no text could end: give ends=[...], as the model's generation_config does"
        )
    beyond = [end for end in ends if not 0 <= end < len(tokenizer)]
    if beyond:
        raise GrammarError(f"ends={list(ends)}: the tokenizer has no token {beyond[0]}, give ids below {len(tokenizer)}")
    built = _known.setdefault(tokenizer, {})
    key = (len(tokenizer), tuple(ends))
    if key not in built:
        built[key] = _built(tokenizer, tuple(ends))
    return built[key]


def vocabulary_of_bytes(tokens: Sequence[bytes], ends: Sequence[int]) -> Vocabulary:
    """Return a vocabulary without a tokenizer: token i is ``tokens[i]``."""
    library = llguidance()
    return Vocabulary(library.LLTokenizer(library.TokenizerWrapper(_Bytes(tokens, ends)), eos_token=list(ends)), tuple(ends), {})


class _Bytes:
    """Tokens as llguidance's `TokenizerWrapper` wants them; the longest one that fits comes first."""

    def __init__(self, tokens: Sequence[bytes], ends: Sequence[int]) -> None:
        self.tokens, self.special_token_ids = list(tokens), list(ends)
        self.eos_token_id, self.bos_token_id = ends[0], None
        text = [(token, i) for i, token in enumerate(tokens) if token and i not in ends]
        self._longest_first = sorted(text, key=lambda pair: (-len(pair[0]), pair[1]))

    def __call__(self, text: bytes | str) -> list[int]:
        rest = text.encode() if isinstance(text, str) else text
        found = []
        while rest:
            token, i = next(((token, i) for token, i in self._longest_first if rest.startswith(token)), (rest[:1], None))
            found += [] if i is None else [i]
            rest = rest[len(token) :]
        return found


def _built(tokenizer: Any, ends: tuple[int, ...]) -> Vocabulary:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    spec["padding"] = spec["truncation"] = None
    special = {each["content"]: each["id"] for each in spec.get("added_tokens") or [] if each["special"]}
    renamed = {name: f"{_NO_CHARACTER}{i}{_NO_CHARACTER}" for name, i in special.items()}
    for each in spec.get("added_tokens") or []:
        each["content"] = renamed.get(each["content"], each["content"])
    model = spec["model"]
    words = model.get("vocab")
    if isinstance(words, dict):
        model["vocab"] = {renamed.get(word, word): i for word, i in words.items()}
    elif words is not None:  # a Unigram model
        model["vocab"] = [[renamed.get(word, word), score] for word, score in words]
    if model.get("unk_token") in renamed:
        model["unk_token"] = renamed[model["unk_token"]]
    try:
        tokens = llguidance().LLTokenizer(json.dumps(spec), eos_token=list(ends))
    except ValueError as error:
        raise GrammarError(f"llguidance cannot read this tokenizer ({error}): give one with a byte-level or byte-fallback model") from error
    return Vocabulary(tokens, ends, special)
