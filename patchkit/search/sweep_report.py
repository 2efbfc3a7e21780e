"""A sweep as a table for the terminal and as a plot."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from patchkit.measure.paired import Interval
from patchkit.search.sweep_result import BLOCKS, Sweep, SweepPoint

_TIME = "time of a step / unpatched"  # an axis


def table(sweep: Sweep) -> Table:
    """Table of a sweep for a terminal of 120 columns or more."""
    result = Table(
        title=f"{sum(sweep.weights):,} tokens of {len(sweep.weights)} documents",
        caption=f"/ blocks: perplexity / that of the model restarted every {sweep.settings['block']} tokens; / plain: over that "
        "without refresh; 95 % intervals over documents. time: of a step with a full window / that of the unpatched model, "
        "interleaved. *: on the Pareto front of perplexity, time (to 3 %) and bytes",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    result.add_column("")
    for heading in ("perplexity", "/ blocks", "/ plain", "time", "cache KiB"):
        result.add_column(heading, justify="right", no_wrap=True)
    front = {row.name for row in sweep.front()}
    for row in sweep.rows:
        if row.refused:
            result.add_row(row.label, "refused", style="dim")
            continue
        result.add_row(
            row.label + (" *" if row.name in front else ""),
            f"{row.perplexity:.3f}",
            _interval(sweep.ratio(row, BLOCKS)),
            _interval(sweep.over_plain(row)),
            "" if row.over_unpatched is None else f"{row.over_unpatched:.2f}",
            "" if row.cache_bytes is None else f"{row.cache_bytes / 1024:,.0f}",
        )
    return result


def _interval(ratio: Interval | None) -> str:
    if ratio is None:
        return ""
    bounds = f" [{ratio.low:.4f}, {ratio.high:.4f}]" if math.isfinite(ratio.high) else ""
    return f"{ratio.value:.4f}{bounds}"


def draw(sweep: Sweep, path: Path) -> None:
    """Write a PNG of perplexity against time and against bytes; rows on the Pareto front are numbered and named, the others grey."""
    from matplotlib.figure import Figure

    shown = [row for row in sweep.rows if row.perplexity is not None and math.isfinite(row.perplexity) and row.over_unpatched is not None]
    numbers = {row.name: number for number, row in enumerate(sweep.front(), 1) if row in shown}
    figure = Figure(figsize=(12, 5 + 0.18 * len(numbers)), layout="constrained")
    figures: dict[str, Callable[[SweepPoint], float]] = {
        _TIME: lambda row: row.over_unpatched or 0.0,
        "cache, KiB": lambda row: (row.cache_bytes or 0) / 1024,
    }
    for axes, (label, of) in zip(figure.subplots(1, 2, sharey=True), figures.items(), strict=True):
        for row in shown:
            number = numbers.get(row.name)
            if number is None:
                axes.plot(of(row), row.perplexity, "o", color="0.7", ms=5)
                continue
            name = f"{number}  {row.label}" if label == _TIME else None
            axes.plot(of(row), row.perplexity, "o", color="tab:blue", ms=7, zorder=3, label=name)
            axes.annotate(str(number), (of(row), row.perplexity or 0.0), xytext=(5, 4), textcoords="offset points", fontsize=8)
        reference = sweep.row(BLOCKS)
        if reference is not None and reference.perplexity is not None:
            name = f"{BLOCKS} of {sweep.settings['block']}" if label == _TIME else None
            axes.axhline(reference.perplexity, color="0.5", ls="--", lw=1, label=name)
        heights = [row.perplexity for row in [*shown, *([reference] if reference else [])] if row.perplexity is not None]
        if heights and max(heights) > 3 * min(heights):
            axes.set_yscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3, lw=0.5, which="both")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_ylabel("perplexity" if label == _TIME else "")
    figure.suptitle(f"{sweep.settings['model']}: {sum(sweep.weights):,} tokens of {len(sweep.weights)} documents", fontsize=11)
    if numbers or sweep.row(BLOCKS):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8, handlelength=1)
    figure.savefig(path, dpi=130, format="png")
