"""One text that a client waits for, and what it gets of it: `Choice`, `Piece`, `End`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.serving.shown import Detokenizer, ShownText
from patchkit.serving.tools import ToolUse
from patchkit.speculation import Row

_logger = logging.getLogger("patchkit")


@dataclass(frozen=True)
class TokenChance:
    """A token with its log probability, and the likeliest tokens in its place.

    Attributes:
        token: id.
        logprob: under the model's own distribution, before temperature, penalties and grammars.
        likeliest: (id, log probability), best first.
        offset: characters of the choice before the token.
    """

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]
    offset: int


@dataclass(frozen=True)
class Piece:
    """More text of a choice, and the tokens that begin in it, where log probabilities are wanted."""

    choice: Choice
    text: str
    tokens: list[TokenChance]


@dataclass(frozen=True)
class End:
    """The end of a choice.

    Attributes:
        finish: "stop", "length", "cancelled" or "error".
        error: what went wrong; None otherwise.
    """

    choice: Choice
    finish: str
    error: BaseException | None = None


@dataclass(eq=False)
class Mailbox:
    """Pieces and ends of the choices of one request, put in by the engine's thread and taken out by the server's event loop."""

    loop: asyncio.AbstractEventLoop
    queue: asyncio.Queue[Piece | End] = field(default_factory=asyncio.Queue)


def deliver(events: Sequence[Piece | End]) -> None:
    """Put events into the mailboxes of their choices, from any thread, with one call of each event loop: to wake it costs most."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Piece | End]] = {}
    for event in events:
        by_loop.setdefault(event.choice.mailbox.loop, []).append(event)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(_put, own)
        except RuntimeError:  # the server's loop is closed: nobody waits any more
            _logger.debug("patchkit: pieces of text had no reader")


def _put(events: Sequence[Piece | End]) -> None:
    for event in events:
        event.choice.mailbox.queue.put_nowait(event)


@dataclass(eq=False)
class Choice:
    """One text to generate.

    Attributes:
        index: its number in the answer.
        prompt: number of its prompt; choices of one prompt have the same.
        ids: [T] int64, the tokens of the prompt.
        seed: of its random numbers.
        options: of ``generate``.
        stops: texts before which it ends.
        logprobs: number of likeliest tokens at each position; None for no log probabilities.
        ends: ids of the tokens that end it, which have no text.
        detokenizer, shown: its text so far.
        tools: how calls of functions are read from it; None for none.
        mailbox: where its pieces go.
        row: its sequence in the scheduler, once it has one.
        taken: new tokens that were turned into text. After an error in a shared batch a choice is generated again, and these are skipped.
        read: characters of its text, shown or not.
        tokens: its new tokens, end tokens included.
        pending: tokens of which the text is not shown yet.
        alone: it is generated alone, after an error in a batch that it shared.
        submitted, last: when it came, and when its last token did, by `time.perf_counter`; None before the first.
    """

    index: int
    prompt: int
    ids: torch.Tensor
    seed: int
    options: dict[str, Any]
    stops: tuple[str, ...]
    logprobs: int | None
    ends: frozenset[int]
    detokenizer: Detokenizer
    shown: ShownText
    tools: ToolUse | None
    mailbox: Mailbox
    row: Row | None = None
    taken: int = 0
    read: int = 0
    tokens: list[int] = field(default_factory=list)
    pending: deque[TokenChance] = field(default_factory=deque)
    alone: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    last: float | None = None

    @property
    def cached(self) -> int:
        """Tokens of the prompt that did not have to be fed, because their keys were kept from another request."""
        return 0 if self.row is None else self.row.reused

    def take(self, new: list[int]) -> Piece | None:
        """Turn new tokens of the row into text; None where there is nothing to show yet."""
        assert self.row is not None
        first = len(self.row.new) - len(new)
        text = ""
        for position, token in enumerate(new, first):
            if position < self.taken:
                if self.logprobs is not None:  # generated again: its chances were taken the first time
                    self.row.logits[position] = self.row.logits[position].new_empty(0)
            else:
                self.taken = position + 1
                self.tokens.append(token)
                text += "" if self.shown.stopped or token in self.ends else self._text(position, token)
        return self._piece(text)

    def finish(self) -> Piece | None:
        """Return the text that was held back, at the end of the row."""
        text = "" if self.shown.stopped else self.shown.push(self.detokenizer.finish()) + self.shown.finish()
        return self._piece(text, everything=not self.shown.stopped)

    def _text(self, position: int, token: int) -> str:
        if self.logprobs is not None:
            self.pending.append(self._chance(position, token, self.logprobs))
        piece = self.detokenizer.push(token)
        self.read += len(piece)
        return self.shown.push(piece)

    def _chance(self, position: int, token: int, likeliest: int) -> TokenChance:
        assert self.row is not None
        chances = self.row.logits[position].log_softmax(-1)
        self.row.logits[position] = chances.new_empty(0)  # the row keeps its place, and not its [V] numbers
        best = chances.topk(min(likeliest, len(chances)))
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return TokenChance(token, float(chances[token]), pairs, self.read)

    def _piece(self, text: str, everything: bool = False) -> Piece | None:
        tokens = []
        while self.pending and (everything or self.pending[0].offset < self.shown.length):
            tokens.append(self.pending.popleft())
        return Piece(self, text, tokens) if text or tokens else None
