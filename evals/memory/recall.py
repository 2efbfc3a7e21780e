"""Recall of patched streams by generation: rows of text are read once, and asked at several distances.

python recall.py SPEC... [rows=12] [ends=1200,2400] [before=600] [task=needle] [seed=0] [first=0] [known=0]
          [out=FILE.json]
SPEC is "unpatched" or what `patch_model` takes; distances are from the statement to the question, give or take 64 tokens for needles.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from typing import Any

import torch
from cases import Rows, needles, recalls

from patchkit import patch_model, unpatch_model
from patchkit.models import load_model

_CHUNK, _ANSWER = 512, 24


def read(model: Any, ids: torch.Tensor, cache: Any) -> Any:
    for part in ids.split(_CHUNK, 1):
        cache = model(input_ids=part, cache=cache, use_cache=True, logits_to_keep=1).cache
    return cache


def ask(model: Any, tokenizer: Any, rows: Rows, cache: Any, task: str) -> tuple[list[bool], list[str], float]:
    """Whether each row's answer is right, the answers, and the mean log-probability of what was to be said."""
    forced = torch.cat([rows.tails, rows.forced[:, :-1]], 1)
    logits = model(input_ids=forced, cache=copy.deepcopy(cache), use_cache=True, logits_to_keep=rows.scored).logits.float()
    logs = logits.log_softmax(-1).gather(2, rows.forced[:, -rows.scored :, None]).mean().item()
    step = model(input_ids=rows.tails, cache=cache, use_cache=True, logits_to_keep=1)
    said = []
    for _ in range(_ANSWER if task == "needle" else rows.scored):
        said.append(step.logits[:, -1].argmax(-1))
        step = model(input_ids=said[-1][:, None], cache=step.cache, use_cache=True)
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in torch.stack(said, 1)]
    if task == "needle":
        right = [key in text for key, text in zip(rows.keys, texts, strict=True)]
    else:
        right = [text.replace(",", " ").split()[: len(key.split())] == key.split() for key, text in zip(rows.keys, texts, strict=True)]
    return right, texts, logs


def made(tokenizer: Any, task: str, count: int, after: int, before: int = 600, seed: int = 0, first: int = 0, known: bool = False) -> Rows:
    """Rows of a task, stated ``after`` tokens before their end."""
    if task == "needle":
        return needles(tokenizer, count, after, before, seed=seed, first=first, known=known)
    return recalls(tokenizer, task, count, after, before, seed, known)


def recalled(model: Any, tokenizer: Any, spec: str, rows: Rows, ends: list[int], before: int, task: str) -> list[dict[str, Any]]:
    """Read the rows once under ``spec``, and ask at each of the ``ends``, in tokens from the statement on."""
    count, results, cache, seen, started = len(rows.ids), list[dict[str, Any]](), None, 0, time.time()
    if spec != "unpatched":
        patch_model(model, spec, verbose=False)
    for end in ends:
        cache = read(model, rows.ids[:, seen : before + end], cache)
        seen = before + end
        right, texts, logs = ask(model, tokenizer, rows, cache if end == ends[-1] else copy.deepcopy(cache), task)
        kept = cache.n_bytes() // count if spec != "unpatched" else None
        results.append(dict(spec=spec, task=task, end=end, rows=count, right=sum(right), log=logs, bytes=kept, texts=texts, keys=rows.keys))
        print(f"   {spec} {task} {end}: {sum(right):2d}/{count} {logs:7.3f} {kept} bytes ({time.time() - started:.0f} s)", flush=True)
    if spec != "unpatched":
        unpatch_model(model)
    return results


def main() -> None:
    words = [word for word in sys.argv[1:] if "=" not in word.split("(")[0]]
    given = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word.split("(")[0])
    count, before, task = int(given.get("rows", 12)), int(given.get("before", 600)), given.get("task", "needle")
    ends = [int(x) for x in given.get("ends", "1200,2400").split(",")]
    seed, first, known = (int(given.get(name, 0)) for name in ("seed", "first", "known"))
    torch.set_grad_enabled(False)
    model, tokenizer = load_model("smollm2")
    rows = made(tokenizer, task, count, max(ends), before, seed, first, bool(known))
    results: list[dict[str, Any]] = []
    for spec in words:
        found = recalled(model, tokenizer, spec, rows, ends, before, task)
        results += found
        print(f"{spec:60s}", " | ".join(f"{r['end']}: {r['right']:2d}/{count} {r['log']:7.3f}" for r in found), flush=True)
        if "out" in given:
            with open(given["out"], "w") as file:
                json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
