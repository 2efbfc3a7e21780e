"""The main job at a glance: what StreamingLLM does to the quality, the speed and the memory of a model that meets a long text."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model
from patchkit.measure.english_text import Source, english_ids
from patchkit.measure.latency import Stream, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache
from patchkit.measure.needle import FORGETS, Answer, Asking, Case, Haystack, answers
from patchkit.measure.perplexity import Bucket, TextError, block_nll, by_position, encode, stream_nll
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.patches.streaming import StreamingLLM
from patchkit.target import Target
from patchkit.views import cache_bytes, twin

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
_BEFORE_KEY = 100

_CHUNK = 512
_CURVE_BINS = 28

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class Plan:
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
        led_up = sum(context - self.tokens if context > self.tokens else context % _CHUNK for context in self.contexts)
        asked = (1 + len(self.windows)) * sum(distance + 2 * _BEFORE_KEY for distance in self.distances)
        return scored + len(self.windows) * led_up + asked


@dataclass(frozen=True)
class Row:
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

    plan: Plan
    tokens: int
    files: int
    sources: list[Source]
    rows: list[Row]
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
            f"perplexity at positions {_range(ratio)}, {row.name} / {self.plan.reference}: "
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

    def _streaming(self) -> Row:
        return next(row for row in self.rows if row.name not in (UNPATCHED, REFERENCE))


def plan_for(model: PreTrainedModel, tokens: int | None = None, windows: Sequence[int] | None = None) -> Plan:
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
        return Plan(
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
    return Plan(
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


def heldout_ids(tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[torch.Tensor, int]:
    """The start of the held-out standard library text as one stream, every file preceded by the boundary token.

    Returns:
        At most tokens + 1 ids [T], and the number of files that they come from.

    Raises:
        TextError: this interpreter ships without its library's sources.
    """
    ids: list[int] = []
    files = 0
    try:
        for text in read_texts(stdlib_files("heldout")):
            ids += encode(tokenizer, text)
            files += 1
            if len(ids) > tokens:
                break
    except FileNotFoundError as error:
        raise TextError(f"{error}: run the demo with a complete Python, or score a file of your own with `patchkit ppl`") from error
    return torch.tensor(ids[: tokens + 1]), files


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int | None = None,
    windows: Sequence[int] | None = None,
    advance: Advance = lambda what, count: None,
) -> Demo:
    """Score text unpatched and with `StreamingLLM(4, window)` at each window, time decoding, and ask for keys, as `plan_for` says.

    Every configuration is a view of the same weights; `model` itself stays unpatched.

    Args:
        advance: called with what is being done and a number of tokens done.

    Raises:
        TextError: no text on this machine, or none of that length.
        PatchError: a window that the model cannot use, before any work is done.
    """
    plan = plan_for(model, tokens, windows)
    views: dict[str, PreTrainedModel] = {UNPATCHED: model}
    for window in plan.windows:
        views[f"streaming {SINKS}+{window}"] = patch_model(twin(model), StreamingLLM(sinks=SINKS, window=window), verbose=False)
    sources: list[Source] = []
    if plan.english:
        ids, sources = english_ids(tokenizer, plan.tokens)
        files = len(sources)
    else:
        ids, files = heldout_ids(tokenizer, plan.tokens)

    nll, caches = {}, {}
    for name, view in views.items():
        keeper = _Keeper(() if name == UNPATCHED else plan.contexts, len(ids) - 1)
        nll[name] = stream_nll(view, ids, _CHUNK, partial(advance, f"scoring: {name}"), keeper)
        caches[name] = keeper.kept
    if plan.block is not None:
        nll[REFERENCE] = block_nll(model, ids, plan.block, progress=partial(advance, f"scoring: {REFERENCE}"))
    ms, speedup, size = _time(views, caches, plan.contexts, advance)
    asking, keys = _ask(views, tokenizer, plan.distances, advance)

    rows = []
    windows_held: list[int | None] = [None, *plan.windows]
    for name, held in zip(views, windows_held, strict=True):
        ratios = [] if name == plan.reference else by_position(nll[name] - nll[plan.reference], plan.compared)
        row = Row(name, by_position(nll[name], plan.edges), _curve(nll[name], plan), ratios, held, ms[name], size[name], speedup[name])
        rows.append(dataclasses.replace(row, keys=keys.get(name, [])))
    if plan.block is not None:
        rows.insert(1, Row(REFERENCE, by_position(nll[REFERENCE], plan.edges), _curve(nll[REFERENCE], plan), []))
    return Demo(plan, len(nll[UNPATCHED]), files, sources, rows, asking)


@dataclass
class _Keeper:
    """Copies the cache of a scored text as late as possible before each context, with the tokens that it has seen."""

    contexts: Sequence[int]
    tokens: int
    kept: dict[int, tuple[int, Any]] = dataclasses.field(default_factory=dict)

    def __call__(self, seen: int, cache: Any) -> None:
        for context in self.contexts:
            if 0 <= context - seen < _CHUNK or context > seen == self.tokens:
                self.kept[context] = seen, copy.deepcopy(cache)


def _time(
    views: dict[str, PreTrainedModel], caches: dict[str, dict[int, tuple[int, Any]]], contexts: Sequence[int], advance: Advance
) -> tuple[dict[str, dict[int, float]], dict[str, float], dict[str, int]]:
    """Milliseconds per token by view and context, and at the longest context the speed-up and the bytes of the cache."""
    streams = {}
    for name, view in views.items():
        for context in contexts:
            if name == UNPATCHED:
                cache = filled_cache(view, context)
            else:
                seen, cache = caches[name].get(context, (0, None))
                tell = partial(advance, f"streaming to {_short(context)}: {name}")
                cache = prefilled_cache(view, context - seen, _CHUNK, cache, tell)
            streams[f"{name} at {context}"] = Stream(view, cache)
    # All in turns, over contexts too: whether a curve is flat must not depend on how busy the machine was meanwhile.
    timings = decode_latency(streams)
    longest = max(contexts)
    ms = {name: {context: median_ms(timings, f"{name} at {context}") for context in contexts} for name in views}
    speedup = {name: paired_ratio(timings, f"{UNPATCHED} at {longest}", f"{name} at {longest}") for name in views}
    return ms, speedup, {name: cache_bytes(streams[f"{name} at {longest}"].cache) for name in views}


def _ask(
    views: dict[str, PreTrainedModel], tokenizer: PreTrainedTokenizerBase, distances: Sequence[int], advance: Advance
) -> tuple[Asking | None, dict[str, list[Answer]]]:
    """How keys were asked for, and what each view answered; nothing without distances."""
    if not distances:
        return None, {}
    asking = Asking.of(tokenizer)
    cases = [Case(len(asking.head) + _BEFORE_KEY + distance, distance, 0) for distance in distances]
    haystack = Haystack.of(asking, cases)
    return asking, {name: answers(view, haystack, cases, partial(advance, f"asking for keys: {name}")) for name, view in views.items()}


def _curve(nll: torch.Tensor, plan: Plan) -> list[tuple[float, float]]:
    if plan.english:
        edges = [round(len(nll) * i / _CURVE_BINS) for i in range(_CURVE_BINS + 1)]
        return [((b.start + b.stop) / 2, b.perplexity) for b in by_position(nll, sorted(set(edges)))]
    first, last = min(32, len(nll)), len(nll)
    edges = sorted({round(first * (last / first) ** (i / _CURVE_BINS)) for i in range(_CURVE_BINS + 1)})
    return [(math.sqrt(b.start * b.stop), b.perplexity) for b in by_position(nll, edges)]


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
    longest = _short(max(plan.contexts))
    result.add_column("", min_width=22)
    for heading in (
        *(f"ppl at\n{_range(b)}{_mark(plan, b)}" for b in demo.rows[0].buckets),
        *(f"ms at\n{_short(context)}" for context in plan.contexts),
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
        quality.set_xticks(plan.contexts, [_short(c) for c in plan.contexts])
        quality.set_xlim(0, demo.tokens)
    else:
        quality.set_xscale("log")
        quality.set_xticks([64, 512, 2048, 8192, 32768], ["64", "512", "2k", "8k", "32k"])
        quality.set_xlim(demo.rows[0].curve[0][0], demo.tokens)
    speed.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms per token", title="Time to decode one token")
    speed.set_xticks(plan.contexts, [_short(c) for c in plan.contexts])
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


def _mark(plan: Plan, bucket: Bucket) -> str:
    return "*" if plan.limit is not None and bucket.start >= plan.limit else ""


def _range(bucket: Bucket) -> str:
    return f"{_short(bucket.start)}-{_short(bucket.stop)}"


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
