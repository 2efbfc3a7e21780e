"""Replies in OpenAI's form: of a whole request, and as chunks while tokens come."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from patchkit.serving.choice import Choice, End, Piece, TokenChance
from patchkit.serving.protocol import Asked


class Reply:
    """The reply to one request.

        reply = Reply(asked, choices, "model", tokenizer, token_text)
        for event in events: send(reply.chunks(event))       # streamed
        send(reply.whole())                                  # or at the end of all choices

    Args:
        asked: the request.
        choices: those that were made of it.
        model: name of the model.
        tokenizer: reads calls of functions from tokens.
        token_text: gives a token as text.
    """

    def __init__(self, asked: Asked, choices: Sequence[Choice], model: str, tokenizer: Any, token_text: Callable[[int], str]) -> None:
        self.asked, self.choices, self.model = asked, list(choices), model
        self.tokenizer, self.token_text = tokenizer, token_text
        kind, prefix = ("chat.completion", "chatcmpl") if asked.chat else ("text_completion", "cmpl")
        self.head = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self.kind = kind
        self._pieces: list[list[Piece]] = [[] for _ in choices]
        self._finish: list[str | None] = [None] * len(choices)

    def add(self, event: Piece | End) -> None:
        """Take a piece, or an end, of one of the choices."""
        if isinstance(event, Piece):
            self._pieces[event.choice.index].append(event)
        else:
            self._finish[event.choice.index] = event.finish

    @property
    def complete(self) -> bool:
        """Whether all choices have ended."""
        return all(finish is not None for finish in self._finish)

    def usage(self) -> dict[str, Any]:
        """Return the counts of tokens; a prompt counts once, however many choices it has, and as the one that had to feed most of it."""
        prompts: dict[int, Choice] = {}
        for choice in self.choices:
            prompts[choice.prompt] = min(prompts.get(choice.prompt, choice), choice, key=lambda each: each.cached)
        prompt, new = sum(len(choice.ids) for choice in prompts.values()), sum(len(choice.tokens) for choice in self.choices)
        rows = [choice.row for choice in self.choices if choice.row is not None]
        proposed, accepted = sum(row.proposed for row in rows), sum(row.accepted for row in rows)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(choice.cached for choice in prompts.values())},
            # OpenAI's names for drafts, which there are a prediction that the client sends.
            "completion_tokens_details": {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": proposed - accepted},
        }

    def whole(self) -> dict[str, Any]:
        """Return the JSON object of the answer, once all choices have ended."""
        choices = [self._choice(choice) for choice in self.choices]
        return {**self.head, "object": self.kind, "choices": choices, "usage": self.usage()}

    def first_chunks(self) -> Iterator[dict[str, Any]]:
        """Return what comes before any token: of a chat, the role of each choice."""
        if self.asked.chat:
            for choice in self.choices:
                yield self._chunk(choice, {"role": "assistant", "content": ""}, None)

    def chunks(self, event: Piece | End) -> Iterator[dict[str, Any]]:
        """Return the chunks of a piece or an end, which was added. Calls of functions come when their choice has ended."""
        choice = event.choice
        if isinstance(event, Piece):
            if choice.tools is None:
                yield self._chunk(choice, {"content": event.text}, None, self._logprobs(choice, [event]))
            return
        finish = self._reason(choice, [])
        if choice.tools is not None:
            said, calls = self._message(choice)
            finish = self._reason(choice, calls)
            if said is not None:
                yield self._chunk(choice, {"content": said}, None, self._logprobs(choice, self._pieces[choice.index]))
            if calls:
                logprobs = self._logprobs(choice, self._pieces[choice.index]) if said is None else None
                yield self._chunk(choice, {"tool_calls": [{"index": i, **call} for i, call in enumerate(calls)]}, None, logprobs)
        yield self._chunk(choice, {} if self.asked.chat else {"content": ""}, finish)

    def last_chunk(self) -> dict[str, Any]:
        """Return the chunk of counts that ``include_usage`` asks for."""
        return {**self.head, "object": self._chunk_kind, "choices": [], "usage": self.usage()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.asked.chat else self.kind

    def _chunk(self, choice: Choice, delta: dict[str, Any], finish: str | None, logprobs: Any = None) -> dict[str, Any]:
        body = {"delta": delta} if self.asked.chat else {"text": delta["content"]}
        usage = {"usage": None} if self.asked.include_usage else {}
        part = {"index": choice.index, **body, "logprobs": logprobs, "finish_reason": finish}
        return {**self.head, "object": self._chunk_kind, "choices": [part], **usage}

    def _choice(self, choice: Choice) -> dict[str, Any]:
        pieces = self._pieces[choice.index]
        logprobs = self._logprobs(choice, pieces)
        said, calls = self._message(choice)
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        message = {"message": {"role": "assistant", "content": said, "refusal": None, **more}} if self.asked.chat else {"text": said}
        return {"index": choice.index, **message, "logprobs": logprobs, "finish_reason": self._reason(choice, calls)}

    def _message(self, choice: Choice) -> tuple[str | None, list[dict[str, Any]]]:
        text = "".join(piece.text for piece in self._pieces[choice.index])
        if choice.tools is None:
            return text, []
        return choice.tools.message(text, choice.ids.tolist(), choice.tokens, self.tokenizer, choice.shown.stopped)

    def _reason(self, choice: Choice, calls: list[Any]) -> str:
        finish = self._finish[choice.index] or "stop"
        return "tool_calls" if calls and finish == "stop" else finish

    def _logprobs(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        tokens = [token for piece in pieces for token in piece.tokens]
        if self.asked.chat:
            return {"content": [self._entry(token) for token in tokens], "refusal": None}
        return {
            "tokens": [self.token_text(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.token_text(each): chance for each, chance in token.likeliest} for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _entry(self, token: TokenChance) -> dict[str, Any]:
        likeliest = [self._named(each, chance) for each, chance in token.likeliest]
        return {**self._named(token.token, token.logprob), "top_logprobs": likeliest}

    def _named(self, token: int, chance: float) -> dict[str, Any]:
        text = self.token_text(token)
        # A token that is a part of a character has no bytes that this could name.
        return {"token": text, "logprob": chance, "bytes": None if "\ufffd" in text else list(text.encode())}
