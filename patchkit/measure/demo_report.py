"""The result of the demo as tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchkit.measure.demo_plan import REFERENCE, DemoPlan
from patchkit.measure.demo_result import Demo, positions_of, short
from patchkit.measure.perplexity import Bucket


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
    """Table of the keys that were recalled; None if no key was asked for."""
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
