"""Server-sent events: `EventStream`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed the connection, and waits for no answer."""


def event(value: Any) -> bytes:
    """Return a JSON value as one event."""
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A response of events, which is told at once when the client leaves.

    Args:
        events: the events as bytes.
        at_end: called when the stream ends, for whatever reason.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], at_end: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they or the client end."""
        try:
            await _first_of(self.stream_response(send), self.listen_for_disconnect(receive))
        except (ClientGone, OSError):
            return
        finally:
            self.at_end()


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Return the result of ``work``, unless the client leaves before; the request's body has been read.

    Raises:
        ClientGone: the client has left.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return await _first_of(work, gone())


async def _first_of(work: Awaitable[T], gone: Awaitable[Any]) -> T:
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
