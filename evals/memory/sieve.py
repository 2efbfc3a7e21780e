"""Second sieve: rules of choice on keys that `dump.py` has saved. python sieve.py FILE ENDS SCRIPT: SCRIPT calls `show(name, masks)`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import rules as R  # noqa: F401  for the script
import torch
from offline import k, r, report, static, v  # noqa: F401
from reader import Full, Reader

from patchkit.models import load_model


def load(file: str, reader: Reader) -> tuple[Full, Any]:
    saved = torch.load(file, weights_only=False, mmap=True)
    rows = saved["rows"]
    dump = Full.__new__(Full)
    dump.reader, dump.seen, dump.k, dump.v, dump.q = reader, rows.ids.shape[1], saved["k"], saved["v"], None
    dump.r = [reader.rotate(x, torch.arange(dump.seen)) for x in dump.k]
    return dump, rows


def main() -> None:
    torch.set_grad_enabled(False)
    model, _ = load_model("smollm2")
    reader = Reader(model)
    dump, rows = load(sys.argv[1], reader)
    ends = [600 + int(x) for x in sys.argv[2].split(",")]

    def show(name: str, masks: Any) -> None:
        report(name, dump, rows, ends, masks)

    namespace = {**globals(), "dump": dump, "rows": rows, "ends": ends, "show": show, "reader": reader}
    exec(compile(Path(sys.argv[3]).read_text(), sys.argv[3], "exec"), namespace)


if __name__ == "__main__":
    main()
