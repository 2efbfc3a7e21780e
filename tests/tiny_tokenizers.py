"""Tiny tokenizers: bytes with merges of one's own, and letters."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(merges: Iterable[tuple[str, str]] = (), seed: int | None = None, end: str = "<end>") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 257 tokens and one per merge; ``seed`` shuffles the ids."""
    merges = list(merges)
    tokens = [end, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    if seed is not None:
        random.Random(seed).shuffle(tokens)
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end)


def letter_tokenizer(letters: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with these letters as its tokens, in this order; others become the first."""
    made = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token=letters[0]))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)
