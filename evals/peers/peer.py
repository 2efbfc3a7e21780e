"""What every peer gives, whatever library it stands on. Only the standard library is imported: each family has its own environment.

A family of peers is a module `with_<family>.py` that holds one function, `ways(made)`: for each name a function that builds the way to
decode. `made` says where the model's files lie.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Made:
    """Files that `run.py` has prepared: a saved model in fp32, the GGUF file that it came from, a small model that drafts, a folder for
    what a family makes of them, the heads and the spec that patchkit's ways use, and the tokens that end an answer."""

    model: Path
    gguf: Path
    draft: Path
    folder: Path
    heads: Path
    spec: Path
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        ids: the new tokens, the end token included.
        prefill_ms: from the call to the first new token.
        decode_ms: from then on to the last.
        decoded: tokens that came in `decode_ms`.
        forwards: passes over the model's weights in `decode_ms`.
        drafting_bytes: bytes of weights that a drafter read for the whole answer.
    """

    ids: list[int]
    prefill_ms: float
    decode_ms: float
    decoded: int
    forwards: int
    drafting_bytes: int = 0


@dataclass(frozen=True)
class Way:
    """One way to decode.

    Attributes:
        answer: from a prompt's token ids and the most new tokens to an answer.
        weight_bytes: of weights that one pass over one token reads, as they are stored.
        kv_bytes: of keys and values per token of context.
        dtype: of the weights.
        window: tokens that the cache is bounded to, if it is.
        slots: of the cache that a pass reads in the short prompts, filled or not; None: those that are filled.
        cache_bytes: from a prompt's token ids to the bytes of the cache after it, as allocated; None where the library does not show them.
    """

    answer: Callable[[list[int], int], Answer]
    weight_bytes: int
    kv_bytes: int
    dtype: str
    window: int | None = None
    slots: int | None = None
    cache_bytes: Callable[[list[int]], int] | None = None


class Clock:
    """Notes when how many tokens were there, and how many passes over the model had been made by then."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.events: list[tuple[float, int, int]] = []
        self.passes = 0

    def note(self, tokens: int) -> None:
        self.events.append((time.perf_counter(), tokens, self.passes))

    def answer(self, ids: Sequence[int], counted: bool = False, drafting_bytes: int = 0) -> Answer:
        """What the noted times say of an answer; unless passes were `counted`, each token after the first took one."""
        (first, before, passes), (last, after, all_passes) = self.events[0], self.events[-1]
        decoded = after - before
        forwards = all_passes - passes if counted else decoded
        return Answer(list(ids), 1000 * (first - self.started), 1000 * (last - first), decoded, forwards, drafting_bytes)
