"""Results of the demo."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from patchkit.measure.demo_plan import MEMORY, REFERENCE, UNPATCHED, DemoPlan
from patchkit.measure.english_text import TextSource
from patchkit.measure.needle_grid import FORGETS, Answer
from patchkit.measure.needle_text import Asking
from patchkit.measure.perplexity import Bucket


@dataclass(frozen=True)
class DemoRow:
    """One configuration: perplexity by position and, except for a restarted reference, its speed, memory and recall.

    Attributes:
        curve: (position, perplexity), means over ranges that grow geometrically, or over equal ranges if the text is English.
        ratios: its perplexity / the reference's, on the same tokens, in each of the plan's ranges.
        window: window of streaming or memory, in tokens.
        ms_per_token: context in tokens -> median milliseconds of one decode step.
        cache_bytes: bytes of the cache at the longest context.
        speedup: unpatched time / own time at the longest context, median of paired ratios.
        keys: its answers when asked for a key, one per distance.
    """

    name: str
    buckets: list[Bucket]
    curve: list[tuple[float, float]]
    ratios: list[Bucket]
    window: int | None = None
    ms_per_token: dict[int, float] = dataclasses.field(default_factory=dict)
    cache_bytes: int | None = None
    speedup: float | None = None
    keys: list[Answer] = dataclasses.field(default_factory=list)


@dataclass(frozen=True)
class Demo:
    """The result of `run_demo`.

    Attributes:
        tokens: number of predictions scored per row.
        files: number of files that the text was taken from.
        sources: these files, if the text is English.
        asking: how keys were asked for; None if they were not.
    """

    plan: DemoPlan
    tokens: int
    files: int
    sources: list[TextSource]
    rows: list[DemoRow]
    asking: Asking | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "tokens": self.tokens,
            "files": self.files,
            "plan": dataclasses.asdict(self.plan),
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "ratios": [dataclasses.asdict(ratio) for ratio in self._streaming().ratios],
            "recall": self.recall(),
            "sources": [dataclasses.asdict(source) for source in self.sources],
        }

    def ratio_lines(self) -> list[str]:
        """Sentences about the main result: the first streaming row compared with the reference."""
        row = self._streaming()
        if not row.ratios:
            return [f"{self.tokens} tokens are too few to compare with the reference"]
        return [
            f"perplexity at positions {positions_of(ratio)}, {row.name} / {self.plan.reference}: "
            f"{ratio.perplexity:.3f} ± {ratio.perplexity * ratio.stderr:.3f}"
            for ratio in row.ratios
        ]

    def recall(self) -> dict[str, dict[str, int]]:
        """Numbers of keys recalled and asked for: unpatched, by streaming inside, beyond and at the edge of its window, and by memory."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.rows:
            for answer in row.keys:
                where = UNPATCHED if self.asking is None or row.window is None else self.asking.side(answer.case.distance, row.window)
                if row.name == self.plan.memory_name:
                    where = MEMORY
                count = counts.setdefault(where, {"recalled": 0, "asked": 0})
                count["recalled"] += answer.hit
                count["asked"] += 1
        return counts

    def recall_lines(self) -> list[str]:
        """Sentences about the recall of keys; empty if no key was asked for."""
        counts = self.recall()
        if not counts:
            return []
        words = {
            UNPATCHED: UNPATCHED,
            "inside": "streaming, inside the window",
            "edge": "at its edge",
            "beyond": "beyond it",
            MEMORY: MEMORY,
        }
        counted = ", ".join(f"{words[w]} {counts[w]['recalled']} of {counts[w]['asked']}" for w in words if w in counts)
        forgets = counts[UNPATCHED]["recalled"] > 0 and "beyond" in counts and counts["beyond"]["recalled"] == 0
        refused = [f"memory is left out: {self.plan.refused}"] if self.plan.refused else []
        return [f"keys recalled: {counted}", *([FORGETS] if forgets else []), *refused]

    def _streaming(self) -> DemoRow:
        return next(row for row in self.rows if row.name not in (UNPATCHED, REFERENCE))


def positions_of(bucket: Bucket) -> str:
    return f"{short(bucket.start)}-{short(bucket.stop)}"


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
