"""Sections "small" and "smollm2": several clients that ask at the same moment, of our server and of others."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from evals.serving.client import COMPLETIONS, ask_together
from evals.serving.figures import Bar, Burst, compared
from evals.serving.options import Options
from evals.serving.servers import THREADS, VENVS, Server, Way, llama_cpp, ours, transformers, ways_that_start
from evals.serving.texts import bodies
from patchkit.models import bundled_path, smollm2_gguf

SEQUENTIAL, CONTINUOUS = "transformers serve", "transformers serve --continuous-batching"
# Tokens of a slot of llama.cpp.
CONTEXT = 512


def small(options: Options) -> dict[str, Any]:
    """stdlib-7m by three servers, and by ours with a patch."""
    folder = bundled_path("stdlib-7m")
    rows = ("--max-rows", str(options.clients))
    ways = [ours("stdlib-7m", "", *rows), ours("stdlib-7m", "gemv", *rows), transformers(folder, False), transformers(folder, True)]
    result = measured("stdlib-7m", ways, options)
    return {**result, "bars": bars(result["ways"], {SEQUENTIAL: 2.5, CONTINUOUS: 1.3}, first=0.35)}


def smollm2(options: Options) -> dict[str, Any]:
    """smollm2 by four servers, and by ours with patches."""
    folder, rows = bundled_path("smollm2"), ("--max-rows", str(options.clients))
    ways = [ours("smollm2", patches, *rows) for patches in ("", "gemv", "gemv + int8", "speculative", "gemv + speculative")]
    ways += [transformers(folder, False), transformers(folder, True), llama_cpp(f32_file(options.work), options.clients, CONTEXT)]
    result = measured("smollm2", ways, options)
    return {**result, "bars": bars(result["ways"], {SEQUENTIAL: 2.0}, first=None)}


def f32_file(folder: Path) -> Path:
    """The GGUF file of smollm2 in fp32, made of the one that its package has; it is not there where llama.cpp is not installed."""
    file, binary = folder / "smollm2-F32.gguf", VENVS / "llama_server" / "bin" / "llama-quantize"
    if not file.is_file() and binary.exists():
        new = file.with_suffix(".new")
        command = [str(binary), "--allow-requantize", "--pure", str(smollm2_gguf()), str(new), "F32", THREADS]
        subprocess.run(command, check=True, capture_output=True)
        new.replace(file)
    return file


def bars(ways: dict[str, Any], rates: dict[str, float], first: float | None) -> list[dict[str, Any]]:
    """Return the bars of the ways that were measured."""
    found = []
    for name, bar in rates.items():
        if name in ways:
            found.append(Bar(f"tokens per second, ours / {name}", ways[name]["ours_over_this"]["value"], bar, True))
            if first is not None:
                value = ways[name]["first_token_p95_ours_over_this"]["value"]
                found.append(Bar(f"time to first token, 95th percentile, ours / {name}", value, first, False))
    return [bar.row() for bar in found]


def measured(model: str, ways: Sequence[Way], options: Options) -> dict[str, Any]:
    """Let each way answer all clients at once, in turns; the first way is the reference."""
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        servers = ways_that_start(ways, options.work, missing)
        for server in servers:
            stack.callback(server.end)
        for name, reason in missing.items():
            options.tell(f"{name}: {reason}")
        bursts: dict[str, list[Burst]] = {}
        for server in list(servers):  # the first burst of each is not counted: it warms up
            try:
                burst(server, model, options)
            except (RuntimeError, OSError) as error:
                missing[server.way.name] = str(error)[:500]
                servers.remove(server)
                server.end()
                options.tell(f"{server.way.name}: {missing[server.way.name]}")
        for number in range(options.rounds):
            turn = number % max(1, len(servers))
            for server in servers[turn:] + servers[:turn]:
                bursts.setdefault(server.way.name, []).append(burst(server, model, options))
            shown = ", ".join(f"{name} {rounds[-1].rate:.0f}" for name, rounds in bursts.items())
            options.tell(f"round {number + 1} of {options.rounds}, tokens per second: {shown}")
    if ways[0].name not in bursts:
        raise RuntimeError(f"{ways[0].name}: {missing.get(ways[0].name)}")
    what = f"{options.clients} clients that ask at the same moment, {options.tokens} new tokens each, greedy, {model} in fp32"
    return {"what": what, "rounds": options.rounds, "ways": compared(bursts, ways[0].name), "missing": missing}


def burst(server: Server, model: str, options: Options) -> Burst:
    """One round of one server, which runs only for that time."""
    server.run()
    try:
        answers = ask_together(server.url, COMPLETIONS, bodies(model, options.clients, options.tokens, **dict(server.way.options)))
    finally:
        server.stop()
    seconds = max(answer.ended for answer in answers) - min(answer.started for answer in answers)
    tokens = sum(answer.tokens for answer in answers)
    return Burst(seconds, tokens, tuple(answer.first for answer in answers), tuple(answer.text for answer in answers))
