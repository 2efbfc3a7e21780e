"""The main job at a glance: what StreamingLLM does to the quality and the speed of a model that meets a long text."""

from __future__ import annotations

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
from patchkit.patches.streaming import StreamingLLM
from patchkit.quality.latency import Stream, cache_bytes, decode_latency, filled_cache, median_ms, paired_ratio, prefilled_cache, twin
from patchkit.quality.perplexity import Bucket, TextError, block_nll, by_position, encode, stream_nll
from patchkit.quality.stdlib_text import read_texts, stdlib_files

SINKS = 4
EDGES = (0, 512, 2048, 8192, 16384)
CONTEXTS = (1024, 8192, 32768)
BLOCK = 512
UNPATCHED = "unpatched"
REFERENCE = f"unpatched, fresh every {BLOCK} tokens"

_CHUNK = 512
# Positions where the ratio to the reference is taken: the window has long been full, an unpatched model has long been lost.
_RATIO_FROM = 2048
_CURVE_BINS = 28

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class Row:
    """One configuration: perplexity by position and, but for the reference, its speed and memory.

    Attributes:
        ms_per_token: context in tokens -> median milliseconds of one decode step.
        cache_bytes: at the longest context.
        speedup: unpatched time over this one's at the longest context, median of paired ratios.
        curve: (position, perplexity) means over ranges that grow geometrically.
    """

    name: str
    buckets: list[Bucket]
    curve: list[tuple[float, float]]
    ms_per_token: dict[int, float] = dataclasses.field(default_factory=dict)
    cache_bytes: int | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Demo:
    """What `run_demo` found.

    Attributes:
        tokens: predictions scored per row.
        files: held-out files that the text was taken from.
        contexts: tokens before the timed steps.
        ratio: perplexity of the first streaming row over the reference's, on the same tokens, with its range of positions.
    """

    tokens: int
    files: int
    contexts: tuple[int, ...]
    rows: list[Row]
    ratio: Bucket | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)

    def ratio_line(self) -> str:
        """The main result in a sentence."""
        if self.ratio is None:
            return f"{self.tokens} tokens are too few to compare with the reference"
        return (
            f"perplexity at positions {_short(self.ratio.start)}-{_short(self.ratio.stop)}, {self._streaming().name} / {REFERENCE}: "
            f"{self.ratio.perplexity:.3f} ± {self.ratio.perplexity * self.ratio.stderr:.3f}"
        )

    def _streaming(self) -> Row:
        return next(row for row in self.rows if row.name not in (UNPATCHED, REFERENCE))


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


def work(tokens: int, windows: Sequence[int]) -> int:
    """How many tokens `run_demo` will report to `advance`, at most."""
    return (2 + len(windows)) * tokens + len(windows) * sum(CONTEXTS)


def run_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int = 16384,
    windows: Sequence[int] = (508, 252, 124),
    advance: Advance = lambda what, count: None,
) -> Demo:
    """Score `tokens` of held-out text unpatched and with `StreamingLLM(4, window)` at each window, then time decoding.

    Every configuration is a view of the same weights; `model` itself stays unpatched.

    Args:
        advance: called with what is being done and a number of tokens done.

    Raises:
        TextError: no text on this machine.
        PatchError: a window that the model cannot use, before any work is done.
    """
    ids, files = heldout_ids(tokenizer, tokens)
    views: dict[str, PreTrainedModel] = {UNPATCHED: model}
    for window in windows:
        views[f"streaming {SINKS}+{window}"] = patch_model(twin(model), StreamingLLM(sinks=SINKS, window=window), verbose=False)

    nll = {name: stream_nll(view, ids, _CHUNK, partial(advance, f"scoring: {name}")) for name, view in views.items()}
    reference = block_nll(model, ids, BLOCK, progress=partial(advance, f"scoring: {REFERENCE}"))
    ms, speedup, size = _time(views, advance)

    rows = [Row(name, by_position(nll[name], EDGES), _curve(nll[name]), ms[name], size[name], speedup[name]) for name in views]
    rows.insert(1, Row(REFERENCE, by_position(reference, EDGES), _curve(reference)))
    ratio = None
    if len(views) > 1:
        difference = nll[list(views)[1]] - reference
        ratio = next(iter(by_position(difference, (_RATIO_FROM, max(EDGES)))), None)
    return Demo(len(reference), files, CONTEXTS, rows, ratio)


def _time(views: dict[str, PreTrainedModel], advance: Advance) -> tuple[dict[str, dict[int, float]], dict[str, float], dict[str, int]]:
    """Milliseconds per token by view and context, and at the longest context the speed-up and the bytes of the cache."""
    streams = {}
    for name, view in views.items():
        for context in CONTEXTS:
            if name == UNPATCHED:
                cache = filled_cache(view, context)
            else:
                cache = prefilled_cache(view, context, _CHUNK, progress=partial(advance, f"streaming to {_short(context)}: {name}"))
            streams[f"{name} at {context}"] = Stream(view, cache)
    # All in turns, over contexts too: whether a curve is flat must not depend on how busy the machine was meanwhile.
    timings = decode_latency(streams)
    longest = max(CONTEXTS)
    ms = {name: {context: median_ms(timings, f"{name} at {context}") for context in CONTEXTS} for name in views}
    speedup = {name: paired_ratio(timings, f"{UNPATCHED} at {longest}", f"{name} at {longest}") for name in views}
    return ms, speedup, {name: cache_bytes(streams[f"{name} at {longest}"].cache) for name in views}


def _curve(nll: torch.Tensor) -> list[tuple[float, float]]:
    first, last = min(32, len(nll)), len(nll)
    edges = sorted({round(first * (last / first) ** (i / _CURVE_BINS)) for i in range(_CURVE_BINS + 1)})
    return [(math.sqrt(b.start * b.stop), b.perplexity) for b in by_position(nll, edges)]


def table(demo: Demo) -> Table:
    """The result for a terminal of 100 columns or more."""
    result = Table(
        title=f"{demo.tokens:,} tokens of {demo.files} held-out standard library files",
        caption="ppl: perplexity over these positions; ms: milliseconds to decode one token at this context",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    longest = _short(max(demo.contexts))
    result.add_column("", min_width=22)
    for heading in (
        *(f"ppl at\n{_short(b.start)}-{_short(b.stop)}" for b in demo.rows[0].buckets),
        *(f"ms at\n{_short(context)}" for context in demo.contexts),
        f"cache\nat {longest}",
        f"speed-up\nat {longest}",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in demo.rows:
        result.add_row(
            row.name,
            *(f"{b.perplexity:.2f}" for b in row.buckets),
            *(f"{row.ms_per_token[c]:.2f}" if c in row.ms_per_token else "" for c in demo.contexts),
            "" if row.cache_bytes is None else f"{row.cache_bytes / 2**20:.1f} MiB",
            "" if row.speedup is None else f"{row.speedup:.1f}x",
        )
    return result


def draw(demo: Demo, path: Path) -> None:
    """Write the two curves as a PNG: perplexity against position, milliseconds per token against context."""
    # Only the demo draws, and matplotlib takes half a second to import.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    for row in demo.rows:
        style: dict[str, Any] = dict(label=row.name, lw=1.8)
        if row.name == REFERENCE:
            style.update(color="0.6", ls="--")
        (line,) = quality.plot(*zip(*row.curve, strict=True), **style)
        if row.ms_per_token:
            speed.plot([*row.ms_per_token], [*row.ms_per_token.values()], marker="o", color=line.get_color(), label=row.name, lw=1.8)
    quality.set(xscale="log", yscale="log", xlabel="position in the text (tokens)", ylabel="perplexity", title="Quality")
    speed.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms per token", title="Time to decode one token")
    quality.set_xticks([64, 512, 2048, 8192, 32768], ["64", "512", "2k", "8k", "32k"])
    quality.set_xlim(demo.rows[0].curve[0][0], demo.tokens)
    speed.set_xticks(demo.contexts, [_short(c) for c in demo.contexts])
    for axes in (quality, speed):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3, lw=0.5)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130, format="png")


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
