"""Benchmark of text generation as a user experiences it: time to the first token, latency and tokens per second.

The same prompts go to a model in this process or to any server with OpenAI's `/completions` or `/chat/completions`, token by token
(server-sent events), so that both are measured in the same way.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from patchkit.bench.config import Config
from patchkit.bench.results import Sample
from patchkit.bench.server import RequestFailed
from patchkit.measure.perplexity import TextError
from patchkit.measure.texts import heldout_texts, read_prompts, spread

# A prompt -> milliseconds to the first token and to the end, and the number of new tokens.
Generator = Callable[[str], tuple[float, float, int]]


def warm_up(config: Config, generate: Generator, prompts: Sequence[str]) -> None:
    """Send the requests before the measured ones.

    Raises:
        RequestFailed: one fails.
    """
    for index in range(config.warmup):
        generate(prompts[index % len(prompts)])


def run(config: Config, generate: Generator, prompts: Sequence[str]) -> Iterator[Sample]:
    """Measure every prompt `iterations` times, and yield each sample as it is finished, so that an interrupted run keeps its samples.

    Raises:
        RequestFailed: the first request fails, and so would the others. Later failures are samples.
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
    """Map `measure` over the jobs in `count` threads, and yield results in the order in which they finish."""
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
    """Return `count` prompts: the first `chars` characters of held-out files of Python's library, or the prompts of a file.

    Raises:
        TextError: no such text, or none in it.
    """
    if source != "stdlib":
        return read_prompts(Path(source))[:count]
    texts = [text[:chars] for text in heldout_texts("give a file of your own as prompts") if len(text) >= chars]
    if not texts:
        raise TextError(f"no file of Python's library has {chars} characters: give a smaller prompt_chars, or a file of your own")
    return spread(texts, count)
