"""Documents for the perplexity of a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from patchkit.gates.result import GateError
from patchkit.measure.texts import encode, heldout_texts, spread

_LEAST_DOCUMENTS, _DOCUMENTS = 4, 16

DOCUMENT_TOKENS, _ALL_TOKENS = 4096, 32768


def texts_for(
    model: Any, length: int, least: int, tokenizer: PreTrainedTokenizerBase | None, documents: Sequence[str | Sequence[int]] | None
) -> list[torch.Tensor]:
    """Token ids of documents: the first `length` of each document that has at least `least`, and at least two."""
    least = max(least, 2)
    if documents is None or any(isinstance(each, str) for each in documents):
        tokenizer = tokenizer or _tokenizer_of(model)
    source: Sequence[str | Sequence[int]] | list[str]
    if documents is None:
        source = list(heldout_texts("give real texts with documents="))
    else:
        source = documents
    encoded = (encode(tokenizer, each) if isinstance(each, str) and tokenizer else each for each in source)
    # A document that is given twice would make the interval narrow and show nothing.
    different = dict.fromkeys(tuple(map(int, ids[:length])) for ids in encoded if len(ids) >= least and length >= 2)
    found = [torch.tensor(ids, dtype=torch.long) for ids in different]
    if len(found) < _LEAST_DOCUMENTS:
        raise GateError(
            f"{len(found)} of {len(source)} documents differ and have {least} tokens within context={length}: "
            f"give at least {_LEAST_DOCUMENTS} such with documents=, or another context="
        )
    count = len(found) if documents is not None else min(len(found), _DOCUMENTS, max(_ALL_TOKENS // length, _LEAST_DOCUMENTS))
    return spread(found, count)


def _tokenizer_of(model: Any) -> PreTrainedTokenizerBase:
    path = getattr(model, "name_or_path", "")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # foreign files raise nearly anything
        raise GateError(f"no tokenizer next to {path or 'this model'!r}: give tokenizer=, or documents= as token ids") from error
    return tokenizer
