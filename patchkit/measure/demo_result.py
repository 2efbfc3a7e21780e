"""What the demo found: tables and a picture."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchkit.measure.demo_plan import REFERENCE, UNPATCHED, DemoPlan
from patchkit.measure.english_text import TextSource
from patchkit.measure.needle_grid import FORGETS, Answer
from patchkit.measure.needle_text import Asking
from patchkit.measure.perplexity import Bucket


@dataclass(frozen=True)
class DemoRow:
    """One configuration: perplexity by position and, but for a reference that starts anew, its speed, memory and recall.

    Attributes:
        curve: (position, perplexity) means over ranges that grow geometrically; over equal ones where the text is English.
        ratios: its perplexity over the reference's, on the same tokens, in each of the plan's ranges.
        window: of streaming, in tokens.
        ms_per_token: context in tokens -> median milliseconds of one decode step.
        cache_bytes: at the longest context.
        speedup: unpatched time over this one's at the longest context, median of paired ratios.
        keys: what it answered when asked for a key, one answer per distance.
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
    """What `run_demo` found.

    Attributes:
        tokens: predictions scored per row.
        files: how many the text was taken from.
        sources: these files, where the text is English.
        asking: how keys were asked for; None where they were not.
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
        """The main result in sentences: the first streaming row against the reference."""
        row = self._streaming()
        if not row.ratios:
            return [f"{self.tokens} tokens are too few to compare with the reference"]
        return [
            f"perplexity at positions {positions_of(ratio)}, {row.name} / {self.plan.reference}: "
            f"{ratio.perplexity:.3f} ± {ratio.perplexity * ratio.stderr:.3f}"
            for ratio in row.ratios
        ]

    def recall(self) -> dict[str, dict[str, int]]:
        """Keys recalled, and asked for: by the unpatched model, and by streaming ones inside their windows, beyond them, or at the edge."""
        counts: dict[str, dict[str, int]] = {}
        for row in self.rows:
            for answer in row.keys:
                where = UNPATCHED if self.asking is None or row.window is None else self.asking.side(answer.case.distance, row.window)
                count = counts.setdefault(where, {"recalled": 0, "asked": 0})
                count["recalled"] += answer.hit
                count["asked"] += 1
        return counts

    def recall_lines(self) -> list[str]:
        """The same in sentences; none where no key was asked for."""
        counts = self.recall()
        if not counts:
            return []
        words = {UNPATCHED: UNPATCHED, "inside": "streaming, inside the window", "edge": "at its edge", "beyond": "beyond it"}
        said = ", ".join(f"{words[w]} {counts[w]['recalled']} of {counts[w]['asked']}" for w in words if w in counts)
        forgets = counts[UNPATCHED]["recalled"] > 0 and "beyond" in counts and counts["beyond"]["recalled"] == 0
        return [f"keys recalled: {said}", *([FORGETS] if forgets else [])]

    def _streaming(self) -> DemoRow:
        return next(row for row in self.rows if row.name not in (UNPATCHED, REFERENCE))


def table(demo: Demo) -> Table:
    """Perplexity, time and memory for a terminal of 100 columns or more."""
    plan, beyond = demo.plan, ""
    if plan.limit is not None:
        beyond = f"\n*: beyond the {plan.limit:,} positions that the model was made for"
    result = Table(
        title=f"{demo.tokens:,} tokens of {_text_name(demo)}",
        caption=f"ppl: perplexity over these positions; ms: milliseconds to decode one token at this context{beyond}",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    longest = short(max(plan.contexts))
    result.add_column("", min_width=22)
    for heading in (
        *(f"ppl at\n{positions_of(b)}{_mark(plan, b)}" for b in demo.rows[0].buckets),
        *(f"ms at\n{short(context)}" for context in plan.contexts),
        f"cache\nat {longest}",
        f"speed-up\nat {longest}",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in demo.rows:
        result.add_row(
            row.name,
            *(f"{b.perplexity:.2f}" for b in row.buckets),
            *(f"{row.ms_per_token[c]:.2f}" if c in row.ms_per_token else "" for c in plan.contexts),
            "" if row.cache_bytes is None else f"{row.cache_bytes / 2**20:.1f} MiB",
            "" if row.speedup is None else f"{row.speedup:.1f}x",
        )
    return result


def keys_table(demo: Demo) -> Table | None:
    """Which keys were recalled; None where none was asked for."""
    if demo.asking is None:
        return None
    result = Table(
        title=f"is a five-digit key recalled, asked for {demo.asking.words}?",
        caption="in brackets: mean log-probability of a token of the key",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    result.add_column("", min_width=22)
    for distance in demo.plan.distances:
        result.add_column(f"after\n{distance:,} tokens", justify="right", no_wrap=True)
    for row in demo.rows:
        if row.keys:
            result.add_row(row.name, *(f"{'yes' if key.hit else 'no'} ({key.log_probability:.2f})" for key in row.keys))
    return result


def draw(demo: Demo, path: Path) -> None:
    """Write perplexity against position and milliseconds per token against context as a PNG, and which keys were recalled."""
    # Only the demo draws, and matplotlib takes half a second to import.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    plan = demo.plan
    asked = demo.asking is not None
    figure = Figure(figsize=(15.5, 4.2) if asked else (11, 4.2), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=(11, 11, 9)) if asked else figure.subplots(1, 2)
    quality, speed = panels[:2]
    colors = {}
    for row in demo.rows:
        style: dict[str, Any] = dict(label=row.name, lw=1.8)
        if row.name == REFERENCE:
            style.update(color="0.6", ls="--")
        (line,) = quality.plot(*zip(*row.curve, strict=True), **style)
        colors[row.name] = line.get_color()
        if row.ms_per_token:
            speed.plot([*row.ms_per_token], [*row.ms_per_token.values()], marker="o", color=line.get_color(), label=row.name, lw=1.8)
    quality.set(yscale="log", xlabel="position in the text (tokens)", ylabel="perplexity", title="Quality")
    if plan.english:
        quality.set_xticks(plan.contexts, [short(c) for c in plan.contexts])
        quality.set_xlim(0, demo.tokens)
    else:
        quality.set_xscale("log")
        quality.set_xticks([64, 512, 2048, 8192, 32768], ["64", "512", "2k", "8k", "32k"])
        quality.set_xlim(demo.rows[0].curve[0][0], demo.tokens)
    speed.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms per token", title="Time to decode one token")
    speed.set_xticks(plan.contexts, [short(c) for c in plan.contexts])
    for axes in (quality, speed):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3, lw=0.5)
        axes.legend(frameon=False, fontsize=8, loc="upper left" if plan.english else "best")
    if plan.limit is not None:
        for axes in (quality, speed):
            axes.axvline(plan.limit, color="0.5", ls=":", lw=1.4)
        place = dict(xytext=(-4, 5), textcoords="offset points", ha="right", fontsize=8, color="0.4")
        quality.annotate(f"made for {plan.limit:,} positions", (plan.limit, 0), xycoords=quality.get_xaxis_transform(), **place)
    if asked:
        _draw_keys(demo, panels[2], colors)
    figure.savefig(path, dpi=130, format="png")


def _draw_keys(demo: Demo, axes: Any, colors: dict[str, Any]) -> None:
    """A row of dots for each configuration, full where a key was recalled, and where its window ends."""
    rows, distances = [row for row in demo.rows if row.keys], demo.plan.distances
    for height, row in enumerate(reversed(rows)):
        for key in row.keys:
            face = colors[row.name] if key.hit else "white"
            axes.plot(key.case.distance, height, "o", ms=11, mfc=face, mec=colors[row.name], mew=1.8, zorder=3)
        if row.window is not None:
            axes.plot([row.window] * 2, [height - 0.35, height + 0.35], color=colors[row.name], lw=1.6)
            axes.annotate("window", (row.window, height + 0.35), ha="center", va="bottom", fontsize=7, color=colors[row.name])
    axes.set(xscale="log", xlabel="tokens between key and answer", title="Recall of a key (full: recalled)")
    axes.set_xticks(distances, [f"{distance:,}" for distance in distances])
    axes.set_xlim(distances[0] / 1.5, distances[-1] * 1.5)
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set_ylim(-0.6, len(rows) - 0.3)
    axes.minorticks_off()
    axes.grid(alpha=0.3, lw=0.5)


def _text_name(demo: Demo) -> str:
    if not demo.plan.english:
        return f"{demo.files} held-out standard library files"
    return f"English, the documentation in {demo.files} file{'s' if demo.files > 1 else ''} of Python's library"


def _mark(plan: DemoPlan, bucket: Bucket) -> str:
    return "*" if plan.limit is not None and bucket.start >= plan.limit else ""


def positions_of(bucket: Bucket) -> str:
    return f"{short(bucket.start)}-{short(bucket.stop)}"


def short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
