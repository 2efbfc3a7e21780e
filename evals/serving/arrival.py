"""Section "arrival": a long prompt comes while others generate. How long do those wait for their next token?"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from statistics import median
from typing import Any

from evals.serving.client import COMPLETIONS, Answer, ask
from evals.serving.figures import Bar, gap_ratio
from evals.serving.options import Options
from evals.serving.servers import Server, ours
from evals.serving.texts import PROMPTS, bodies, with_positions
from patchkit.measure.english_text import english_ids
from patchkit.models import load_model

BAR = 3.0
OTHERS = 4
# Tokens that the others have before the long prompt comes, after which it ends, and of the long prompt's own text.
BEFORE, AFTER, OWN = 40, 40, 16
POSITIONS = 8192


def arrival(options: Options) -> dict[str, Any]:
    """Both models; the patches that make a round cheaper make it harder."""
    ways = [("stdlib-7m", ""), ("smollm2", ""), ("smollm2", "gemv"), ("smollm2", "prefix_cache(block=64)")]
    rows, bars = [], []
    for name, patches in ways:
        row = {"model": name, "patches": patches or "none", **one(name, patches, options)}
        rows.append(row)
        options.tell(f"{name} {patches}: {row['largest_over_median']}")
        if not patches:
            bars.append(Bar(f"{name}: largest gap / median gap", max(row["largest_over_median"]), BAR, False).row())
    what = (
        f"{OTHERS} texts are generated when a prompt of {options.prompt} tokens comes: the largest gap between two tokens of these texts "
        f"over their median gap, the worst text of each round"
    )
    return {"what": what, "rounds": options.rounds, "rows": rows, "bars": bars}


def one(name: str, patches: str, options: Options) -> dict[str, Any]:
    """All rounds of one model."""
    tokenizer = load_model(name)[1]
    ids = english_ids(tokenizer, options.prompt + options.rounds)[0].tolist()
    folder = with_positions(name, POSITIONS, options.work)
    names = ("largest_over_median", "largest_ms", "median_ms", "median_before_ms", "first_token_s")
    found: dict[str, list[float]] = {each: [] for each in names}
    with Server(ours(folder, patches, "--max-tokens", str(POSITIONS)), options.work) as server:
        for number in range(1 + options.rounds):
            texts, long = together(server.url, name, ids[number : number + options.prompt], int(tokenizer.eos_token_id))
            if not number:  # warms up
                continue
            found["largest_over_median"].append(max(gap_ratio(text.gaps) for text in texts))
            found["largest_ms"].append(1000 * max(max(text.gaps) for text in texts))
            found["median_ms"].append(1000 * median(gap for text in texts for gap in text.gaps))
            before = [1000 * (b - a) for text in texts for a, b in pairwise(text.times) if b < long.started]
            found["median_before_ms"].append(median(before))
            found["first_token_s"].append(long.first)
    return found


def together(url: str, name: str, ids: list[int], end: int) -> tuple[list[Answer], Answer]:
    """Answers of the others, which go on until some time after the long prompt's text has ended, and of the long prompt."""
    running = [0] * OTHERS
    ended = threading.Event()
    tokens_at_end: dict[int, int] = {}

    def other(number: int) -> Answer:
        body = bodies(name, OTHERS, POSITIONS - 600, logit_bias={str(end): -100})[number]

        def enough(answer: Answer) -> bool:
            running[number] = len(answer.times)
            if ended.is_set():
                tokens_at_end.setdefault(number, running[number])
                return running[number] >= tokens_at_end[number] + AFTER
            return False

        return ask(url, COMPLETIONS, body | {"prompt": PROMPTS[name][number]}, until=enough)

    with ThreadPoolExecutor(OTHERS) as pool:
        others = [pool.submit(other, number) for number in range(OTHERS)]
        while min(running) < BEFORE and not any(each.done() for each in others):
            time.sleep(0.01)
        try:
            own = {"prompt": ids, "max_tokens": OWN, "temperature": 0, "stream": True, "logit_bias": {str(end): -100}}
            long = ask(url, COMPLETIONS, own)
        finally:
            ended.set()
        texts = [each.result() for each in others]
    if long.status != 200 or not long.times:
        raise RuntimeError(f"the long prompt: status {long.status}, {long.error}")
    return texts, long
