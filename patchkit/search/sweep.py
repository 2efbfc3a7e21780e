"""Perplexity, milliseconds per token and bytes of a cache: streaming over a grid of windows, sinks and refreshes, and the unpatched model.

Every configuration scores the same documents, each streamed through one cache of its own, and is compared with others by the differences
document by document. Its steps are timed in turns with those of the unpatched model at the longest document's length. What is finished is
stored at once, and a sweep that was interrupted goes on from there.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model, report
from patchkit.errors import NothingMatched, PatchError, StreamError, UnsupportedModel
from patchkit.measure.environment import environment
from patchkit.measure.latency import Stream, decode_latency, filled_cache, prefilled_cache
from patchkit.measure.paired import Interval, mean_difference
from patchkit.measure.perplexity import TextError, block_nll, encode, perplexity_of, read_text, stream_nll
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.patch import parse_object
from patchkit.patches.streaming import StreamingLLM
from patchkit.streaming.cache import Lane
from patchkit.streaming.refresh import DynamicSinks, Reencode, Refresh
from patchkit.views import cache_bytes, twin

UNPATCHED = "unpatched"
BLOCKS = "unpatched in blocks"
FILES = ("sweep.json", "sweep.csv", "sweep.png")

# Periods of R steps that are timed at least: R steps are a round where every R-th one refreshes.
_PERIODS = 3
# Elements of each parameter by which a model is known again.
_SAMPLED = 64

_TIME = "time of a step / unpatched"  # an axis

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class TailInsert(DynamicSinks):
    """A control: the tokens that `DynamicSinks` chooses, put back at the end of the cache, at the newest positions, out of order."""

    name = "tail_insert"

    def place(self, lane: Lane) -> int:
        return lane.capacity - self.n


REFRESHES: tuple[type[Refresh], ...] = (Reencode, DynamicSinks, TailInsert)


class SweepConflict(PatchError):
    """A folder holds the sweep of another model, or with other settings; the message says what differs."""


@dataclass(frozen=True)
class Document:
    """A text to score: its name, and token ids [T]."""

    name: str
    ids: list[int]


@dataclass(frozen=True)
class Row:
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
    rows: list[Row]

    def row(self, name: str) -> Row | None:
        """The row of this name, if it has a perplexity."""
        return next((row for row in self.rows if row.name == name and row.nll), None)

    def ratio(self, row: Row, other: str) -> Interval | None:
        """Perplexity of ``row`` over that of the row named ``other``, with the interval over documents; None if there is none."""
        against = self.row(other)
        if against is None or not row.nll or row.name == other:
            return None
        difference = mean_difference(row.nll, against.nll, self.weights)
        return Interval(*(perplexity_of(x) for x in (difference.value, difference.low, difference.high)))

    def over_plain(self, row: Row) -> Interval | None:
        """The same, over the row without refresh."""
        return None if row.refresh is None else self.ratio(row, StreamingLLM(sinks=row.sinks or 0, window=row.window or 1).spec)

    def front(self) -> list[Row]:
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


def parse_refresh(text: str) -> Refresh | None:
    """`none`, or a refresh as a spec string writes it; `tail_insert`, the control, too.

    Raises:
        SpecError: it is none of these.
    """
    return None if text.strip() == "none" else parse_object(text, "refresh", REFRESHES)


def grid(windows: Sequence[int], sinks: Sequence[int], refreshes: Sequence[Refresh | None] = (None,)) -> list[StreamingLLM]:
    """Every combination, those of one window together."""
    return [StreamingLLM(s, window, refresh=refresh) for window in windows for s in sinks for refresh in refreshes]


def documents(tokenizer: PreTrainedTokenizerBase, files: Sequence[Path], tokens: int, count: int) -> list[Document]:
    """The first ``tokens`` tokens of each file, or, without files, of the first ``count`` held-out library files that have as many.

    Raises:
        TextError: a file cannot be read or has fewer than two tokens, or the library has no file that long.
    """
    if files:
        found = [Document(str(path), encode(tokenizer, read_text(path))[: tokens + 1]) for path in files]
        for document in found:
            if len(document.ids) < 2:
                raise TextError(f"{document.name} has {len(document.ids)} token(s), which leaves nothing to predict: give a longer text")
        return found
    found = []
    try:
        for number, text in enumerate(read_texts(stdlib_files("heldout"))):
            # A token is at least a byte, but for the boundary: short files need not be encoded.
            ids = encode(tokenizer, text) if len(text.encode()) >= tokens else []
            if len(ids) > tokens:
                found.append(Document(f"held-out library file {number}", ids[: tokens + 1]))
            if len(found) == count:
                break
    except FileNotFoundError as error:
        raise TextError(f"{error}: give a text of your own with --text") from error
    if not found:
        raise TextError(f"no held-out library file has {tokens} tokens: ask for fewer with --tokens")
    return found


def work(patches: Sequence[StreamingLLM], texts: Sequence[Document]) -> int:
    """How many tokens `run_sweep` will report to ``advance``, if it starts anew and nothing is refused."""
    return (2 + len(patches)) * sum(len(text.ids) - 1 for text in texts)


def run_sweep(
    model: PreTrainedModel,
    texts: Sequence[Document],
    patches: Sequence[StreamingLLM],
    folder: Path,
    name: str = "",
    chunk: int = 512,
    block: int = 512,
    rounds: int = 15,
    restart: bool = False,
    advance: Advance = lambda what, count: None,
) -> Sweep:
    """Measure the unpatched model and every patch; ``model`` itself stays unpatched, and weights are shared.

    Args:
        folder: where results go. A sweep of the same model, texts and options that is there goes on; rows it has are not measured again.
        name: of the model, for the record.
        chunk: tokens per forward when scoring.
        block: tokens after which the context of `BLOCKS` is cut.
        rounds: timed steps per configuration; with a refresh every R steps, at least three times R.
        restart: drop what is in the folder.
        advance: called with what is being done and a number of tokens done.

    Raises:
        SweepConflict: the folder holds something else.
    """
    weights = [len(text.ids) - 1 for text in texts]
    settings = {
        "model": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype),
        "device": str(model.device),
        "weights": fingerprint(model),
        "texts": [{"name": text.name, "tokens": len(text.ids) - 1, "sha256": _digest(text.ids)} for text in texts],
        "chunk": chunk,
        "block": block,
        "rounds": rounds,
        "environment": environment(),
    }
    plain = twin(model).eval()
    done = [] if restart else _stored(folder, settings)
    sweep = Sweep(settings, weights, done)
    context = max(weights)
    scored = sum(weights)
    wanted: list[StreamingLLM | str] = [BLOCKS, UNPATCHED, *patches]
    for each in wanted:
        spec = each if isinstance(each, str) else each.spec
        if any(row.name == spec for row in done):
            advance(f"{spec}: done before", scored)
            continue
        tell = partial(advance, spec)
        if each == BLOCKS:
            row = _in_blocks(plain, texts, weights, block, tell)
        else:
            row = _measured(plain, None if isinstance(each, str) else each, texts, weights, context, chunk, rounds, tell)
        done.append(row)
        sweep.store(folder)
    sweep.write(folder)
    return sweep


def _in_blocks(model: PreTrainedModel, texts: Sequence[Document], weights: list[int], block: int, tell: Callable[[int], object]) -> Row:
    try:
        return _scored(Row(BLOCKS), [block_nll(model, text.ids, block, progress=tell) for text in texts], weights)
    except IndexError as error:
        reason = f"{type(model).__name__} cannot take {block} tokens ({error}): its position table is shorter, or the tokenizer not its own"
        return Row(BLOCKS, refused=f"{reason}. Give a smaller --block")


def _measured(
    model: PreTrainedModel,
    patch: StreamingLLM | None,
    texts: Sequence[Document],
    weights: list[int],
    context: int,
    chunk: int,
    rounds: int,
    tell: Callable[[int], object],
) -> Row:
    """The row of the unpatched model (``patch`` None) or of one patch."""
    row = Row(UNPATCHED)
    if patch is not None:
        row = Row(patch.spec, patch.sinks, patch.window, patch.refresh.spec if patch.refresh else None)
    try:
        view = model if patch is None else patch_model(twin(model), patch, verbose=False)
        row = _scored(row, [stream_nll(view, text.ids, chunk, tell) for text in texts], weights)
    except (UnsupportedModel, NothingMatched, StreamError) as reason:
        return dataclasses.replace(row, refused=str(reason))
    streams, period = {UNPATCHED: Stream(model, filled_cache(model, context))}, 1
    if patch is not None:
        row = dataclasses.replace(row, refreshes=report(view).patches[0].hits.get("refreshes", 0))
        streams[row.name] = Stream(view, prefilled_cache(view, patch.capacity + 1, chunk))
        period = patch.refresh.every if patch.refresh else 1
    timings = decode_latency(streams, rounds=period * max(_PERIODS if period > 1 else 1, math.ceil(rounds / period)))
    means = {name: [statistics.fmean(times[i : i + period]) for i in range(0, len(times), period)] for name, times in timings.items()}
    ratios = [mine / its for mine, its in zip(means[row.name], means[UNPATCHED], strict=True)]
    return dataclasses.replace(
        row,
        ms_per_token=statistics.median(means[row.name]),
        over_unpatched=statistics.median(ratios),
        cache_bytes=cache_bytes(streams[row.name].cache),
    )


def _scored(row: Row, nll: list[torch.Tensor], weights: list[int]) -> Row:
    means = [each.double().mean().item() for each in nll]
    total = sum(mean * weight for mean, weight in zip(means, weights, strict=True)) / sum(weights)
    return dataclasses.replace(row, nll=means, perplexity=perplexity_of(total))


# -- going on --------------------------------------------------------------------------------------------------------------


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration and of the first elements of every parameter."""
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True, default=str).encode())
    for key, parameter in model.named_parameters():
        digest.update(key.encode() + str(tuple(parameter.shape)).encode())
        digest.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(ids: list[int]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]


def _stored(folder: Path, settings: dict[str, Any]) -> list[Row]:
    """The rows of the sweep in ``folder``, which must have these settings; none if there is no sweep."""
    path = folder / "sweep.json"
    remedy = f"give another --out, or --restart to drop what is in {folder}"
    try:
        stored = json.loads(path.read_text())
        before, rows = stored["settings"], stored["rows"]
        known = {each.name for each in dataclasses.fields(Row)}
        made = [Row(**{key: value for key, value in row.items() if key in known}) for row in rows]
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


def _unplain(row: Row) -> Row:
    return dataclasses.replace(row, perplexity=math.inf) if row.nll and row.perplexity is None else row


# -- showing ---------------------------------------------------------------------------------------------------------------


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
    figures: dict[str, Callable[[Row], float]] = {
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
