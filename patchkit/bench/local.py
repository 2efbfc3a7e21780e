"""A model in this process, timed token by token."""

from __future__ import annotations

import time
from typing import Any

from transformers import PreTrainedTokenizerBase

from patchkit.bench.server import RequestFailed


class LocalModel:
    """A model in this process, greedy; patched or not."""

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, new_tokens: int) -> None:
        self.model, self.tokenizer, self.new_tokens = model, tokenizer, new_tokens

    def __call__(self, prompt: str) -> tuple[float, float, int]:
        inputs = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        pad = self.tokenizer.eos_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        clock = _Clock()
        started = time.perf_counter()
        try:
            output = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.new_tokens,
                do_sample=False,
                pad_token_id=pad,
                streamer=clock,
            )
        except IndexError as error:
            raise RequestFailed(
                f"the model cannot take so many tokens ({error}): its position table ends, so give shorter prompts"
            ) from error
        latency = time.perf_counter() - started
        # The streamer receives the prompt first.
        return 1000 * (clock.times[1] - started), 1000 * latency, output.shape[1] - inputs["input_ids"].shape[1]


class _Clock:
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
