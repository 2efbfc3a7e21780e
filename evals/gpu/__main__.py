"""The command: `python3 -m evals.gpu`."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

import evals.gpu
from evals.gpu.bars import bars
from evals.gpu.report import described, print_table
from evals.gpu.rows import FAILED, Row, out_of_time, run_section
from evals.gpu.sections import LIMITS, SECTIONS
from evals.gpu.sizes import TINY, Sizes

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Run the sections, write the JSON after each row, print the table; the exit status is 1 if a row failed."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python3 -m evals.gpu", description=(evals.gpu.__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes without meaning, to try the script")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here: --device cpu --tiny tries the script without one")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu needs --tiny: the real sizes are for a GPU")

    sizes, device = TINY if options.tiny else Sizes(), torch.device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    path = Path(os.environ.get("OUT") or ROOT / "evals" / "results") / f"gpu_{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python3 -m evals.gpu", *arguments])
    result: Row = {"device": name, "environment": described(device), "commands": {}, "sections": {}, "seconds": {}}
    if path.is_file():
        # Results of other commands on the same device with the same versions are kept.
        before_this = json.loads(path.read_text())
        if (before_this["device"], before_this["environment"]) == (name, result["environment"]):
            result = before_this

    before = signal.signal(signal.SIGALRM, out_of_time)
    until = time.monotonic()
    try:
        for section in options.sections:
            until += LIMITS[section]
            started = time.monotonic()
            print(f"{section} ...", flush=True)
            result["commands"][section] = command

            def write(rows: list[Row], section: str = section, started: float = started) -> None:
                result["sections"][section] = rows
                result["seconds"][section] = round(time.monotonic() - started, 1)
                result["bars"] = bars({} if options.tiny else result["sections"], name)
                path.write_text(json.dumps(result, indent=2) + "\n")

            run_section(SECTIONS[section](sizes, device), until, write)
    finally:
        signal.signal(signal.SIGALRM, before)

    print(f"\n{name}: {result['environment']}\n{command}")
    print_table(result)
    print(f"\nwritten to {path}")
    return int(any(row["status"] == FAILED for rows in result["sections"].values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
