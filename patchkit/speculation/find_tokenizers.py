"""The tokenizers of a target and its draft: those that were given, or those that were saved with the models."""

from __future__ import annotations

from typing import Any

from patchkit.errors import DraftError
from patchkit.models import ModelUnavailable, load_tokenizer
from patchkit.speculation.tokenizer_pair import TokenizerPair, vocabulary


def find_pair(target: Any, draft: Any, target_tokenizer: Any, draft_tokenizer: Any) -> TokenizerPair | None:
    """Both tokenizers; None where one set of ids serves both models.

    Vocabularies of equal sizes are taken for the same one unless both tokenizers are given. One tokenizer may have two sizes, because
    vocabularies are padded.

    Args:
        target, draft: the models.
        target_tokenizer, draft_tokenizer: as given: tokenizers, names or paths, or None.

    Raises:
        DraftError: the sizes differ, and a tokenizer is unknown; or the vocabularies have no token in common.
        ModelUnavailable: no tokenizer goes by the name that was given.
    """
    sizes = vocabulary(target), vocabulary(draft)
    if sizes[0] == sizes[1] and (target_tokenizer is None or draft_tokenizer is None):
        return None
    about = (
        f"the draft {type(draft).__name__} has a vocabulary of {sizes[1]} tokens, {type(target).__name__} one of {sizes[0]}, and drafts "
        "are re-tokenized only where both tokenizers are known"
    )
    ours = _tokenizer(target, target_tokenizer, f"{about}: give DraftModel(..., tokenizer=) the target's")
    theirs = _tokenizer(draft, draft_tokenizer, f"{about}: give DraftModel(..., draft_tokenizer=) the draft's")
    if ours.get_vocab() == theirs.get_vocab():
        return None
    pair = TokenizerPair(ours, theirs, target, draft)
    if not pair.common:
        raise DraftError(
            f"the tokenizers of the draft {type(draft).__name__} and of {type(target).__name__} have no token in common: "
            "give a draft whose tokenizer is more like the target's, or draft=prompt_lookup"
        )
    return pair


def _tokenizer(model: Any, given: Any, missing: str) -> Any:
    """A tokenizer as given, or by its model's name."""
    if given is not None:
        return load_tokenizer(given) if isinstance(given, str) else given
    name = getattr(model, "name_or_path", None)
    if not name:
        raise DraftError(f"{missing}, or a draft with the same tokenizer")
    try:
        return load_tokenizer(name)
    except ModelUnavailable as error:
        raise DraftError(f"{missing}, or a draft with the same tokenizer ({error})") from error
