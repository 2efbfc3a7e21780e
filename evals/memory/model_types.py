"""Which causal-LM types of transformers take `memory`: python model_types.py [TYPES...] [--out FILE.json]

As `make coverage` for streaming: every type is built tiny with random weights, patched, run in five modes over 24 tokens, unpatched, and
compared with the definition that `patchkit prove` uses (`patchkit.definitions.memory_logits`).
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import coverage  # sets offline mode
import torch
import transformers
from tiny_configs import model_types

from patchkit.anatomy.target import Target
from patchkit.definitions import NoDefinition
from patchkit.patches.memory import Memory

PATCH = Memory(sinks=2, window=8, slots=6, block=4)


@torch.no_grad()
def remembered(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ids [1, T] under `PATCH`, by definition."""
    definition = PATCH.promises(Target(model)).definition
    if definition is None:
        raise NoDefinition("memory has none")
    return definition(model, ids, None)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    check = functools.partial(coverage.check_type, patch=PATCH, oracle=remembered)
    for model_type in options.types or model_types():
        rows.append(coverage.limited(check, model_type, 60))
        row = rows[-1]
        print(f"{model_type}: {row.verdict} {'' if row.error is None else f'{row.error:.1e}'} {row.note[:200]}", flush=True)
        if options.out is not None:
            found = [{"type": r.model_type, "verdict": r.verdict, "error": r.error, "note": r.note} for r in rows]
            options.out.write_text(json.dumps({"spec": PATCH.spec, "rows": found}, indent=1) + "\n")
    count = Counter(row.verdict for row in rows)
    print(", ".join(f"{verdict} {count[verdict]}" for verdict in coverage.VERDICTS if count[verdict]), f"of {len(rows)}")
    return 1 if any(count[verdict] for verdict in coverage.FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
