"""The command: `python -m evals.serving`."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evals.serving
from evals.serving.alone import alone
from evals.serving.arrival import arrival
from evals.serving.drain import drain
from evals.serving.fuzz import fuzz
from evals.serving.load import small, smollm2
from evals.serving.options import Options
from evals.serving.servers import ROOT, THREADS, VENVS
from evals.serving.soak import soak
from patchkit.measure.environment import environment
from patchkit.measure.jsonable import jsonable

SECTIONS: dict[str, Callable[[Options], dict[str, Any]]] = {
    each.__name__: each for each in (small, smollm2, alone, arrival, drain, fuzz, soak)
}
# What is named in the environment, by the folder of a peer.
PEERS = {"transformers_serve": ("torch", "transformers", "fastapi", "uvicorn"), "llama_server": (), "schemathesis": ("schemathesis",)}


def options_of(arguments: Sequence[str]) -> tuple[list[str], Path, Options]:
    """Read the arguments: sections, the folder of results, and sizes."""
    parser = argparse.ArgumentParser(prog="python -m evals.serving", description=(evals.serving.__doc__ or "").splitlines()[0])
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=_at_least_one, default=5, help="of each comparison")
    parser.add_argument("--minutes", type=float, default=None, help="of fuzz (default 10) and soak (default 30)")
    parser.add_argument("--clients", type=_at_least_one, default=8)
    parser.add_argument("--tokens", type=_at_least_one, default=64, help="new tokens of each answer")
    parser.add_argument("--prompt", type=_at_least_one, default=4096, help="tokens of the long prompt of section arrival")
    parser.add_argument("--out", type=Path, default=ROOT / "evals" / "results" / "serving")
    parser.add_argument("--work", type=Path, default=ROOT / "evals" / "work" / "serving", help="folder for saved models and logs")
    given = parser.parse_args(arguments)
    if given.minutes is not None and given.minutes <= 0:
        parser.error("--minutes: give more than 0")
    sizes = Options(given.rounds, given.minutes, given.clients, given.tokens, given.prompt, given.work, _tell)
    return given.sections, given.out, sizes


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: give at least 1")
    return value


def _tell(line: str) -> None:
    print(line, flush=True)


def _ended(*signal_and_frame: object) -> None:
    """Leave by an exception, which ends the servers."""
    sys.exit(143)


def versions(peer: str) -> dict[str, str] | str:
    """Versions of what is installed for a peer."""
    folder = VENVS / peer / "bin"
    if not (folder / "python").exists():
        return "not installed"
    code = "import importlib.metadata as m, json, sys; print(json.dumps({each: m.version(each) for each in sys.argv[1:]}))"
    found = subprocess.run([str(folder / "python"), "-c", code, *PEERS[peer]], capture_output=True, text=True, check=True)
    result: dict[str, str] = json.loads(found.stdout)
    server = folder / "llama-server"
    if server.exists():
        shown = subprocess.run([str(server), "--version"], capture_output=True, text=True, check=False)
        result["llama-server"] = " ".join((shown.stdout + shown.stderr).split())[-200:]
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections, and write the JSON of each when it has ended; the exit status is 1 if a bar does not hold."""
    arguments = sys.argv[1:] if arguments is None else arguments
    sections, out, options = options_of(arguments)
    signal.signal(signal.SIGTERM, _ended)
    options.work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    machine = environment() | {"threads": int(THREADS), "peers": {peer: versions(peer) for peer in PEERS}}
    missed = 0
    for name in sections:
        _tell(f"{name} ...")
        load, started = os.getloadavg()[0], time.perf_counter()
        try:
            result = SECTIONS[name](options)
        except Exception as error:  # the other sections are still worth their time
            result = {"failed": f"{type(error).__name__}: {error}", "bars": []}
            missed += 1
        facts = {
            "section": name,
            "command": " ".join(["python -m evals.serving", *arguments]),
            "load_before": load,
            "seconds": time.perf_counter() - started,
            "environment": machine,
        }
        (out / f"{name}.json").write_text(json.dumps(jsonable({**facts, **result}), indent=1) + "\n")
        for bar in result["bars"]:
            missed += not bar["holds"]
            sign = ">=" if bar["at_least"] else "<="
            _tell(f"  {'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: {bar['value']:.3g} ({sign} {bar['bar']:g})")
        if "failed" in result:
            _tell(f"  failed: {result['failed']}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
