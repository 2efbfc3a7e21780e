"""Sizes of all sections: those of a real run, and tiny ones to try the script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

DTYPES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Sizes:
    """Sizes of all sections; the defaults are those of a real run.

    Attributes:
        shapes: (N, K) of int8_linear.
        rows: rows of int8_linear whose results are checked.
        timed_rows: rows of int8_linear that are timed.
        group: input features per scale.
        bytes_copied: of the copy that measures bandwidth.
        bytes_of_weights: in one pass of int8_linear.
        verified: (R, T, V) of verify_prefix.
        appended: (B, G, T, C, K) of kv_append, V = K.
        attended: (B, H, T, K) of linear_attention, V = K.
        warmup_seconds: before each timing.
        repeats: of each timing.
        model: sizes of the decoded model's config.
        window: of the streaming patch.
        rounds: timed tokens.
        greedy_tokens: tokens that are compared with those of the eager model.
        compiler: further options of the patch `compile`.
        smollm2_tokens: None for the real model and the real lengths; a number of tokens for a bundled model in its place.
    """

    shapes: tuple[tuple[int, int], ...] = ((14336, 4096), (4096, 14336))
    rows: tuple[int, ...] = (1, 4, 16, 17, 256)
    timed_rows: tuple[int, ...] = (1, 4, 16, 256, 2048)
    group: int = 128
    bytes_copied: int = 2**30
    bytes_of_weights: int = 2**30
    verified: tuple[tuple[int, int, int], ...] = ((1, 5, 50304), (1, 5, 128256), (8, 5, 128256), (8, 17, 128256))
    appended: tuple[tuple[int, int, int, int, int], ...] = ((1, 8, 5, 4096, 128), (8, 8, 5, 4096, 128), (8, 8, 17, 4096, 128))
    attended: tuple[tuple[int, int, int, int], ...] = tuple((1, 32, 2**n, 128) for n in range(9, 17))
    warmup_seconds: float = 0.1
    repeats: int = 20
    model: dict[str, Any] = field(
        default_factory=lambda: dict(
            hidden_size=2560,
            num_hidden_layers=32,
            num_attention_heads=32,
            intermediate_size=10240,
            vocab_size=50304,
            max_position_embeddings=2048,
        )
    )
    window: int = 1020
    rounds: int = 40
    greedy_tokens: int = 64
    compiler: tuple[str, ...] = ()
    smollm2_tokens: int | None = None


TINY = Sizes(
    shapes=((96, 64), (64, 96)),
    rows=(1, 16, 17),
    timed_rows=(1, 16, 32),
    group=32,
    bytes_copied=2**20,
    bytes_of_weights=2**14,
    verified=((1, 5, 33), (3, 2, 64)),
    appended=((1, 2, 3, 16, 8), (3, 2, 5, 16, 8)),
    attended=((1, 2, 40, 16),),
    warmup_seconds=0.0,
    repeats=2,
    model=dict(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=128, max_position_embeddings=512
    ),
    window=28,
    rounds=4,
    greedy_tokens=8,
    compiler=("backend=aot_eager",),
    smollm2_tokens=8,
)
