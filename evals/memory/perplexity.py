"""Perplexity of English text by position, streamed through one cache: python perplexity.py SPEC... [tokens=8192] [skip=0]"""

from __future__ import annotations

import itertools
import sys
import time

import torch

from patchkit import patch_model, unpatch_model
from patchkit.measure.english_text import english_ids
from patchkit.measure.perplexity import stream_nll
from patchkit.models import load_model

_EDGES = (0, 512, 2048, 4096, 6144, 8192, 12288, 16384, 32768)


def main() -> None:
    words = [word for word in sys.argv[1:] if "=" not in word.split("(")[0]]
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word.split("(")[0])
    tokens, skip = int(given.get("tokens", 8192)), int(given.get("skip", 0))
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("smollm2")
    ids = english_ids(tokenizer, skip + tokens)[0]
    ids = torch.cat([ids[:1], ids[1 + skip :]])
    for spec in words:
        started = time.time()
        if spec != "unpatched":
            patch_model(model, spec, verbose=False)
        nll = stream_nll(model, ids)
        if spec != "unpatched":
            unpatch_model(model)
        parts = [f"{a}-{b}: {nll[a:b].mean().exp().item():.4f}" for a, b in itertools.pairwise(_EDGES) if a < len(nll)]
        print(
            f"{spec:40s} {'  '.join(parts)}  2048-8192: {nll[2048:8192].mean().exp().item():.4f} ({time.time() - started:.0f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
