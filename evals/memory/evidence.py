"""The table of recall under `memory`, in slices that can be interrupted: python evidence.py SECTION... [--out DIR]

A slice is a few rows that one spec reads once and is asked about at several distances. Every slice is stored when it is done, and is not
read again; without sections the stored ones are summed up.

needle      at 1k to 2k, 2k to 4k and 4k to 6k tokens back, 21 rows, each at two distances in every range: unpatched, memory, streaming (7)
key_value, copy   the same in Python code, up to 4k
known, key_value_known, copy_known   the question is put before the text too
beyond      a needle 3k back in texts of 12k and 32k tokens
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from recall import made, recalled

from patchkit.measure.environment import environment
from patchkit.models import load_model

MEMORY, STREAMING, UNPATCHED = "memory(slots=432)", "streaming(window=508)", "unpatched"
BEFORE, ROWS = 600, 7
# Distances of each slice: every row is asked about at two in each of the three ranges.
ENDS = ([1200, 1700, 2400, 3400, 4400, 5400], [1300, 1800, 2600, 3600, 4600, 5600], [1100, 1600, 2200, 3200, 4200, 5200])
RANGES = ((1000, 2000), (2000, 4000), (4000, 6000))
# Of each section: task, whether the question is known, and slices of (spec, rows, first row or seed, tokens before, ends).
Slice = tuple[str, int, int, int, list[int]]


def slices(specs: list[str], rows: int = ROWS, ends: Any = ENDS, by_row: bool = True) -> list[Slice]:
    return [(spec, rows, rows * number if by_row else number, BEFORE, its) for number, its in enumerate(ends) for spec in specs]


NEARER = [ends[:4] for ends in ENDS]
IN_CODE = slices([MEMORY, UNPATCHED], ends=NEARER, by_row=False) + slices([STREAMING], ends=NEARER[:1], by_row=False)

SECTIONS: dict[str, tuple[str, bool, list[Slice]]] = {
    "needle": ("needle", False, slices([MEMORY, UNPATCHED]) + slices([STREAMING], ends=ENDS[:1])),
    "key_value": ("key_value", False, IN_CODE),
    "copy": ("copy", False, IN_CODE),
    "known": ("needle", True, slices([MEMORY, UNPATCHED], ends=NEARER)),
    "key_value_known": ("key_value", True, slices([MEMORY, UNPATCHED], ends=NEARER, by_row=False)),
    "copy_known": ("copy", True, slices([MEMORY, UNPATCHED], ends=NEARER, by_row=False)),
    "beyond": ("needle", False, [(MEMORY, 8, 0, 9000, [3000]), (MEMORY, 4, 8, 29000, [3000])]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--spec", help="measure this one in place of memory's")
    parser.add_argument("--only", help="measure this spec only")
    parser.add_argument("--most", type=int, default=len(ENDS), help="slices of each spec")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results" / "memory")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    model = tokenizer = None
    for section in options.sections:
        task, known, wanted = SECTIONS[section]
        path = options.out / f"{section}.json"
        stored = json.loads(path.read_text()) if path.exists() else {"task": task, "known": known, "slices": []}
        done = {(s["spec"], s["first"], s["before"]) for s in stored["slices"]}
        count: dict[str, int] = defaultdict(int)
        for spec, rows, first, before, ends in wanted:
            if options.only not in (None, spec):
                continue
            if options.spec is not None:
                if spec != MEMORY:
                    continue
                spec = options.spec
            count[spec] += 1
            if count[spec] > options.most or (spec, first, before) in done:
                continue
            if model is None:
                model, tokenizer = load_model("smollm2")
            by_row = task == "needle"
            texts = made(tokenizer, task, rows, max(ends), before, 0 if by_row else first, first if by_row else 0, known)
            found = recalled(model, tokenizer, spec, texts, ends, before, task)
            stored["slices"].append({"spec": spec, "first": first, "before": before, "rows": rows, "asked": found})
            stored["command"], stored["environment"] = f"python evals/memory/evidence.py {section}", environment()
            path.write_text(json.dumps(stored, indent=1) + "\n")
    for path in sorted(options.out.glob("*.json")):
        stored = json.loads(path.read_text())
        if "slices" in stored:
            print(path.stem, *summed_up(stored["slices"]), sep="\n  ")


def summed_up(found: list[dict[str, Any]]) -> list[str]:
    """One line for each spec and number of tokens before the statement."""
    lines = []
    for spec, before in dict.fromkeys((s["spec"], s["before"]) for s in found):
        parts = []
        for low, high in RANGES:
            asked = [a for s in found if (s["spec"], s["before"]) == (spec, before) for a in s["asked"] if low <= a["end"] < high]
            rows = sum(a["rows"] for a in asked)
            if rows:
                right, log = sum(a["right"] for a in asked), sum(a["log"] * a["rows"] for a in asked) / rows
                share = right / rows
                parts.append(f"{low}-{high}: {right}/{rows} = {share:.3f} +- {math.sqrt(share * (1 - share) / rows):.3f}, {log:.3f}")
        kept = next((a["bytes"] for s in found if s["spec"] == spec for a in s["asked"]), None)
        lines.append(f"{spec:28s} before {before}: {'; '.join(parts)}; {kept} bytes")
    return lines


if __name__ == "__main__":
    main()
