"""Recall of kvpress's presses on the texts of `texts.py`, in kvpress's environment.

.venv-peers/kvpress/bin/python with_kvpress.py TEXTS.json OUT.json [keydiff snapkv knorm streaming tova] [chunk=128] [kept=512] [most=3]

The texts are read in chunks with a `DecodingPress`, which compresses after every chunk to ``kept`` tokens per kv head, as a stream has to.
The question is then read and answered without compressing, so that it loses nothing. kvpress compresses after single tokens and leaves the
mask to transformers, which takes positions for indices into the cache; chunks get an explicit causal mask here.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress import DecodingPress, KeyDiffPress, KnormPress, SnapKVPress, StreamingLLMPress, TOVAPress

_ANSWER = 24
SCORERS: dict[str, Any] = {
    "keydiff": KeyDiffPress,
    "snapkv": SnapKVPress,
    "knorm": KnormPress,
    "streaming": lambda: StreamingLLMPress(n_sink=4),
    "tova": TOVAPress,
}


def fed(model: Any, ids: torch.Tensor, cache: Any, start: int, logits: int = 1) -> torch.Tensor:
    """Logits of the last tokens of ids [B, T], which are at ``start`` in the text, after what the cache holds."""
    count, held = ids.shape[1], cache.get_seq_length()
    at = torch.arange(start, start + count)
    mask = torch.ones(count, held + count, dtype=torch.bool).tril(held)[None, None].expand(len(ids), 1, -1, -1)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=at[None].expand(len(ids), -1),
        cache_position=at,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logits,
    )
    found: torch.Tensor = out.logits
    return found


def held_bytes(cache: Any) -> int:
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


def asked(model: Any, tokenizer: Any, texts: dict[str, Any], cache: Any, start: int) -> tuple[list[bool], float, float]:
    """Whether each answer is right, the mean log-probability of the keys, and milliseconds of a step of all rows."""
    tails, forced, scored = torch.tensor(texts["tails"]), torch.tensor(texts["forced"]), texts["scored"]
    logits = fed(model, torch.cat([tails, forced[:, :-1]], 1), copy.deepcopy(cache), start, scored)
    log = logits.float().log_softmax(-1).gather(2, forced[:, -scored:, None]).mean().item()
    cache = copy.deepcopy(cache)
    token, said = fed(model, tails, cache, start)[:, -1].argmax(-1), list[torch.Tensor]()
    begun = time.perf_counter()
    for step in range(_ANSWER):
        said.append(token)
        token = fed(model, token[:, None], cache, start + tails.shape[1] + step)[:, -1].argmax(-1)
    took = (time.perf_counter() - begun) / _ANSWER * 1000
    answers = [tokenizer.decode(row, skip_special_tokens=True) for row in torch.stack(said, 1)]
    return [key in answer for key, answer in zip(texts["keys"], answers, strict=True)], log, took


@torch.no_grad()
def main() -> None:
    given = dict(word.split("=") for word in sys.argv[3:] if "=" in word)
    names = [word for word in sys.argv[3:] if "=" not in word] or list(SCORERS)
    chunk, kept, most = int(given.get("chunk", 128)), int(given.get("kept", 512)), int(given.get("most", 3))
    stored, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    results = json.loads(out.read_text()) if out.exists() else []
    model = transformers.AutoModelForCausalLM.from_pretrained(stored["model"], dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(stored["model"])
    for which in ("unknown", "known"):
        texts, before = stored[which], stored["before"]
        ids = torch.tensor(texts["ids"])
        for name in names if which in given.get("which", "unknown").split(",") else []:
            press = DecodingPress(SCORERS[name](), compression_interval=1, target_size=kept)
            cache, seen, peak, begun = transformers.DynamicCache(), 0, 0, time.perf_counter()
            for end in stored["ends"][:most]:
                with press(model):
                    while seen < before + end:
                        part = ids[:, seen : min(seen + chunk, before + end)]
                        if name == "snapkv" and part.shape[1] <= 64:  # it needs more queries than its window
                            part = ids[:, seen : seen + chunk]
                        fed(model, part, cache, seen)
                        peak = max(peak, held_bytes(cache) // len(ids))
                        seen += part.shape[1]
                read = time.perf_counter() - begun
                right, log, step = asked(model, tokenizer, texts, cache, seen)
                row = dict(press=name, question=which, end=end, rows=len(ids), right=sum(right), log=log)
                row |= dict(bytes=held_bytes(cache) // len(ids), seconds_read=read, ms_per_step=step, chunk=chunk, kept=kept)
                results.append(row)
                print(json.dumps(row), flush=True)
                out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
