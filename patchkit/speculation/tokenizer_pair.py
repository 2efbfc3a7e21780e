"""The tokenizers of a target and of its draft: text of the one's tokens as tokens of the other.

Differs from transformers' `AssistedCandidateGeneratorDifferentTokenizers` in that special tokens that both have are kept, and that
tokens are aligned by their text instead of by the longest run of equal ids, which repetitions can mislead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from patchkit import _compat

# What a decoder writes for bytes that are no character (yet).
INCOMPLETE = "\ufffd"
# Tokens before a place that decide how text after it is split. Words are shorter.
_CONTEXT = 16


class TokenizerPair:
    """Two tokenizers, and the tokens that they share.

    Args:
        target, draft: the tokenizers.
        target_model, draft_model: their models; tokens that one of them lacks are not shared.

    Attributes:
        shared: ids of the draft [V] by the ids of the target, -1 where the draft has no token of this string.
        common: number of tokens of the same string.
        prefix: ids with which the draft's sequences begin (BOS).
    """

    def __init__(self, target: Any, draft: Any, target_model: Any, draft_model: Any) -> None:
        self.target, self.draft = target, draft
        size, draft_size = vocabulary(target_model), vocabulary(draft_model)
        both = {own: other for own, other in _compat.shared_tokens(target, draft, size).items() if own < size and other < draft_size}
        unread = {token for token in target.all_special_ids if token not in both}
        self.common = len(both)
        ends = end_tokens(target, target_model)
        self._target_end = ends[0] if ends else None
        self._draft_ends = frozenset(end_tokens(draft, draft_model))
        self._to_target = {other: own for own, other in both.items()}
        if self._target_end is not None and self._target_end not in both:
            unshared = [end for end in sorted(self._draft_ends) if end not in self._to_target]
            both |= dict.fromkeys([self._target_end], unshared[0]) if unshared else {}
        self.shared = np.full(size, -1, np.int64)
        self.shared[list(both)] = list(both.values())
        self._draft_specials = frozenset(draft.all_special_ids) | self._draft_ends
        alone, begun = self.read("a"), draft("a", verbose=False)["input_ids"]
        starts = [i for i in range(len(begun)) if begun[i : i + len(alone)] == alone]
        self.prefix: list[int] = list(begun[: starts[0]]) if starts else []
        self._unread = frozenset(unread | ({target.bos_token_id} if self.prefix else set()))

    def text(self, tokens: Iterable[int]) -> str:
        """Text of the target's tokens for the draft, without special tokens that it lacks."""
        return _decoded(self.target, [token for token in tokens if token not in self._unread])

    def read(self, text: str) -> list[int]:
        """The draft's tokens of a text, without special tokens around it."""
        return _encoded(self.draft, text)

    def ends(self, token: int) -> bool:
        """Whether a token of the draft ends a text, or is another special token, after which nothing is drafted."""
        return token in self._draft_specials

    def continuation(self, tokens: list[int], known: list[int], drafted: list[int]) -> list[int]:
        """The target's tokens of what was drafted.

        Args:
            tokens: the last tokens of the target's sequence; their text ends in a whole character.
            known: the last tokens of the draft for the same sequence.
            drafted: tokens of the draft after them; what follows the first special one is left out, and so are incomplete characters.
        """
        count = next((i for i, token in enumerate(drafted) if self.ends(token)), len(drafted))
        before = _decoded(self.draft, known[-_CONTEXT:])
        after = _decoded(self.draft, known[-_CONTEXT:] + drafted[:count])
        if not after.startswith(before):
            return []
        new, incomplete, _ = after[len(before) :].partition(INCOMPLETE)
        found = _continued(self.target, _decoded(self.target, tokens[-_CONTEXT:]), new)
        if count == len(drafted) or incomplete:
            return found
        end = self._to_target.get(drafted[count], self._target_end if drafted[count] in self._draft_ends else None)
        return found if end is None else [*found, end]


def vocabulary(model: Any) -> int:
    """Vocabulary size of the model: tokens that it takes and gives."""
    return int(model.config.get_text_config(decoder=True).vocab_size)


def end_tokens(tokenizer: Any, model: Any) -> list[int]:
    """Tokens that end a text, the tokenizer's own first; those of the generation config too."""
    config = getattr(model, "generation_config", None)
    given = getattr(config, "eos_token_id", None)
    more = given if isinstance(given, list | tuple) else [given]
    return list(dict.fromkeys(token for token in (tokenizer.eos_token_id, *more) if token is not None))


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _continued(tokenizer: Any, before: str, new: str) -> list[int]:
    """Tokens of ``new`` after the text ``before``, whose tokens are fixed."""
    if not new:
        return []
    # Where a token would span both, the new text is split alone; after a line break, because some tokenizers begin a text with a space.
    for context in (before, "\n"):
        alone, both = _encoded(tokenizer, context), _encoded(tokenizer, context + new)
        if both[: len(alone)] == alone:
            return both[len(alone) :]
    return _encoded(tokenizer, new)
