"""Stop texts: generation ends where one of them appears in the generated text, and the printed text ends before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, TextStreamer

# A token writes at least one byte, and a character takes up to four.
_TOKENS_PER_CHARACTER = 4
_MORE_TOKENS = 8


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return ``text`` up to the first of ``stops`` in it, and whether there is one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class StopsAt(StoppingCriteria):
    """A stopping criterion: a row ends as soon as one of ``stops`` is in its generated text.

    Unlike transformers' own criterion it does not search the prompt.

    Args:
        tokenizer: decodes the tokens.
        stops: texts, none of them empty.
        prompt_tokens: number of tokens before the generated ones, padding included.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompt_tokens: int) -> None:
        self.tokenizer, self.stops, self.prompt_tokens = tokenizer, list(stops), prompt_tokens
        self.tokens = _TOKENS_PER_CHARACTER * max(map(len, stops)) + _MORE_TOKENS

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Return whether each row of token ids [B, T] has ended: bool [B]."""
        last = input_ids[:, max(self.prompt_tokens, input_ids.shape[1] - self.tokens) :]
        texts = self.tokenizer.batch_decode(last, skip_special_tokens=True)
        return torch.tensor([before_stop(text, self.stops)[1] for text in texts], device=input_ids.device)


class Printer(TextStreamer):
    """A streamer that prints text as it is generated, up to the first of ``stops``. It holds back text that may begin a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stops = list(stops)
        self._held, self._done = "", False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Print a piece of text, as far as it can be printed. transformers calls it with each piece."""
        if not self._done:
            shown, self._done = before_stop(self._held + text, self.stops)
            kept = 0 if self._done or stream_end else beginning_of_a_stop(shown, self.stops)
            self._held = shown[len(shown) - kept :]
            super().on_finalized_text(shown[: len(shown) - kept])
        if stream_end:
            super().on_finalized_text("", stream_end=True)
            self._held, self._done = "", False


def beginning_of_a_stop(text: str, stops: Sequence[str]) -> int:
    """Return the largest number of characters at the end of ``text`` that are the beginning of a stop text."""
    longest = max(map(len, stops), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(stop.startswith(text[-n:]) for stop in stops)), 0)
