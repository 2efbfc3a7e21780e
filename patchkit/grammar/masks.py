"""Masks of allowed tokens: bit t of a row of int32 words is token t."""

from __future__ import annotations

import numpy as np
import torch

from patchkit.errors import GrammarError

NEVER = float("-inf")


def allows(mask: np.ndarray, token: int) -> bool:
    """Return whether a mask [W] int32 allows a token; tokens beyond it are padding of the model's vocabulary."""
    word = token >> 5
    return word < len(mask) and bool((int(mask[word]) >> (token & 31)) & 1)


def only_token(mask: np.ndarray) -> int | None:
    """Return the one token that a mask [W] int32 allows; None if it allows none or several."""
    words = np.flatnonzero(mask)
    if len(words) != 1:
        return None
    bits = int(mask[words[0]]) & 0xFFFFFFFF
    return None if bits & (bits - 1) else 32 * int(words[0]) + bits.bit_length() - 1


def mask_of(tokens: tuple[int, ...], words: int) -> np.ndarray:
    """Return the mask [W] int32 that allows ``tokens``."""
    mask = np.zeros(words, dtype=np.uint32)
    for token in tokens:
        mask[token >> 5] |= np.uint32(1 << (token & 31))
    return mask.view(np.int32)


def apply(scores: torch.Tensor, masks: np.ndarray, size: int) -> torch.Tensor:
    """Return scores [B, V] with minus infinity where masks [B, W] do not allow a token; the masks are of ``size`` tokens.

    Raises:
        GrammarError: there are fewer scores than tokens.
    """
    check_width(scores.shape[-1], size)
    bits = np.unpackbits(np.ascontiguousarray(masks).view(np.uint8), axis=-1, bitorder="little", count=size)
    forbidden = torch.ones(scores.shape, dtype=torch.bool)
    forbidden[:, :size] = torch.from_numpy(bits) == 0
    return scores.masked_fill(forbidden.to(scores.device), NEVER)


def check_width(width: int, size: int) -> None:
    """Refuse a model with fewer logits than the tokenizer has tokens.

    Raises:
        GrammarError: it is so.
    """
    if width < size:
        raise GrammarError(
            f"the model has logits for {width} tokens and the tokenizer has {size}: give the grammar the tokenizer of this model, or call "
            f"model.resize_token_embeddings({size})"
        )
