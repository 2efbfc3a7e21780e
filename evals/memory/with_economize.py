"""Recall of economize's H2O and SnapKV on the texts of `texts.py`, in economize's environment.

.venv-peers/economize/bin/python with_economize.py TEXTS.json OUT.json [snapkv h2o streaming] [rows=7] [most=2]

economize computes the whole prompt, question included, with full attention, and evicts then: its answers know the question, and the first
token is the unpatched model's. Evicted entries are masked and stay in memory; ``bytes`` are what its tensors take.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import economize
import torch
import transformers
from economize.techniques.kv_evict import KVEvictConfig

_ANSWER = 24
CONFIGS = {
    "snapkv": lambda: KVEvictConfig(method="snapkv", heavy=480, observation_window=32),
    "h2o": lambda: KVEvictConfig(method="h2o", recent=256, heavy=256),
    "streaming": lambda: KVEvictConfig(method="streaming", sinks=4, recent=508),
}


def held() -> int:
    """Bytes of floating-point tensors of four dimensions that are larger than a mask of one query."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.ndim == 4 and each.is_floating_point():
            found[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(found.values())


@torch.no_grad()
def main() -> None:
    given = dict(word.split("=") for word in sys.argv[3:] if "=" in word)
    names = [word for word in sys.argv[3:] if "=" not in word] or ["snapkv", "h2o"]
    count, most = int(given.get("rows", 7)), int(given.get("most", 2))
    stored, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results: list[dict[str, Any]] = json.loads(out.read_text()) if out.exists() else []
    tokenizer = transformers.AutoTokenizer.from_pretrained(stored["model"])
    texts, before = stored["unknown"], stored["before"]
    for name in names:
        base = transformers.AutoModelForCausalLM.from_pretrained(stored["model"], dtype=torch.float32).eval()
        model = economize.apply(base, CONFIGS[name](), decoding=economize.DecodeConfig(cycle_length=1, sync_interval=1))
        for end in stored["ends"][:most]:
            right, size, seconds = 0, 0, 0.0
            for row in range(count):
                prompt = torch.tensor(texts["ids"][row][: before + end] + texts["tails"][row])
                empty, sizes = held(), list[int]()

                def stop(tokens: Any, empty: int = empty, sizes: list[int] = sizes) -> bool:
                    if len(tokens) == 2:
                        sizes.append(held() - empty)
                    return False

                begun = time.perf_counter()
                tokens = model.decode(prompt, _ANSWER, stop=stop).tokens.tolist()
                seconds += time.perf_counter() - begun
                right += texts["keys"][row] in tokenizer.decode(tokens, skip_special_tokens=True)
                size = max([size, *sizes])
            results.append(dict(method=name, end=end, rows=count, right=right, bytes=size, seconds=seconds / count))
            print(json.dumps(results[-1]), flush=True)
            out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
