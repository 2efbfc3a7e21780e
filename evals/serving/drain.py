"""Section "drain": SIGTERM while texts are generated. They are finished, nothing new is taken, and the exit status is 0."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from evals.serving.client import COMPLETIONS, Answer, ask
from evals.serving.figures import Bar
from evals.serving.options import Options
from evals.serving.servers import Server, ours
from evals.serving.texts import bodies

MODEL = "stdlib-7m"


def drain(options: Options) -> dict[str, Any]:
    """All clients are in the middle of a text, half of them streamed, and as many wait, when the signal comes."""
    rows = max(1, options.clients // 2)
    with Server(ours(MODEL, "", "--max-rows", str(rows)), options.work) as server:
        asked = [body | {"stream": number % 2 == 0} for number, body in enumerate(bodies(MODEL, options.clients, options.tokens))]
        expected = [ask(server.url, COMPLETIONS, body).text for body in asked]
        begun = [False] * options.clients

        def one(number: int) -> Answer:
            def notes(answer: Answer) -> bool:
                begun[number] = bool(answer.times)
                return False

            return ask(server.url, COMPLETIONS, asked[number], until=notes)

        with ThreadPoolExecutor(options.clients) as pool:
            running = [pool.submit(one, number) for number in range(options.clients)]
            while not any(begun):
                time.sleep(0.001)
            sent = time.perf_counter()
            server.process.send_signal(signal.SIGTERM)  # type: ignore[union-attr]
            time.sleep(0.05)
            late = ask(server.url, COMPLETIONS, asked[0] | {"stream": False})
            answers = [each.result() for each in running]
        status = server.process.wait(60)  # type: ignore[union-attr]
        seconds = time.perf_counter() - sent
    whole = sum(answer.text == text and answer.finish is not None for answer, text in zip(answers, expected, strict=True))
    bars = [
        Bar("texts finished, of those in flight", whole, options.clients, True),
        Bar("exit status", status, 0, False),
        Bar("status of a request after the signal", late.status, 503, True),
    ]
    return {"what": f"SIGTERM with {options.clients} texts in flight", "seconds_to_end": seconds, "bars": [bar.row() for bar in bars]}
