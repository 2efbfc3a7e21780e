"""Benchmark of text generation as a user meets it: time to the first token, latency and tokens per second.

The same prompts go to a model in this process or to any server with OpenAI's `/completions` or `/chat/completions`, token by token
(server-sent events), so that both are measured in the same way.
"""

from __future__ import annotations

import csv
import dataclasses
import difflib
import itertools
import json
import os
import queue
import statistics
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import requests
import yaml
from requests.adapters import HTTPAdapter
from requests.exceptions import ChunkedEncodingError
from transformers import PreTrainedTokenizerBase

from patchkit.errors import PatchError
from patchkit.measure.perplexity import TextError
from patchkit.measure.prompts import read_prompts
from patchkit.measure.stdlib_text import read_texts, stdlib_files

DTYPES = ("float32", "bfloat16", "float16")
FIGURES = ("ttft_ms", "latency_ms", "tokens_per_s")

_CONNECT_TIMEOUT_S = 10.0
_FIRST_BACK_OFF_S = 0.5
_MOST_BACK_OFF_S = 30.0
_TRY_AGAIN = {408, 429, 500, 502, 503, 504}


class BenchError(PatchError):
    """The benchmark cannot be run as it was asked for; the message says why."""


class RequestFailed(PatchError):
    """One request got no usable answer, retries included."""


@dataclass(frozen=True)
class Config:
    """What to measure. A YAML file holds the same keys.

    Attributes:
        model: 'bundled', a model directory or a hub id; with `endpoint`, the model's name on that server.
        patches: spec of the patches of a local model; empty for none.
        endpoint: base address of a server, such as http://localhost:8000/v1; None runs the model here.
        chat: ask /chat/completions instead of /completions.
        api_key_env: environment variable with the server's key.
        prompts: 'stdlib', or a UTF-8 file with a prompt per line (.json: a list of texts).
        n_prompts, prompt_chars: how many prompts; characters of each of those that are taken from the standard library.
        new_tokens: tokens to ask for.
        iterations: how often each prompt is measured.
        warmup: requests before the measured ones.
        concurrency: requests at a time, for a server.
        timeout_s: for a whole request.
        retries: further attempts after a connection failure, a time-out, or an answer of 408, 429 or 5xx.
        dtype, device: of a local model.

    Raises:
        BenchError: a value that cannot be used.
    """

    model: str = "bundled"
    patches: str = ""
    endpoint: str | None = None
    chat: bool = False
    api_key_env: str = "OPENAI_API_KEY"
    prompts: str = "stdlib"
    n_prompts: int = 8
    prompt_chars: int = 512
    new_tokens: int = 64
    iterations: int = 3
    warmup: int = 1
    concurrency: int = 1
    timeout_s: float = 120.0
    retries: int = 3
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Config)
        for key, value in vars(self).items():
            kinds = typing.get_args(hints[key]) if isinstance(hints[key], types.UnionType) else (hints[key],)
            fits = type(value) in kinds or (float in kinds and type(value) is int)
            if not fits:
                raise BenchError(f"{key}: {value!r} is no {' or '.join(kind.__name__ for kind in kinds)}")
        for key, least in dict(n_prompts=1, prompt_chars=1, new_tokens=1, iterations=1, warmup=0, concurrency=1, retries=0).items():
            if getattr(self, key) < least:
                raise BenchError(f"{key}: {getattr(self, key)} is too small, give at least {least}")
        if self.dtype not in DTYPES:
            raise BenchError(f"dtype: {self.dtype!r} is unknown, give one of {', '.join(DTYPES)}")
        if not 0 < self.timeout_s < float("inf"):
            raise BenchError(f"timeout_s: {self.timeout_s} is no time to wait, give seconds above 0")
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise BenchError(f"endpoint: {self.endpoint!r} is no address, write it like http://localhost:8000/v1")
        if self.endpoint is not None and self.patches:
            raise BenchError("patches: a server cannot be patched from here, leave patches or endpoint out")
        if self.endpoint is None and (self.chat or self.concurrency > 1):
            raise BenchError("chat and concurrency are for a server: give endpoint, or leave them out")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Config:
        """The configuration in a YAML file, with `overrides` in the place of what the file says.

        Raises:
            BenchError: no such file, not a mapping, or an unknown key (with the nearest known one).
        """
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise BenchError(f"{path} cannot be read ({error.strerror}): give a YAML file") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise BenchError(f"{path} is not YAML ({error})") from error
        if not isinstance(given, dict) or not given:
            raise BenchError(f"{path} holds no keys: write lines such as 'model: bundled'")
        known = [each.name for each in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                nearest = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
                guess = f", did you mean {nearest[0]!r}?" if nearest else ":"
                raise BenchError(f"{path}: unknown key {key!r}{guess} available: {', '.join(known)}")
        return cls(**(given | overrides))


@dataclass(frozen=True)
class Sample:
    """One answer, or a failure.

    Attributes:
        prompt, iteration: which of the prompts, and which time.
        ttft_ms: milliseconds from the request to the first text.
        latency_ms: to the end of the answer.
        tokens: new ones, as the server counts them, else events with text; None, as the times are, in a failure.
        error: why there is no answer.
    """

    prompt: int
    iteration: int
    ttft_ms: float | None = None
    latency_ms: float | None = None
    tokens: int | None = None
    error: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """New tokens over latency; None in a failure."""
        return None if self.tokens is None or not self.latency_ms else 1000 * self.tokens / self.latency_ms


# A prompt -> milliseconds to the first token and to the end, and the number of new tokens.
Generator = Callable[[str], tuple[float, float, int]]


def warm_up(config: Config, generate: Generator, prompts: Sequence[str]) -> None:
    """The requests before the measured ones.

    Raises:
        RequestFailed: one fails.
    """
    for index in range(config.warmup):
        generate(prompts[index % len(prompts)])


def run(config: Config, generate: Generator, prompts: Sequence[str]) -> Iterator[Sample]:
    """Measure every prompt `iterations` times; samples come as they are finished, so an interrupted run has what it had.

    Raises:
        RequestFailed: the first request fails, so the others would. Later failures are samples.
    """

    def measure(job: tuple[int, int]) -> Sample:
        try:
            ttft_ms, latency_ms, tokens = generate(prompts[job[0]])
            return Sample(*job, ttft_ms, latency_ms, tokens)
        except RequestFailed as error:
            return Sample(*job, error=str(error))

    jobs = [(prompt, iteration) for iteration in range(config.iterations) for prompt in range(len(prompts))]
    samples = map(measure, jobs) if config.concurrency == 1 else _at_a_time(config.concurrency, measure, jobs)
    answered = False
    for sample in samples:
        if sample.error is not None and not answered:
            raise RequestFailed(sample.error)
        answered = True
        yield sample


def _at_a_time(count: int, measure: Callable[[tuple[int, int]], Sample], jobs: Sequence[tuple[int, int]]) -> Iterator[Sample]:
    """As `map`, in `count` threads and in the order in which they finish."""
    waiting = iter(jobs)
    done: queue.SimpleQueue[Sample | BaseException] = queue.SimpleQueue()
    lock, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            try:
                done.put(measure(job))
            except BaseException as error:  # for the thread that waits
                done.put(error)

    for _ in range(count):
        threading.Thread(target=work, daemon=True).start()  # a daemon does not hold up a program that is interrupted
    try:
        for _ in jobs:
            result = done.get()
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stopped.set()


def load_prompts(source: str, count: int, chars: int) -> list[str]:
    """`count` prompts: the beginnings, of `chars` characters, of held-out files of Python's library, or those of a file.

    Raises:
        TextError: no such text, or none in it.
    """
    if source != "stdlib":
        return read_prompts(Path(source))[:count]
    try:
        texts = [text[:chars] for text in read_texts(stdlib_files("heldout")) if len(text) >= chars]
    except FileNotFoundError as error:
        raise TextError(f"{error}: give a file of your own as prompts") from error
    if not texts:
        raise TextError(f"no file of Python's library has {chars} characters: give a smaller prompt_chars, or a file of your own")
    return [texts[index * len(texts) // count] for index in range(min(count, len(texts)))]


class LocalModel:
    """A model in this process, greedy; patched or not."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens

    def __call__(self, prompt: str) -> tuple[float, float, int]:
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        clock = _Clock()
        started = time.perf_counter()
        try:
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=pad,
                streamer=clock,
            )
        except IndexError as error:
            raise RequestFailed(
                f"the model cannot take so many tokens ({error}): its position table ends, so give shorter prompts"
            ) from error
        latency = time.perf_counter() - started
        # What comes first is the prompt.
        return 1000 * (clock.times[1] - started), 1000 * latency, output.shape[1] - inputs["input_ids"].shape[1]


class _Clock:
    """A streamer that knows when each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _Again(Exception):
    """An attempt failed in a way that may pass; with the seconds to wait that the server asks for."""

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
        """Return if the request is worth repeating at once, in another form."""
        said = " ".join(response.text.split())[:200]
        status = f"{self.url} answered {response.status_code} {response.reason}: {said or 'nothing'}"
        if response.status_code in _TRY_AGAIN:
            wait = response.headers.get("Retry-After", "")
            raise _Again(status, float(wait) if wait.isdecimal() else 0.0)
        if asked_usage and "stream_options" in said:
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
                said = (data.get("usage") or {}).get("completion_tokens")
            except (AttributeError, TypeError) as error:
                raise RequestFailed(f"{self.url} sent an event of another form than OpenAI's ({error}): {str(data)[:80]}") from error
            counted = said if isinstance(said, int) and said > 0 else counted
        ended = time.perf_counter()
        if first is None:
            raise RequestFailed(f"{self.url} sent no text")
        if not finished:
            raise RequestFailed(f"{self.url} ended its answer without a finish_reason: it was cut off")
        return 1000 * (first - started), 1000 * (ended - started), counted or events

    def _events(self, response: requests.Response, deadline: float) -> Iterator[dict[str, Any]]:
        """The JSON objects of an event stream, up to [DONE]."""
        pending = b""
        # Chunks as they come; without chunks, waiting for more than a byte would hold events back.
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


def summary(samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Mean, median, standard deviation, smallest, largest and 95th percentile of each figure, over the answers; empty without one."""
    found = {}
    for figure in FIGURES:
        values = [getattr(sample, figure) for sample in samples if sample.error is None]
        if values:
            found[figure] = {
                "mean": statistics.fmean(values),
                "median": statistics.median(values),
                "std": statistics.stdev(values) if len(values) > 1 else 0.0,
                "min": min(values),
                "max": max(values),
                "p95": float(np.percentile(values, 95)),
            }
    return found


class Table:
    """The samples as CSV, a line as each comes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = [*(each.name for each in dataclasses.fields(Sample)), "tokens_per_s"]
        self._append(self.columns, "w")

    def add(self, sample: Sample) -> None:
        """Append one line."""
        self._append([getattr(sample, column) for column in self.columns], "a")

    def _append(self, row: Sequence[Any], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
