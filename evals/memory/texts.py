"""Write the texts of `evidence.py` for other libraries, which have environments of their own: python texts.py FILE.json [ROWS]"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from evidence import BEFORE, ENDS, ROWS
from recall import made
from transformers import AutoTokenizer

from patchkit.models import load_model


def main() -> None:
    path, rows = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else ROWS
    model, tokenizer = load_model("smollm2")
    folder = path.with_suffix("")
    if not (folder / "config.json").exists():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        AutoTokenizer.from_pretrained(folder)
    ends = ENDS[0][1::2]
    stored = {"model": str(folder), "before": BEFORE, "ends": ends}
    for known in (False, True):
        texts = made(tokenizer, "needle", rows, max(ends), BEFORE, known=known)
        stored["known" if known else "unknown"] = {
            "ids": texts.ids.tolist(),
            "tails": texts.tails.tolist(),
            "forced": texts.forced.tolist(),
            "scored": texts.scored,
            "keys": texts.keys,
        }
    path.write_text(json.dumps(stored))


if __name__ == "__main__":
    main()
