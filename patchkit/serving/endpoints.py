"""The two endpoints that generate: they read a request, have its choices generated, and reply, at once or as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from patchkit.errors import GrammarError
from patchkit.serving.api_error import ApiError, bad
from patchkit.serving.body import read_body
from patchkit.serving.choice import End, Mailbox, Piece
from patchkit.serving.engine import Engine
from patchkit.serving.event_stream import DONE, EventStream, event, unless_gone
from patchkit.serving.prepare import Preparer
from patchkit.serving.protocol import Asked, read_chat, read_completion
from patchkit.serving.reply import Reply


class Endpoints:
    """Chats and completions over one engine.

    Args:
        engine: generates.
        preparer: checks requests and makes choices of them.
        tokenizer: reads calls of functions from tokens.
    """

    def __init__(self, engine: Engine, preparer: Preparer, tokenizer: Any) -> None:
        self.engine, self.preparer, self.tokenizer = engine, preparer, tokenizer

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, read_chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, read_completion)

    async def _answer(self, request: Request, read: Callable[[Any], Asked]) -> Response:
        asked = read(await read_body(request))
        mailbox = Mailbox(asyncio.get_running_loop())
        # Templates, tokens and grammars take time, in which other clients get their tokens.
        choices = await run_in_threadpool(self.preparer.choices, asked, mailbox)
        reply = Reply(asked, choices, self.preparer.name, self.tokenizer, self.preparer.token_text)
        self.engine.submit(choices)
        try:
            if not asked.stream:
                await unless_gone(request, self._all(reply, mailbox))
                return JSONResponse(reply.whole())
            # An error before the first token still is a status of HTTP.
            first = await unless_gone(request, _next(mailbox))
        except BaseException:
            self.engine.cancel(choices)
            raise
        return EventStream(self._events(reply, mailbox, first), lambda: self.engine.cancel(choices))

    async def _all(self, reply: Reply, mailbox: Mailbox) -> None:
        while not reply.complete:
            reply.add(await _next(mailbox))

    async def _events(self, reply: Reply, mailbox: Mailbox, first: Piece | End) -> AsyncIterator[bytes]:
        for chunk in reply.first_chunks():
            yield event(chunk)
        received = [first]
        while True:
            parts: list[bytes] = []
            for each in received:
                error = _error_of(each)
                if error is not None:
                    yield b"".join([*parts, event(error.body()), DONE])
                    return
                reply.add(each)
                parts += map(event, reply.chunks(each))
            if parts:
                yield b"".join(parts)
            if reply.complete:
                break
            # What has come while this loop had other things to do goes out in one piece.
            received = [await mailbox.queue.get()]
            while not mailbox.queue.empty():
                received.append(mailbox.queue.get_nowait())
        if reply.asked.include_usage:
            yield event(reply.last_chunk())
        yield DONE


async def _next(mailbox: Mailbox) -> Piece | End:
    """The next piece or end.

    Raises:
        ApiError: a choice has met an error, or was cancelled by the server.
    """
    received = await mailbox.queue.get()
    error = _error_of(received)
    if error is not None:
        raise error
    return received


def _error_of(received: Piece | End) -> ApiError | None:
    """What a client is told of a choice that has not ended in order; None for all else."""
    if isinstance(received, End) and isinstance(received.error, GrammarError):
        return bad(None, str(received.error), "invalid_grammar")
    if isinstance(received, End) and received.finish == "error":
        return ApiError(500, "the model has met an error in this request, which is in the server's log", code="generation_failed")
    if isinstance(received, End) and received.finish == "cancelled":
        return ApiError(503, "the server shuts down", code="shutting_down")
    return None
