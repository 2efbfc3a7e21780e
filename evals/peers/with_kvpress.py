"""kvpress, with the transformers that it asks for: plain decoding of that version, its StreamingLLM and its KeyDiff."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from generating import Held, Timed, generate, load, passes_counted, way_of
from kvpress import DecodingPress, KeyDiffPress, PrefillDecodingPress, StreamingLLMPress
from peer import Answer, Clock, Made, Way

SINKS, WINDOW, INTERVAL = 4, 508, 16


def ways(made: Made) -> dict[str, Callable[[], Way]]:
    loaded = functools.cache(functools.partial(load, made.model))
    return {
        "plain": lambda: way_of(loaded(), cache=True),
        f"StreamingLLM {SINKS}+{WINDOW}, every {INTERVAL} tokens": lambda: pressed(
            loaded(), functools.partial(StreamingLLMPress, n_sink=SINKS)
        ),
        f"KeyDiff {SINKS + WINDOW}, every {INTERVAL} tokens": lambda: pressed(loaded(), KeyDiffPress),
    }


def pressed(model: Any, scorer: Callable[..., Any]) -> Way:
    """Keys keep the positions that they had; the prompt is computed whole and then compressed."""
    kept, plain = SINKS + WINDOW, way_of(model)

    def press(prompt: list[int]) -> PrefillDecodingPress:
        share = max(0.0, 1 - kept / len(prompt))
        return PrefillDecodingPress(
            prefilling_press=scorer(compression_ratio=share) if share else None,
            decoding_press=DecodingPress(scorer(), compression_interval=INTERVAL, target_size=kept),
        )

    def answer(prompt: list[int], new_tokens: int) -> Answer:
        clock = Clock()
        with passes_counted(model, clock), press(prompt)(model):
            ids = generate(model, prompt, new_tokens, Timed(clock))
        return clock.answer(ids, counted=True)

    def cache_bytes(prompt: list[int]) -> int:
        held = Held(Clock())
        with press(prompt)(model):
            generate(model, prompt, 2, held)
        return held.cache

    return Way(answer, plain.weight_bytes, plain.kv_bytes, plain.dtype, kept, None, cache_bytes)
