"""economize: prompt lookup, its StreamingLLM, H2O and SnapKV."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import economize
import torch
from economize.techniques.kv_evict import KVEvictConfig
from economize.techniques.lookup import LookupConfig
from generating import bytes_of_keys_and_values, bytes_per_pass, kv_bytes_per_token, load, passes_counted
from peer import Answer, Clock, Made, Way

SINKS, WINDOW = 4, 508


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    return {
        "prompt lookup, cycle 4": lambda: way_of(made, LookupConfig(), economize.DecodeConfig(cycle_length=4)),
        "prompt lookup, cycle 8": lambda: way_of(made, LookupConfig(), economize.DecodeConfig(cycle_length=8)),
        **{
            name: functools.partial(way_of, made, config, economize.DecodeConfig(cycle_length=1, sync_interval=1), SINKS + WINDOW)
            for name, config in {
                f"StreamingLLM {SINKS}+{WINDOW}": KVEvictConfig(method="streaming", sinks=SINKS, recent=WINDOW),
                "H2O 256+256": KVEvictConfig(method="h2o", recent=256, heavy=256),
                "SnapKV 480+32": KVEvictConfig(method="snapkv", heavy=480, observation_window=32),
            }.items()
        },
    }


def way_of(made: Made, technique: Any, decoding: economize.DecodeConfig, window: int | None = None) -> Way:
    base = load(made.model)
    model = economize.apply(base, technique, decoding=decoding)

    def decode(prompt: list[int], new_tokens: int, seen: Callable[[int], object]) -> list[int]:
        def stop(tokens: Any) -> bool:
            seen(len(tokens))
            return int(tokens[-1]) in made.ends

        return model.decode(torch.tensor(prompt), new_tokens, stop=stop).tokens.tolist()

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        clock = Clock()
        with passes_counted(base, clock):
            ids = decode(prompt, new_tokens, clock.note)
        return clock.answer(ids, counted=True)

    def cache_bytes(prompt: list[int]) -> int:
        before, found = bytes_of_keys_and_values(), [0]
        decode(prompt, 2, lambda tokens: found.append(bytes_of_keys_and_values() - before))
        return found[-1]

    return Way(answer, bytes_per_pass(base), kv_bytes_per_token(base), "float32", window, None, cache_bytes if window else None)
