"""A client of a server with OpenAI's API that notes when each piece of text comes: `ask`, and several at once: `ask_together`."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@dataclass
class Answer:
    """One answer.

    Attributes:
        status: of HTTP.
        started, ended: by `time.perf_counter`.
        times: of each event with text.
        text: of the first choice.
        tokens: new tokens, as the server counts them; 0 if it does not say.
        finish: why the text has ended; None if the client has left before.
        error: the error's object, in whatever form the server gives it.
    """

    status: int
    started: float
    ended: float = 0.0
    times: list[float] = field(default_factory=list)
    text: str = ""
    tokens: int = 0
    finish: str | None = None
    error: Any = None

    @property
    def first(self) -> float:
        """Seconds to the first text."""
        return self.times[0] - self.started

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


def ask(
    url: str, path: str, body: dict[str, Any], timeout: float = 600.0, until: Callable[[Answer], bool] = lambda answer: False
) -> Answer:
    """Ask, as a stream if the body says so, and read the whole answer.

    Args:
        until: called after each event; true: leave, by closing the connection.
    """
    place = urlsplit(url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=timeout)
    answer = Answer(0, time.perf_counter())
    try:
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer.status = response.status
        if response.status != 200 or not body.get("stream"):
            _take_whole(answer, response.read())
        else:
            for line in response:
                if line.startswith(b"data: {"):
                    _take(answer, json.loads(line[6:]))
                    if until(answer):
                        break
    finally:
        connection.close()
        answer.ended = time.perf_counter()
    return answer


def _take_whole(answer: Answer, data: bytes) -> None:
    try:
        value = json.loads(data)
    except ValueError:
        answer.error = data.decode(errors="replace")[:300]
        return
    if answer.status != 200:
        answer.error = value
        return
    answer.times.append(time.perf_counter())
    _take(answer, value)


def _take(answer: Answer, event: dict[str, Any]) -> None:
    if "error" in event:
        answer.error = event
    answer.tokens = (event.get("usage") or {}).get("completion_tokens") or answer.tokens
    for choice in event.get("choices") or []:
        if choice.get("index"):
            continue
        said = choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""
        if said and "message" not in choice:
            answer.times.append(time.perf_counter())
        answer.text += said
        answer.finish = choice.get("finish_reason") or answer.finish


def ask_together(url: str, path: str, bodies: Sequence[dict[str, Any]]) -> list[Answer]:
    """Ask by one client for each body, all at the same moment.

    Raises:
        RuntimeError: an answer that is none.
    """
    gate = threading.Barrier(len(bodies))

    def one(body: dict[str, Any]) -> Answer:
        gate.wait()
        return ask(url, path, body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(one, bodies))
    for answer in answers:
        if answer.status != 200 or answer.error is not None or not answer.times:
            raise RuntimeError(f"status {answer.status}: {answer.error or 'no text'}")
    return answers


def get(url: str, path: str, timeout: float = 10.0) -> tuple[int, str]:
    """Return status and text of a GET."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=timeout)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()
