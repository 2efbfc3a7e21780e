"""Section "soak": clients with mixed requests for a long time. Memory stays flat, texts stay right, and nothing is left at the end."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from prometheus_client.parser import text_string_to_metric_families

from evals.serving.client import CHATS, COMPLETIONS, Answer, ask, get
from evals.serving.figures import Bar, growth
from evals.serving.options import Options
from evals.serving.servers import Server, ours
from evals.serving.texts import CODE, with_template
from patchkit.models import load_model

MODEL = "stdlib-7m"
MINUTES = 30.0
MOST_GROWTH = 0.02
SAMPLES = 200  # of the server's memory, in the whole time
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "kind": {"enum": ["file", "folder"]}, "size": {"type": "integer"}},
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
}
Request = tuple[str, dict[str, Any]]


def soak(options: Options) -> dict[str, Any]:
    """Each client takes requests at random, and leaves every fifth before its end."""
    seconds = 60 * (options.minutes or MINUTES)
    patches = "prefix_cache(max_bytes='64MiB', block=32) + speculative(draft=suffix(scope=call))"
    with Server(ours(with_template(MODEL, options.work), patches, "--max-rows", str(max(2, options.clients - 2))), options.work) as server:
        asked = requests()
        expected = [ask(server.url, path, body) for path, body in asked]
        wrong = [f"alone: {body}" for (_, body), answer in zip(asked, expected, strict=True) if answer.status != 200]
        wrong += unlike_generate(asked, expected)
        counts: Counter[str] = Counter()
        until = time.monotonic() + seconds

        def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < until and server.status is None:
                path, body = asked[place := chance.randrange(len(asked))]
                leaves = chance.random() < 0.2
                most = chance.randrange(6) if leaves else 1 << 30
                streamed = body | {"stream": True} if leaves or chance.random() < 0.5 else body
                try:
                    answer = ask(server.url, path, streamed, until=lambda answer, most=most: len(answer.times) >= most)
                except OSError as error:
                    wrong.append(f"{error}: {body}")
                    continue
                counts[str(answer.status) if not leaves else "left"] += 1
                text, whole = answer.text, expected[place].text
                right = answer.status == 200 and (whole.startswith(text) if leaves and answer.finish is None else text == whole)
                if not right:
                    wrong.append(f"status {answer.status}, {answer.error}, {text!r} for {whole!r}: {body}")

        resident: list[int] = []
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(seconds / SAMPLES):
                with suppress(OSError, RuntimeError):
                    resident.append(server.resident())

        with ThreadPoolExecutor(options.clients + 1) as pool:
            watching = pool.submit(watch)
            for each in [pool.submit(client, number) for number in range(options.clients)]:
                each.result()
            ended.set()
            watching.result()
        alive = server.status is None
        left = figures_left(server.url) if alive else {}
    grown = growth(resident)
    bars = [
        Bar("growth of resident memory after the warm-up", grown, MOST_GROWTH, False),
        Bar("wrong texts", len(wrong), 0, False),
        Bar("rows, waiting texts and bytes of caches left", sum(left.values()) if alive else 1, 0, False),
    ]
    return {
        "what": f"{options.clients} clients for {seconds / 60:.0f} minutes: greedy and seeded texts, chats, schemas, one of five is left",
        "patches": patches,
        "counts": dict(counts),
        "resident_bytes": resident,
        "left": left,
        "wrong": wrong[:20],
        "bars": [bar.row() for bar in bars],
    }


def requests() -> list[Request]:
    """Requests, each with one right answer."""
    found: list[Request] = []
    for number, prompt in enumerate(CODE):
        tokens = 8 + 9 * number
        found.append((COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": tokens}))
        found.append((COMPLETIONS, {"prompt": prompt * 3, "temperature": 0.8, "top_p": 0.9, "seed": number, "max_tokens": tokens}))
        form = {"type": "json_schema", "json_schema": {"name": "entry", "schema": SCHEMA}}
        found.append((COMPLETIONS, {"prompt": prompt, "temperature": 1, "seed": number, "max_tokens": 40, "response_format": form}))
        stop = ["self", "\n\n"]
        found.append((COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": 60, "stop": stop, "presence_penalty": 0.5}))
        found.append((CHATS, {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": tokens}))
    return found


def unlike_generate(asked: list[Request], answers: list[Answer]) -> list[str]:
    """Those of the plain texts, greedy or with a seed, that the unpatched model does not write by transformers' own generate."""
    model, tokenizer = load_model(MODEL)
    wrong = []
    for (path, body), answer in zip(asked, answers, strict=True):
        if path == CHATS or set(body) - {"prompt", "temperature", "top_p", "seed", "max_tokens"}:
            continue
        inputs = tokenizer(body["prompt"], return_tensors="pt")
        sampling = {"do_sample": False}
        if "seed" in body:
            torch.manual_seed(body["seed"])
            sampling = {"do_sample": True, "temperature": body["temperature"], "top_p": body["top_p"], "top_k": 0}
        out = model.generate(**inputs, max_new_tokens=body["max_tokens"], pad_token_id=0, **sampling)
        text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if text != answer.text:
            wrong.append(f"generate writes {text!r}, the server {answer.text!r}: {body}")
    return wrong


def figures_left(url: str) -> dict[str, float]:
    """What the server says of its rows and caches, once it has had the time to notice that all clients have gone."""
    names = ("patchkit_running", "patchkit_waiting", "patchkit_kv_bytes")
    found: dict[str, float] = {}
    for _ in range(50):
        families = text_string_to_metric_families(get(url, "/metrics")[1])
        found = {sample.name: sample.value for family in families for sample in family.samples if sample.name in names}
        if not any(found.values()):
            break
        time.sleep(0.1)
    return found
