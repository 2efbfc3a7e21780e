"""Section "fuzz": requests made from the server's own description by schemathesis, and bodies that are broken in other ways."""

from __future__ import annotations

import http.client
import json
import random
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from evals.serving.client import CHATS, COMPLETIONS, get
from evals.serving.figures import Bar
from evals.serving.options import Options
from evals.serving.servers import VENVS, Server, ours
from evals.serving.texts import with_template

MINUTES = 10.0
BROKEN = 1000
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
CALL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (CHATS, {"messages": [{"role": "system", "content": "a"}, *HI], "logprobs": True, "top_logprobs": 2, "max_tokens": 1, "top_p": 0.9}),
    (CHATS, {"messages": HI, "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}),
    (CHATS, {"messages": HI, "max_tokens": 2, "tools": [CALL], "tool_choice": "required"}),
    (COMPLETIONS, {"prompt": ["a b", "c"], "logit_bias": {"7": 3}, "logprobs": 2, "max_tokens": 1, "stream": True, "stop": ["e"]}),
    (COMPLETIONS, {"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0.5, "seed": 3, "n": 2, "min_p": 0.1}),
]
ODD: list[Any] = [None, True, -1, 0, 10**12, 1e308, "", "x" * 3000, "\ufffd\u0000", [], {}, [[]], SCHEMA, [1, "a", None], [[1]] * 50]


def fuzz(options: Options) -> dict[str, Any]:
    """A crash is an answer with status 500 or more, or none, or a process that has ended."""
    minutes = options.minutes or MINUTES
    model = with_template("stdlib-7m", options.work)
    with Server(ours(model, "", "--max-tokens", "4", "--max-queue", "512"), options.work) as server:
        found = broken_bodies(server.url, BROKEN)
        described = by_description(server.url, minutes, options.work)
        alive = server.status is None and get(server.url, "/health")[0] == 200
        log = server.log.read_text(errors="replace")
    bars = [
        Bar("crashes of broken bodies", len(found["crashes"]), 0, False),
        Bar("errors without OpenAI's form", len(found["shapeless"]), 0, False),
        Bar("failures that schemathesis has found", described["failures"], 0, False),
        Bar("the server is alive", float(alive), 1, True),
    ]
    what = f"{BROKEN} broken bodies, then schemathesis for {minutes:g} minutes"
    found |= {"tracebacks": log.count("Traceback")}
    return {"what": what, "broken": found, "schemathesis": described, "bars": [bar.row() for bar in bars]}


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with a change somewhere in it."""
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice(list(value))
        change = chance.random()
        if change < 0.15:
            return {key: each for key, each in value.items() if key != name}
        if change < 0.25:
            return {(key + "s" if key == name else key): each for key, each in value.items()}
        return {**value, name: mutated(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(value[place], chance), *value[place + 1 :]]
    return chance.choice(ODD)


def broken_body(chance: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A path, a body and its headers: changed as JSON, or as bytes, or declared to be something else."""
    path, seed = chance.choice(SEEDS)
    data = json.dumps(mutated(seed, chance)).encode()
    headers = {"Content-Type": "application/json"}
    kind = chance.random()
    if kind < 0.3:
        place = chance.randrange(len(data))
        data = data[:place] + bytes([chance.randrange(256)]) * chance.randrange(4) + data[place + chance.randrange(4) :]
    elif kind < 0.35:
        data = b"[" * chance.randrange(1, 100_000)
    elif kind < 0.4:
        headers = {"Content-Type": chance.choice(["text/plain", "", "application/xml", "multipart/form-data; boundary=x"])}
    elif kind < 0.42:
        data = b'{"prompt": "' + b"x" * (5 << 20) + b'"}'
    return path, data, headers


def broken_bodies(url: str, count: int) -> dict[str, Any]:
    """Send them one after the other."""
    chance, place = random.Random(11), urlsplit(url)
    statuses: Counter[int] = Counter()
    crashes, shapeless = list[str](), list[str]()
    for _ in range(count):
        path, data, headers = broken_body(chance)
        connection = http.client.HTTPConnection(str(place.hostname), place.port, timeout=60)
        try:
            connection.request("POST", path, data, headers)
            response = connection.getresponse()
            status, text = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            # A server may close the connection while a body that is too large is still being sent.
            if len(data) <= 4 << 20:
                crashes.append(f"{type(error).__name__}: {data[:200]!r}")
            continue
        finally:
            connection.close()
        statuses[status] += 1
        if status >= 500:
            crashes.append(f"{status}: {data[:200]!r}: {text[:200]!r}")
        elif status != 200 and not is_error(text):
            shapeless.append(f"{status}: {text[:200]!r}")
    return {"statuses": {str(status): number for status, number in sorted(statuses.items())}, "crashes": crashes, "shapeless": shapeless}


def is_error(data: bytes) -> bool:
    """Whether a body is an error in OpenAI's form."""
    try:
        error = json.loads(data)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"} and isinstance(error["message"], str)


def by_description(url: str, minutes: float, folder: Path) -> dict[str, Any]:
    """Run schemathesis again and again, with other seeds, until the time is over."""
    binary = VENVS / "schemathesis" / "bin" / "schemathesis"
    if not binary.is_file():
        return {"failures": 1, "reason": f"{binary} is not there: make serving-peers"}
    until, runs, failures, tail = time.monotonic() + 60 * minutes, 0, 0, ""
    while time.monotonic() < until and not failures:
        runs += 1
        command = [str(binary), "run", f"{url}/openapi.json", "--checks", CHECKS, "--seed", str(runs), "--max-examples", "60"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, cwd=folder)
        if ended.returncode:
            failures, tail = failures + 1, ended.stdout[-6000:] + ended.stderr[-1000:]
    return {"runs": runs, "failures": failures, "report": tail}
