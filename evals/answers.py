"""Greedy answers of a model to prompts, with their times; imports nothing but torch and patchkit."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.measure.paired import median_ratio

PLAIN = "unpatched"


@dataclass(frozen=True)
class Answered:
    """Token ids of one answer, and milliseconds per token after the first; None for a single token."""

    ids: list[int]
    ms_per_token: float | None


class Clock:
    """Stopping criterion that never stops, and records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, tokens: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


def prompt_ids(tokenizer: Any, prompt: str) -> torch.Tensor:
    """Token ids [1, T] of a prompt as a user's message where there is a chat template, else of the prompt itself."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(prompt)["input_ids"]])
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])


def answer(model: Any, ids: torch.Tensor, new_tokens: int) -> Answered:
    """Greedy answer of at most ``new_tokens`` tokens."""
    clock = Clock()
    pad = model.generation_config.pad_token_id
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
        stopping_criteria=[clock],
    )
    steps = len(clock.times) - 1
    return Answered(output[0, ids.shape[1] :].tolist(), 1000 * (clock.times[-1] - clock.times[0]) / steps if steps else None)


def interleaved(views: dict[str, Any], prompts: Sequence[torch.Tensor], new_tokens: int, rounds: int) -> dict[str, list[Answered]]:
    """Answers of every view to every prompt, ``rounds`` times; the order rotates, so that no view always follows the slow one."""
    names = list(views)
    found: dict[str, list[Answered]] = {name: [] for name in names}
    for index in range(rounds * len(prompts)):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            found[name].append(answer(views[name], prompts[index % len(prompts)], new_tokens))
    return found


def compared(found: dict[str, list[Answered]], spec: str, prompts: int) -> dict[str, Any]:
    """Figures of one spec compared with plain decoding: medians over its answers, and the number of identical texts."""
    pairs = [(a.ms_per_token, b.ms_per_token) for a, b in zip(found[PLAIN], found[spec], strict=True)]
    timed = [(a, b) for a, b in pairs if a is not None and b is not None]
    ratio = median_ratio([a for a, _ in timed], [b for _, b in timed])
    same = sum(a.ids == b.ids for a, b in zip(found[PLAIN][:prompts], found[spec][:prompts], strict=True))
    return {
        "ms_per_token": median_of(found[spec]),
        "plain_over_this": dataclasses.asdict(ratio),
        "identical": same,
        "prompts": prompts,
        "tokens": sum(len(each.ids) for each in found[spec][:prompts]),
    }


def median_of(answers: Sequence[Answered]) -> float:
    """Median milliseconds per token over the answers of two tokens or more."""
    return statistics.median(each.ms_per_token for each in answers if each.ms_per_token is not None)
