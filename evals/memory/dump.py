"""Read needle rows with full attention and save keys and values, for `sieve.py`. python dump.py FILE ROWS AFTER [SEED]"""

from __future__ import annotations

import sys
import time

import torch
from cases import needles, recalls
from reader import Full, Reader

from patchkit.models import load_model


def main() -> None:
    file, count, after = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    task, seed = (sys.argv[4] if len(sys.argv) > 4 else "needle"), int(sys.argv[5]) if len(sys.argv) > 5 else 0
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("smollm2")
    reader = Reader(model)
    rows = (
        needles(tokenizer, count, after, seed=seed, first=seed * 20)
        if task == "needle"
        else recalls(tokenizer, task, count, after, seed=seed)
    )
    dump = Full(reader, rows.ids.shape[1], count)
    started = time.time()
    dump.read(rows.ids, progress=True)
    print(f"{time.time() - started:.0f} s", flush=True)
    torch.save({"rows": rows, "k": dump.k, "v": dump.v}, file)


if __name__ == "__main__":
    main()
