"""Client of a server with OpenAI's `/completions` or `/chat/completions`, streamed token by token."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError

from patchkit.bench.config import Config
from patchkit.errors import PatchError

_CONNECT_TIMEOUT_S = 10.0

_FIRST_BACK_OFF_S = 0.5

_MOST_BACK_OFF_S = 30.0

_TRY_AGAIN = {408, 429, 500, 502, 503, 504}


class RequestFailed(PatchError):
    """One request got no usable answer, retries included."""


class _Again(Exception):
    """A transient failure of one attempt; `wait_s` is the delay in seconds that the server asks for."""

    def __init__(self, why: str, wait_s: float = 0.0) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Server:
    """A server with OpenAI's streamed completions."""

    def __init__(self, config: Config, sleep: Callable[[float], object] = time.sleep) -> None:
        self.config, self.sleep = config, sleep
        self.url = f"{(config.endpoint or '').rstrip('/')}/{'chat/completions' if config.chat else 'completions'}"
        self.session = requests.Session()
        adapter = HTTPAdapter(pool_maxsize=config.concurrency)
        self.session.mount("http://", adapter)
        self.session.mount("https://", adapter)
        self.session.headers["Accept-Encoding"] = "identity"  # compression would hold events back
        if os.environ.get(config.api_key_env):
            self.session.headers["Authorization"] = f"Bearer {os.environ[config.api_key_env]}"
        # Some servers refuse the option, and events are counted instead.
        self.asks_usage = True

    def __call__(self, prompt: str) -> tuple[float, float, int]:
        wait = _FIRST_BACK_OFF_S
        for attempt in range(self.config.retries + 1):
            try:
                return self._ask(prompt)
            except _Again as again:
                why = again
            if attempt < self.config.retries:
                self.sleep(min(max(wait, why.wait_s), _MOST_BACK_OFF_S))
                wait *= 2
        raise RequestFailed(f"{why} (attempts: {self.config.retries + 1})")

    def _ask(self, prompt: str) -> tuple[float, float, int]:
        body: dict[str, Any] = {"model": self.config.model, "max_tokens": self.config.new_tokens, "temperature": 0, "stream": True}
        body |= {"messages": [{"role": "user", "content": prompt}]} if self.config.chat else {"prompt": prompt}
        asked_usage = self.asks_usage
        if asked_usage:
            body["stream_options"] = {"include_usage": True}
        limit = self.config.timeout_s
        started = time.perf_counter()
        try:
            with self.session.post(self.url, json=body, stream=True, timeout=(min(limit, _CONNECT_TIMEOUT_S), limit)) as response:
                if response.status_code != 200:
                    self._refused(response, asked_usage)
                    return self._ask(prompt)
                return self._read(response, started)
        except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
            if isinstance(error, requests.Timeout) or time.perf_counter() - started >= limit:
                raise _Again(f"{self.url} did not answer within {limit:g} s: raise timeout_s, or look at the server") from error
            if isinstance(error, ChunkedEncodingError):
                raise _Again(f"{self.url} broke off in the middle of an answer") from error
            raise _Again(f"{self.url} cannot be reached: is the server running, and the address right?") from error
        except (requests.RequestException, UnicodeError) as error:
            raise RequestFailed(f"{self.url} cannot be asked ({error})") from error

    def _refused(self, response: requests.Response, asked_usage: bool) -> None:
        """Raise the error of a refused request; return if the request is to be repeated at once without `stream_options`."""
        answer = " ".join(response.text.split())[:200]
        status = f"{self.url} answered {response.status_code} {response.reason}: {answer or 'nothing'}"
        if response.status_code in _TRY_AGAIN:
            wait = response.headers.get("Retry-After", "")
            raise _Again(status, float(wait) if wait.isdecimal() else 0.0)
        if asked_usage and "stream_options" in answer:
            self.asks_usage = False
            return
        if response.status_code in (401, 403):
            status += f". Put the server's key into the environment variable {self.config.api_key_env}"
        if response.status_code == 404:
            status += f". Is {self.config.model!r} a model there, and does the address end as it should (/v1)?"
        raise RequestFailed(status)

    def _read(self, response: requests.Response, started: float) -> tuple[float, float, int]:
        first = None
        events, counted, finished = 0, None, False
        for data in self._events(response, started + self.config.timeout_s):
            if data.get("error"):
                raise RequestFailed(f"{self.url} failed in the middle of an answer: {data['error']}")
            try:
                for choice in data.get("choices") or []:
                    delta = choice.get("delta") or {}
                    # "content" or, of a model that thinks, "reasoning_content", "reasoning", ...: servers differ.
                    if choice.get("text") or any(isinstance(text, str) and text for name, text in delta.items() if name != "role"):
                        first = first or time.perf_counter()
                        events += 1
                    finished = finished or choice.get("finish_reason") is not None
                reported = (data.get("usage") or {}).get("completion_tokens")
            except (AttributeError, TypeError) as error:
                raise RequestFailed(f"{self.url} sent an event of another form than OpenAI's ({error}): {str(data)[:80]}") from error
            counted = reported if isinstance(reported, int) and reported > 0 else counted
        ended = time.perf_counter()
        if first is None:
            raise RequestFailed(f"{self.url} sent no text")
        if not finished:
            raise RequestFailed(f"{self.url} ended its answer without a finish_reason: it was cut off")
        return 1000 * (first - started), 1000 * (ended - started), counted or events

    def _events(self, response: requests.Response, deadline: float) -> Iterator[dict[str, Any]]:
        """The JSON objects of an event stream, up to [DONE]."""
        pending = b""
        # Read chunks as they arrive; without chunked transfer, reading more than a byte at a time would hold events back.
        for chunk in itertools.chain(response.iter_content(None if response.raw.chunked else 1), [b"\n"]):
            if time.perf_counter() > deadline:
                raise _Again(f"{self.url} did not finish within {self.config.timeout_s:g} s: raise timeout_s, or look at the server")
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                name, _, value = line.strip().partition(b":")
                if name != b"data":
                    if name not in (b"", b"event", b"id", b"retry"):
                        raise RequestFailed(f"{self.url} sent no event stream but {line[:80]!r}: does it support stream=true?")
                    continue
                if value.strip() == b"[DONE]":
                    return
                try:
                    data = json.loads(value)
                except ValueError as error:
                    raise RequestFailed(f"{self.url} sent a broken event ({error}): {value[:80]!r}") from error
                if not isinstance(data, dict):
                    raise RequestFailed(f"{self.url} sent an event that is no object: {value[:80]!r}")
                yield data
