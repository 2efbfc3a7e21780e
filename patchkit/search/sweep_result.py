"""The rows of a sweep, the best of them, and the files that it is written to and resumed from."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel

from patchkit.errors import PatchError
from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import perplexity_of
from patchkit.patches.streaming import StreamingLLM

UNPATCHED = "unpatched"

BLOCKS = "unpatched in blocks"

FILES = ("sweep.json", "sweep.csv", "sweep.png")

# Elements of each parameter by which a model is known again.
_SAMPLED = 64

_TIME = "time of a step / unpatched"  # an axis


class SweepConflict(PatchError):
    """A folder holds the sweep of another model, or with other settings; the message says what differs."""


@dataclass(frozen=True)
class SweepPoint:
    """What one configuration gave; None where it was not measured.

    Attributes:
        name: its spec, `UNPATCHED` or `BLOCKS`.
        refused: why the model cannot run it.
        nll: mean nats per token of each document.
        perplexity: over all tokens of all documents.
        refreshes: how often the cache was refreshed while scoring.
        ms_per_token: median over rounds; a round is one step, or the mean of R steps where every R-th refreshes.
        over_unpatched: its time over that of unpatched steps in the same rounds, median.
        cache_bytes: after C + 1 tokens and the timed ones; of the unpatched model, after the longest document.
    """

    name: str
    sinks: int | None = None
    window: int | None = None
    refresh: str | None = None
    refused: str | None = None
    nll: list[float] = field(default_factory=list)
    perplexity: float | None = None
    refreshes: int = 0
    ms_per_token: float | None = None
    over_unpatched: float | None = None
    cache_bytes: int | None = None

    @property
    def label(self) -> str:
        """Sinks + window and the refresh, for tables and plots."""
        return self.name if self.window is None else " ".join([f"{self.sinks}+{self.window}", *([self.refresh] if self.refresh else [])])


@dataclass(frozen=True)
class Sweep:
    """What `run_sweep` found.

    Attributes:
        settings: model, documents and options, by which a sweep that goes on is known to be the same.
        weights: tokens scored of each document.
    """

    settings: dict[str, Any]
    weights: list[int]
    rows: list[SweepPoint]

    def row(self, name: str) -> SweepPoint | None:
        """The row of this name, if it has a perplexity."""
        return next((row for row in self.rows if row.name == name and row.nll), None)

    def ratio(self, row: SweepPoint, other: str) -> Interval | None:
        """Perplexity of ``row`` over that of the row named ``other``, with the interval over documents; None if there is none."""
        against = self.row(other)
        if against is None or not row.nll or row.name == other:
            return None
        difference = mean_difference(row.nll, against.nll, self.weights)
        return Interval(*(perplexity_of(x) for x in (difference.value, difference.low, difference.high)))

    def over_plain(self, row: SweepPoint) -> Interval | None:
        """The same, over the row without refresh."""
        return None if row.refresh is None else self.ratio(row, StreamingLLM(sinks=row.sinks or 0, window=row.window or 1).spec)

    def front(self) -> list[SweepPoint]:
        """Rows that no other row is at least as good as in perplexity, time and bytes, and better in one.

        Time is that over unpatched steps in the same rounds, because rows are timed one after the other and the machine drifts meanwhile;
        differences below 3 % are none.
        """
        figures = {
            row.name: (row.perplexity, _in_steps(row.over_unpatched), row.cache_bytes)
            for row in self.rows
            if row.perplexity is not None and row.over_unpatched is not None and row.cache_bytes is not None
        }
        return [row for row in self.rows if row.name in figures and not any(_dominates(f, figures[row.name]) for f in figures.values())]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        front = {row.name for row in self.front()}
        rows = []
        for row in self.rows:
            ratios = {"over_blocks": self.ratio(row, BLOCKS), "over_plain": self.over_plain(row)}
            intervals = {name: ratio and dataclasses.asdict(ratio) for name, ratio in ratios.items()}
            rows.append({**dataclasses.asdict(row), **intervals, "on_front": row.name in front})
        return {"settings": self.settings, "weights": self.weights, "rows": rows}

    def write(self, folder: Path) -> None:
        """Write `FILES` to ``folder``, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        self.store(folder)
        _write_csv(self, folder / "sweep.csv")
        draw(self, folder / "sweep.png")

    def store(self, folder: Path) -> None:
        """Write the JSON file alone, at once or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "sweep.json.part"
        unfinished.write_text(json.dumps(_plain(self.to_dict()), indent=2) + "\n")
        os.replace(unfinished, folder / "sweep.json")


def _in_steps(ratio: float) -> int:
    """A ratio of times on a scale of steps of 3 %."""
    return round(math.log(ratio) / math.log(1.03))


def _dominates(left: tuple[float, ...], right: tuple[float, ...]) -> bool:
    return left != right and all(a <= b for a, b in zip(left, right, strict=True))


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration and of the first elements of every parameter."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for key, parameter in model.named_parameters():
        digest.update(key.encode() + str(tuple(parameter.shape)).encode())
        digest.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def stored_rows(folder: Path, settings: dict[str, Any]) -> list[SweepPoint]:
    """The rows of the sweep in ``folder``, which must have these settings; none if there is no sweep."""
    path = folder / "sweep.json"
    remedy = f"give another --out, or --restart to drop what is in {folder}"
    try:
        stored = json.loads(path.read_text())
        before, rows = stored["settings"], stored["rows"]
        known = {each.name for each in dataclasses.fields(SweepPoint)}
        made = [SweepPoint(**{key: value for key, value in row.items() if key in known}) for row in rows]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise SweepConflict(f"{path} is no sweep that could go on ({type(error).__name__}: {error}): {remedy}") from error
    now = _plain(settings)
    different = [f"{key} {_short(before.get(key))} -> {_short(now[key])}" for key in now if before.get(key) != now[key]]
    if different:
        raise SweepConflict(f"{path} is a sweep with other settings ({'; '.join(different)}): {remedy}")
    return [_unplain(row) for row in made]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """What strict JSON can hold: infinities become null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _unplain(row: SweepPoint) -> SweepPoint:
    return dataclasses.replace(row, perplexity=math.inf) if row.nll and row.perplexity is None else row


def _write_csv(sweep: Sweep, path: Path) -> None:
    columns = ("name", "sinks", "window", "refresh", "perplexity", "ms_per_token", "over_unpatched", "cache_bytes", "refreshes")
    ratios = [f"{name}{end}" for name in ("over_blocks", "over_plain") for end in ("", "_low", "_high")]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*columns, *ratios, "on_front", "refused"])
        for row in sweep.to_dict()["rows"]:
            figures = [(row[name] or {}).get(key) for name in ("over_blocks", "over_plain") for key in ("value", "low", "high")]
            writer.writerow([row[column] for column in columns] + figures + [row["on_front"], row["refused"]])


def table(sweep: Sweep) -> Table:
    """The result for a terminal of 120 columns or more."""
    result = Table(
        title=f"{sum(sweep.weights):,} tokens of {len(sweep.weights)} documents",
        caption=f"/ blocks: perplexity over that of the model started anew every {sweep.settings['block']} tokens; / plain: over that "
        "without refresh; 95 % intervals over documents. time: of a step with a full window over that of the unpatched model "
        "beside it. *: no other row is as good in perplexity, time (to 3 %) and bytes, and better in one",
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
    """Write perplexity against time and against bytes as a PNG; rows on the front of all three are numbered and named, the others grey."""
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
