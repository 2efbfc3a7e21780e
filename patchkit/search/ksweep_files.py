"""Files of a sweep over draft lengths: every call as CSV, all figures as JSON, and two plots."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

from patchkit.search.ksweep_result import KSweep, TimedCall

FILES = ("ksweep.csv", "ksweep.json", "throughput.png", "acceptance.png")


def write(sweep: KSweep, folder: Path) -> None:
    """Write `FILES` to ``folder``, which is created if it does not exist: a line per call, all figures with the machine, two plots."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILES[0]).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(TimedCall)] + ["tokens_per_s"])
        for call in sweep.runs:
            values = dataclasses.asdict(call) | {"k": "plain" if call.k is None else call.k}
            writer.writerow([*values.values(), call.tokens_per_s])
    (folder / FILES[1]).write_text(json.dumps(sweep.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    draw_throughput(sweep, folder / FILES[2])
    draw_acceptance(sweep, folder / FILES[3])


def draw_throughput(sweep: KSweep, path: Path) -> None:
    """Write tokens per second against K as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.subplots()
    plain, *rows = sweep.rows
    rows = sorted(rows, key=lambda row: row.k or 0)
    ks = [row.k or 0 for row in rows]
    axes.errorbar(
        ks, [row.tokens_per_s for row in rows], [row.tokens_per_s_std or 0.0 for row in rows], marker="o", capsize=3, label="speculative"
    )
    axes.axhline(plain.tokens_per_s, color="0.4", ls="--", label="plain")
    spread = plain.tokens_per_s_std or 0.0
    low, high = plain.tokens_per_s - spread, plain.tokens_per_s + spread
    axes.axhspan(low, high, color="0.4", alpha=0.15, lw=0)
    axes.set(xlabel="K (drafts per round)", ylabel="tokens per second", title="Throughput", xticks=ks)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3, lw=0.5)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def draw_acceptance(sweep: KSweep, path: Path) -> None:
    """Write the share of accepted drafts and the tokens per target step against K as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    acceptance, yields = figure.subplots(1, 2)
    rows = sorted((row for row in sweep.rows if row.statistics is not None), key=lambda row: row.k or 0)
    known = [(row.k, row.statistics.acceptance_rate) for row in rows if row.statistics and row.statistics.acceptance_rate is not None]
    if known:
        acceptance.plot(*zip(*known, strict=True), marker="o", label="all positions")
    last = rows[-1].statistics
    by_position = last.conditional_acceptance_by_position if last else []
    if by_position:
        positions = range(1, len(by_position) + 1)
        acceptance.plot(positions, by_position, marker="s", ls=":", label=f"position i, those before accepted (K = {rows[-1].k})")
    acceptance.set(xlabel="K, or position", ylabel="share of drafts accepted", title="Acceptance", ylim=(0, 1.05))
    yields.plot([row.k for row in rows], [row.statistics.tokens_per_target_step for row in rows if row.statistics], marker="o")
    yields.set(xlabel="K (drafts per round)", ylabel="tokens per target step", title="Yield")
    yields.set_ylim(bottom=0)
    for axes in (acceptance, yields):
        axes.set_xticks(sorted({row.k or 0 for row in rows}))
        axes.grid(alpha=0.3, lw=0.5)
    if known or by_position:
        acceptance.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, format="png")
