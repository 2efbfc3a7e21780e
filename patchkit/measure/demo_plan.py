"""Plan of the demo: the text, windows and contexts that suit a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from patchkit.anatomy.target import Target
from patchkit.errors import PatchError
from patchkit.patches.memory import Memory

SINKS = 4

UNPATCHED = "unpatched"

MEMORY = "memory"

# Settings for a model that was made for a short context.
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
    """Settings of one demo, as `plan_for` chooses them.

    Attributes:
        english: the text is English, not held-out files of the standard library.
        tokens: number of predictions to score.
        windows: windows of streaming, in tokens.
        edges: edges of the ranges of positions that perplexity is shown for.
        compared: edges of the ranges over which perplexity is compared with the reference.
        block: tokens after which the reference, an unpatched model, restarts; None if plain unpatched is the reference.
        contexts: numbers of tokens before the timed steps.
        distances: tokens between a key and its answer.
        memory: `memory` in fewer bytes than the smallest window; None where the text is not English, or the model does not take it.
        refused: the reason why the model does not take it.
        limit: the positions that the model was made for, if the text exceeds them; else None.
    """

    english: bool
    tokens: int
    windows: tuple[int, ...]
    edges: tuple[int, ...]
    compared: tuple[int, ...]
    block: int | None
    contexts: tuple[int, ...]
    distances: tuple[int, ...] = ()
    memory: Memory | None = None
    refused: str = ""
    limit: int | None = None

    @property
    def reference(self) -> str:
        """Name of the row that streaming is compared with."""
        return UNPATCHED if self.block is None else REFERENCE

    @property
    def memory_name(self) -> str:
        """Name of the row of `memory`: sinks, window and slots."""
        return "" if self.memory is None else f"{MEMORY} {self.memory.sinks}+{self.memory.window}+{self.memory.slots}"

    def work(self) -> int:
        """Approximate number of tokens that `run_demo` reports to ``advance``."""
        patched = len(self.windows) + (self.memory is not None)
        scored = (1 + patched + (self.block is not None)) * self.tokens
        # Contexts within the text are reached while it is scored.
        led_up = sum(context - self.tokens if context > self.tokens else context % CHUNK for context in self.contexts)
        asked = (1 + patched) * sum(distance + 2 * BEFORE_KEY for distance in self.distances)
        return scored + patched * led_up + asked


def plan_for(model: PreTrainedModel, tokens: int | None = None, windows: Sequence[int] | None = None) -> DemoPlan:
    """Choose a demo by the number of positions that a model was made for.

    * Up to 2048 positions, or no limit: held-out library code, far beyond the limit, compared with the model restarted every 512 tokens.
    * More: English up to one and a half times the limit (of at most 8192 positions), compared with the unpatched model itself; windows
      of a quarter and a sixteenth of the limit, and `memory` in the bytes of the smaller; keys to be recalled.

    Args:
        tokens: number of predictions to score; None for the number that suits the model.
        windows: in tokens; None for those that suit the model.
    """
    target = Target(model)
    limit = target.position_limit
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
    # The last range goes to the end of the text, so that every position is in a range.
    last = max(end, scored)
    chosen = tuple(windows or [reach // share - SINKS for share in (4, 16)])
    memory: Memory | None = memory_like(min(chosen))
    refused = ""
    try:
        memory_like(min(chosen)).check(target)
    except PatchError as error:
        memory, refused = None, str(error)
    return DemoPlan(
        english=True,
        tokens=scored,
        windows=chosen,
        edges=(0, reach // 4, reach, last),
        compared=(reach // 4, reach, last),
        block=None,
        contexts=tuple(sorted({min(1024, reach // 2), reach // 2, reach, end})),
        distances=tuple(distance for distance in DISTANCES if distance <= 3 * reach // 4),
        memory=memory,
        refused=refused,
        limit=limit if limit < scored else None,
    )


def memory_like(window: int) -> Memory:
    """`memory` in about the bytes of streaming with this window: an eighth of it is its window, and slots hold some bytes beside tokens."""
    near = max(1, (window + SINKS) // 8)
    return Memory(sinks=SINKS, window=near, slots=max(1, window - near - 12), block=min(32, near))
