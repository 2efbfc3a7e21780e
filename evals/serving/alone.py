"""Section "alone": one client of our server, against `generate` of the unpatched model in this process."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from evals.serving.client import COMPLETIONS, ask
from evals.serving.figures import Bar
from evals.serving.options import Options
from evals.serving.servers import THREADS, Server, ours
from evals.serving.texts import PROMPTS, bodies
from patchkit.measure.paired import median_ratio
from patchkit.models import load_model

BAR = 1.10


def alone(options: Options) -> dict[str, Any]:
    """Time per token of both, in turns, prompt included."""
    torch.set_num_threads(int(THREADS))
    models, found = {}, []
    for name in PROMPTS:
        models[name] = timed(name, options)
        found.append(Bar(f"{name}: time per token, ours / generate", models[name]["ours_over_generate"]["value"], BAR, False).row())
    what = f"one client, {options.tokens} new tokens, greedy, fp32; a streamed answer from request to end over generate from call to return"
    return {"what": what, "rounds": options.rounds, "models": models, "bars": found}


def timed(name: str, options: Options) -> dict[str, Any]:
    """Both ways of one model."""
    model, tokenizer = load_model(name)
    mine, theirs, equal, count = [], [], 0, 0
    with Server(ours(name), options.work) as server:
        server.stop()
        for turn in range(1 + options.rounds):
            for body in bodies(name, len(PROMPTS[name]), options.tokens, stream_options={"include_usage": True}):
                inputs = tokenizer(body["prompt"], return_tensors="pt")
                started = time.perf_counter()
                out = model.generate(**inputs, do_sample=False, max_new_tokens=options.tokens, pad_token_id=0)
                seconds = time.perf_counter() - started
                new = out[0, inputs["input_ids"].shape[1] :]
                server.run()
                answer = ask(server.url, COMPLETIONS, body)
                server.stop()
                if turn:  # the first round warms up
                    theirs.append(1000 * seconds / len(new))
                    mine.append(1000 * (answer.ended - answer.started) / answer.tokens)
                    equal += answer.text == tokenizer.decode(new, skip_special_tokens=True)
                    count += 1
    return {
        "ours_ms_per_token": statistics.median(mine),
        "generate_ms_per_token": statistics.median(theirs),
        "ours_over_generate": asdict(median_ratio(mine, theirs)),
        "texts_equal": f"{equal} of {count}",
    }
