"""The end of a row by stopping criteria, and the logits processors of each row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

# Processors that treat each row alone; others may hold state for each row of the batch.
BY_ROW = {
    f"{name}LogitsProcessor"
    for name in (
        *("MinLength", "MinNewTokensLength", "RepetitionPenalty", "NoRepeatNGram", "SequenceBias", "NoBadWords", "InfNanRemove"),
        *("ForcedBOSToken", "ForcedEOSToken", "ExponentialDecayLengthPenalty", "SuppressTokens", "SuppressTokensAtBegin"),
    )
} | {
    "ExponentialDecayLengthPenalty",
    "LogitNormalization",
    *(f"{name}LogitsWarper" for name in ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta")),
}

# Those of them that do not read earlier tokens.
BY_SCORES = {
    *(f"{name}LogitsWarper" for name in ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta")),
    *("InfNanRemoveLogitsProcessor", "LogitNormalization", "SuppressTokensLogitsProcessor"),
}

# Those that leave a token possible where it is the only one.
KEEP_THE_ONLY_ONE = BY_SCORES - {"SuppressTokensLogitsProcessor"} | {"RepetitionPenaltyLogitsProcessor", "ExponentialDecayLengthPenalty"}

KNOWN_CRITERIA = {"MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria"}


class Stops:
    """The stopping criteria of one call, evaluated after every token; the usual ones without calling the criterion."""

    def __init__(self, criteria: Any, device: torch.device) -> None:
        self.max_length: int | None = None
        self.ends: set[int] = set()
        self.others: list[Callable[..., Any]] = []
        for each in criteria:
            kind = type(each).__name__
            if kind == "MaxLengthCriteria":
                self.max_length = each.max_length if self.max_length is None else min(self.max_length, each.max_length)
            elif kind == "EosTokenCriteria":
                self.ends |= set(each.eos_token_id.tolist())
            else:
                self.others.append(each)

    def room(self, length: int) -> int:
        """Number of tokens that a row of ``length`` tokens may still get."""
        return self.max_length - length if self.max_length is not None else 1 << 30

    def after(self, tokens: torch.Tensor, row: int, length: int, token: int, scores: list[torch.Tensor] | None = None) -> str | None:
        """Return why a row ends with its first ``length`` tokens, "stop" or "length"; None if it does not.

        Args:
            tokens: [R, room] int64.
            token: the last of these tokens.
            scores: [V] of every new token of the row, where `generate` keeps them; criteria get them as [1, V].
        """
        if token in self.ends:
            return "stop"
        if self.max_length is not None and length >= self.max_length:
            return "length"
        if not self.others:
            return None
        seen = None if scores is None else tuple(each[None] for each in scores)
        return "stop" if any(bool(each(tokens[row : row + 1, :length], seen)) for each in self.others) else None


def is_by_row(processor: Any) -> bool:
    """Return whether a processor handles one row at a time: its name is in `BY_ROW`, or it has ``by_row = True``.

    ``by_row`` promises more: scores of a row depend on its tokens only, so the processor may be called with drafts that are rejected later.
    """
    return type(processor).__name__ in BY_ROW or getattr(processor, "by_row", False) is True


def processors_of(row: int, rows: int, prompt: int, processors: Any) -> Any:
    """Return the processors for one row of a batch whose prompts have ``prompt`` tokens, padding included.

    A repetition penalty holds the padding of all rows, a grammar a parser of each.
    """
    own = type(processors)()
    for each in processors:
        if hasattr(each, "for_row"):
            each = each.for_row(row, rows, prompt)
        ignored = getattr(each, "prompt_ignore_length", None)
        if torch.is_tensor(ignored):
            each = copy.copy(each)
            each.prompt_ignore_length = ignored[row : row + 1]
        own.append(each)
    return own
