"""One family of peers in its own environment: reads requests from stdin and answers on stdout, one JSON object a line.

    python worker.py FAMILY MADE        # MADE: the fields of peer.Made as JSON

    {"make": NAME}                                           its figures that do not change
    {"answer": NAME, "prompt": [...], "new_tokens": N}       peer.Answer
    {"cache": NAME, "prompt": [...]}                         bytes, or null
    {"bandwidth": true}                                      bytes per second of a copy, read and written ones together
    {"versions": [PACKAGE, ...]}                             their versions

What goes wrong in a library is answered as {"error": ...}; a crash ends the process, which `run.py` notices.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from peer import Made, Way


def bandwidth() -> float:
    """Bytes per second that copying 256 MiB moves with two threads: read and written bytes together, the best of five."""
    import torch

    source = torch.ones(64 << 20)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


def serve(family: str, made: Made, requests: Any, replies: Any) -> None:
    makers = importlib.import_module(f"with_{family}").ways(made)
    ways: dict[str, Way] = {}

    def reply_to(request: dict[str, Any]) -> Any:
        if "make" in request:
            way = ways[request["make"]] = makers[request["make"]]()
            return {name: getattr(way, name) for name in ("weight_bytes", "kv_bytes", "dtype", "window", "slots")}
        if "answer" in request:
            return dataclasses.asdict(ways[request["answer"]].answer(request["prompt"], request["new_tokens"]))
        if "cache" in request:
            measure = ways[request["cache"]].cache_bytes
            return None if measure is None else measure(request["prompt"])
        if "versions" in request:
            return {name: importlib.metadata.version(name) for name in request["versions"]}
        return bandwidth()

    print(json.dumps({"ways": list(makers)}), file=replies, flush=True)
    for line in requests:
        try:
            reply = {"reply": reply_to(json.loads(line))}
        # Whatever a library raises becomes a row with the reason.
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


def main() -> None:
    family, fields = sys.argv[1], json.loads(sys.argv[2])
    paths = {name: Path(value) for name, value in fields.items() if name != "ends"}
    # Libraries print on stdout, too: the replies get a descriptor of their own.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(family, Made(**paths, ends=tuple(fields["ends"])), sys.stdin, replies)


if __name__ == "__main__":
    main()
