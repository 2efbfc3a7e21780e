"""Rollouts for TRL's GRPO on the scheduler of `speculative`: completions that have ended make room for others."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from patchkit.rl.scoring import logprobs
from patchkit.speculation.row import Row
from patchkit.speculation.scheduler import Scheduler


@dataclass(frozen=True)
class Rollouts:
    """A ``rollout_func`` for TRL's `GRPOTrainer`, whose policy is patched with `speculative`.

    Args:
        slots: completions that are generated at the same time.

    Raises:
        ValueError: fewer than 1.
    """

    slots: int = 64

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots={self.slots}: give at least 1")

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generate a completion for every prompt, with the trainer's options of generation.

        Returns:
            ``prompt_ids`` and ``completion_ids``, lists of lists of tokens, and ``logprobs``, of each token of the completions at the
            trainer's temperature.

        Raises:
            PatchConflict: the policy is not patched with speculative.
            PatchError: an option of generation, or a distribution of the model over processes, that the scheduler does not serve.
        """
        policy = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        model = policy.get_base_model() if callable(getattr(policy, "get_base_model", None)) else policy
        prompt_ids = _tokenized(prompts, trainer)
        with _generation_config(model, trainer.generation_kwargs):
            scheduler = Scheduler(model, slots=min(self.slots, max(len(prompts), 1)))
            config = trainer.generation_config
            rows = [scheduler.submit(torch.tensor(ids, device=model.device), generation_config=config) for ids in prompt_ids]
            scheduler.run()
        for row in rows:
            if row.error is not None:
                raise row.error
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [list(row.new) for row in rows],
            "logprobs": _scored(model, prompt_ids, rows, trainer.args.temperature),
        }


rollout_func = Rollouts()


def _tokenized(prompts: list[Any], trainer: Any) -> list[list[int]]:
    """Tokens of the prompts, as the trainer itself makes them: strings, or lists of messages."""
    tokenizer = trainer.processing_class
    if isinstance(prompts[0], str):
        found: list[list[int]] = tokenizer(text=prompts)["input_ids"]
        return found
    options = {"chat_template": getattr(trainer, "chat_template", None), **(trainer.args.chat_template_kwargs or {})}
    tools = getattr(trainer, "tools", None) or None
    encoded = tokenizer.apply_chat_template(
        conversation=prompts, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True, **options
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


@contextlib.contextmanager
def _generation_config(model: Any, options: dict[str, Any]) -> Iterator[None]:
    """Let the model's own options of generation, which fill in what a call leaves open, be those of the trainer."""
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    model.generation_config.update(**options)
    try:
        yield
    finally:
        model.generation_config = before


def _scored(model: Any, prompt_ids: list[list[int]], rows: Sequence[Row], temperature: float) -> list[list[float]]:
    """Log probabilities of the new tokens of all rows, in one forward: prompts end and completions begin in the same column."""
    before, after = max(map(len, prompt_ids)), max(len(row.new) for row in rows)
    ids = torch.zeros(len(rows), before + after, dtype=torch.int64, device=model.device)
    mask = torch.zeros_like(ids)
    for index, (prompt, row) in enumerate(zip(prompt_ids, rows, strict=True)):
        start, end = before - len(prompt), before + len(row.new)
        ids[index, start:end] = torch.tensor(prompt + row.new, device=ids.device)
        mask[index, start:end] = 1
    found = logprobs(model, ids, mask, new=after, temperature=temperature).tolist()
    return [values[: len(row.new)] for values, row in zip(found, rows, strict=True)]
