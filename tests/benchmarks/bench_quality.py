"""The main result at full length: perplexity of the bundled model on held-out text, far beyond its trained context."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from patchkit import StreamingLLM, patched
from patchkit.measure.perplexity import block_nll, by_position, stream_nll
from patchkit.measure.texts import heldout_ids
from patchkit.models import load_model

TOKENS = 16384


def test_perplexity_far_beyond_the_trained_context(benchmark: Any, record: Callable[..., None]) -> None:
    model, tokenizer = load_model("bundled")
    ids, files = heldout_ids(tokenizer, TOKENS)

    def measure() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with patched(model, StreamingLLM(sinks=4, window=508), verbose=False):
            streaming = stream_nll(model, ids)
        return streaming, stream_nll(model, ids), block_nll(model, ids)

    streaming, unpatched, fresh = benchmark.pedantic(measure, rounds=1, iterations=1)
    # Positions 0-512 of one text are too few tokens: the unpatched model starts anew every 512, on the same tokens.
    ratio = by_position(streaming - fresh, [2048, TOKENS])[0]

    def late(nll: torch.Tensor) -> float:
        return math.exp(nll[2048:].mean().item())

    record(
        "perplexity_of_streaming",
        ratio.perplexity,
        "<= 1.05",
        what="perplexity at positions 2k-16k, streaming(sinks=4, window=508) / unpatched started anew every 512 tokens, same tokens",
        standard_error=ratio.perplexity * ratio.stderr,
        streaming=late(streaming),
        unpatched_within_512=late(fresh),
        unpatched=late(unpatched),
        tokens=len(unpatched),
        files=files,
    )
    assert ratio.perplexity <= 1.05
    assert late(unpatched) >= 2 * late(fresh)
