"""What the demo measures on a model, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from patchkit.anatomy.target import Target

SINKS = 4

UNPATCHED = "unpatched"

# What is shown of a model that was made for a short context.
TOKENS = 16384

WINDOWS = (508, 252, 124)

EDGES = (0, 512, 2048, 8192, 16384)

CONTEXTS = (1024, 8192, 32768)

BLOCK = 512

REFERENCE = f"unpatched, fresh every {BLOCK} tokens"

# Positions where the ratio to the reference is taken: the window has long been full, an unpatched model has long been lost.
_RATIO_FROM = 2048

# A model made for more positions than this reads English, within and beyond its limit, and is asked to recall keys.
LONG = 2048

# A longer limit is not reached: on a CPU, an unpatched model takes hours to.
_REACH = 8192

DISTANCES = (300, 1000, 3000, 6000)

# Tokens of text before a key.
BEFORE_KEY = 100

CHUNK = 512


@dataclass(frozen=True)
class DemoPlan:
    """What is measured; see `plan_for`.

    Attributes:
        english: the text is English; else held-out files of the standard library.
        tokens: predictions to score.
        windows: of streaming, in tokens.
        edges: of the ranges of positions that perplexity is shown for.
        compared: edges of the ranges over which perplexity is compared with the reference.
        block: tokens after which the reference, an unpatched model, starts anew; None where plain unpatched is the reference.
        contexts: tokens before the timed steps.
        distances: tokens between a key and its answer.
        limit: the positions that the model was made for, where the text goes beyond; None else.
    """

    english: bool
    tokens: int
    windows: tuple[int, ...]
    edges: tuple[int, ...]
    compared: tuple[int, ...]
    block: int | None
    contexts: tuple[int, ...]
    distances: tuple[int, ...] = ()
    limit: int | None = None

    @property
    def reference(self) -> str:
        """The name of the row that streaming is compared with."""
        return UNPATCHED if self.block is None else REFERENCE

    def work(self) -> int:
        """How many tokens `run_demo` will report to ``advance``, about."""
        scored = (1 + len(self.windows) + (self.block is not None)) * self.tokens
        # Contexts within the text are reached while it is scored.
        led_up = sum(context - self.tokens if context > self.tokens else context % CHUNK for context in self.contexts)
        asked = (1 + len(self.windows)) * sum(distance + 2 * BEFORE_KEY for distance in self.distances)
        return scored + len(self.windows) * led_up + asked


def plan_for(model: PreTrainedModel, tokens: int | None = None, windows: Sequence[int] | None = None) -> DemoPlan:
    """What to show of a model, by the positions that it was made for.

    Up to 2048 positions (or where there is no limit): held-out library code, far beyond the limit, against the model started anew every
    512 tokens. Above: English up to one and a half times the limit (of at most 8192 positions), against the unpatched model itself,
    with windows of a quarter, an eighth and a sixteenth of the limit, and keys to be recalled.

    Args:
        tokens: predictions to score; None for as many as suit the model.
        windows: in tokens; None for those that suit it.
    """
    limit = Target(model).position_limit
    if limit is None or limit <= LONG:
        return DemoPlan(
            english=False,
            tokens=TOKENS if tokens is None else tokens,
            windows=tuple(windows or WINDOWS),
            edges=EDGES,
            compared=(_RATIO_FROM, max(EDGES)),
            block=BLOCK,
            contexts=CONTEXTS,
        )
    reach = min(limit, _REACH)
    end = 3 * reach // 2
    scored = end if tokens is None else tokens
    # In a longer text the last range is what lies beyond, or goes on: none is left without a number.
    last = max(end, scored)
    return DemoPlan(
        english=True,
        tokens=scored,
        windows=tuple(windows or [reach // share - SINKS for share in (4, 8, 16)]),
        edges=(0, reach // 4, reach, last),
        compared=(reach // 4, reach, last),
        block=None,
        contexts=tuple(sorted({min(1024, reach // 2), reach // 2, reach, end})),
        distances=tuple(distance for distance in DISTANCES if distance <= 3 * reach // 4),
        limit=limit if limit < scored else None,
    )
