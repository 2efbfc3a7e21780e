"""Benchmark of text generation as a user meets it: time to the first token, latency and tokens per second.

The same prompts go to a model in this process or to any server with OpenAI's `/completions` or `/chat/completions`, token by token
(server-sent events), so that both are measured in the same way.
"""

from __future__ import annotations

import csv
import dataclasses
import queue
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from patchkit.bench.config import Config
from patchkit.bench.server import RequestFailed
from patchkit.measure.perplexity import TextError
from patchkit.measure.prompts import read_prompts
from patchkit.measure.stdlib_text import read_texts, stdlib_files

FIGURES = ("ttft_ms", "latency_ms", "tokens_per_s")


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
