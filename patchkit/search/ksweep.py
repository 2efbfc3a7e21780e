"""Which K is best for a draft on a model and a machine: every K on the same prompts, in turns with plain decoding."""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model
from patchkit.errors import PatchError
from patchkit.measure.environment import environment
from patchkit.measure.perplexity import TextError, encode
from patchkit.measure.prompts import read_prompts
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.patches.speculative import Speculative
from patchkit.speculation.shared import reset_statistics, statistics_of
from patchkit.speculation.statistics import RunStatistics
from patchkit.views import twin

FILES = ("ksweep.csv", "ksweep.json", "throughput.png", "acceptance.png")

_WARM_UP_TOKENS = 16

Advance = Callable[[str, int], object]


@dataclass(frozen=True)
class TimedCall:
    """One call of generate. `k` is None for plain decoding, by the unpatched model; `identical` says that its text was the same."""

    k: int | None
    prompt: int
    iteration: int
    tokens: int
    seconds: float
    identical: bool

    @property
    def tokens_per_s(self) -> float:
        """New tokens per second, prompt included in the time."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class DraftLengthResult:
    """All runs of one K.

    Attributes:
        tokens_per_s, tokens_per_s_std: over iterations, each with all prompts.
        speedup, speedup_std: plain time over this one's, the median of all prompts; over iterations.
            Of a single iteration no standard deviation is known, and it is None.
        identical, runs: runs whose text is that of plain decoding, and all.
        statistics: of the rounds; None for plain decoding.
    """

    k: int | None
    tokens_per_s: float
    tokens_per_s_std: float | None
    speedup: float
    speedup_std: float | None
    identical: int
    runs: int
    statistics: RunStatistics | None

    @property
    def name(self) -> str:
        """The K, or "plain"."""
        return "plain" if self.k is None else str(self.k)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the summary of the statistics."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return plain | {"statistics": None if self.statistics is None else self.statistics.summary()}


@dataclass(frozen=True)
class KSweep:
    """What `run_ksweep` found; the first row is plain decoding."""

    draft: str
    new_tokens: int
    rows: list[DraftLengthResult]
    runs: list[TimedCall]

    @property
    def identical(self) -> bool:
        """Whether every text of every K is that of plain decoding."""
        return all(run.identical for run in self.runs)

    @property
    def best(self) -> DraftLengthResult:
        """The fastest row."""
        return max(self.rows, key=lambda row: row.tokens_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON, with the machine."""
        return {
            "draft": self.draft,
            "new_tokens": self.new_tokens,
            "identical": self.identical,
            "best_k": self.best.k or 0,
            "rows": [row.to_dict() for row in self.rows],
            "environment": environment(),
        }

    def write(self, folder: Path) -> None:
        """Write the four files `FILES`: a line per run, all figures with the machine, and the two pictures."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / FILES[0]).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in dataclasses.fields(TimedCall)] + ["tokens_per_s"])
            for run in self.runs:
                values = dataclasses.asdict(run) | {"k": "plain" if run.k is None else run.k}
                writer.writerow([*values.values(), run.tokens_per_s])
        (folder / FILES[1]).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        draw_throughput(self, folder / FILES[2])
        draw_acceptance(self, folder / FILES[3])


def load_prompts(source: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[torch.Tensor]:
    """Prompts as ids [1, T].

    Args:
        source: "stdlib": the first `length` tokens of `count` held-out standard library files, spread over all; or a UTF-8 file, of which
            every line that is not blank is a prompt (a `.json` file: a list of texts), the first `count` of them.

    Raises:
        TextError: no such text, or none in it.
    """
    if source == "stdlib":
        try:
            files = stdlib_files("heldout")
        except FileNotFoundError as error:
            raise TextError(f"{error}: give a file of your own with --prompts") from error
        texts = [ids[:length] for ids in (encode(tokenizer, text) for text in read_texts(files)) if len(ids) >= 2 * length]
        texts = [texts[index * len(texts) // count] for index in range(min(count, len(texts)))]
    else:
        texts = [encode(tokenizer, text) for text in read_prompts(Path(source))[:count]]
    if not texts:
        raise TextError(f"{source} has no prompt of {length} tokens: give a smaller --prompt-tokens, or a file with --prompts")
    return [torch.tensor([ids]) for ids in texts]


def work(ks: Sequence[int], prompts: int, iterations: int) -> int:
    """How many runs `run_ksweep` will report to `advance`."""
    return (1 + len(ks)) * (prompts * iterations + 1)


def run_ksweep(
    model: PreTrainedModel,
    draft: Any,
    ks: Sequence[int],
    prompts: Sequence[torch.Tensor],
    new_tokens: int = 128,
    iterations: int = 3,
    trace: Path | None = None,
    advance: Advance = lambda what, count: None,
) -> KSweep:
    """Greedy generation with every K and without, prompt by prompt in turns, so that all meet the same moods of the machine.

    Every configuration is a view of the same weights; `model` itself stays unpatched.

    Args:
        draft: what `Speculative` takes.
        prompts: ids [1, T] each.
        trace: where to write a Chrome trace, by PyTorch's profiler, of one more run of the fastest K.
        advance: called with what is being done and a number of runs done.

    Raises:
        PatchError: a draft that does not fit the model.
        ValueError: no K, a K below 0 or twice, no prompt, or nothing to generate.
    """
    if not ks or len(set(ks)) != len(ks):
        raise ValueError(f"ks is {list(ks)}: give every K once, such as 0,1,2,4,8")
    for name, value in (("prompts", len(prompts)), ("new_tokens", new_tokens), ("iterations", iterations)):
        if value < 1:
            raise ValueError(f"{name} is {value}: give at least 1")
    patches = {k: Speculative(draft=draft, k=k) for k in ks}
    views: dict[int | None, PreTrainedModel] = {None: model}
    for k, patch in patches.items():
        views[k] = patch_model(twin(model), patch, verbose=False)
    for key, view in views.items():
        advance("warming up", 1)
        _generate(view, prompts[0], min(new_tokens, _WARM_UP_TOKENS))
        if key is not None:
            reset_statistics(view)

    runs: list[TimedCall] = []
    order = list(views)
    for iteration in range(iterations):
        for index, prompt in enumerate(prompts):
            found: dict[int | None, tuple[torch.Tensor, float]] = {}
            for key in order:
                advance("plain" if key is None else f"K = {key}", 1)
                found[key] = _generate(views[key], prompt, new_tokens)
            order.append(order.pop(0))  # none always follows the same one
            plain, _ = found[None]
            for key in views:
                text, seconds = found[key]
                runs.append(TimedCall(key, index, iteration, text.numel(), seconds, torch.equal(text, plain)))
    figures = {k: statistics_of(views[k]) for k in ks}
    plain_ms = figures[0].plain_ms if 0 in figures else None
    if plain_ms is not None:
        for each in figures.values():
            each.plain_ms_by_rows = {1: plain_ms}
    rows = [_row(None, runs, None), *(_row(k, runs, figures[k]) for k in ks)]
    result = KSweep(figures[ks[0]].drafter, new_tokens, rows, runs)
    if trace is not None:
        _write_trace(views[max(result.rows[1:], key=lambda row: row.tokens_per_s).k], prompts[0], new_tokens, trace)
    return result


def _generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float]:
    """The new tokens [n] on the CPU, and the seconds that they took."""
    ids = prompt.to(model.device)
    pad: Any = model.generation_config.pad_token_id
    started = time.perf_counter()
    output: Any = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0 if pad is None else pad,
    )
    text = output[0, ids.shape[1] :].cpu()  # waits for the device
    return text, time.perf_counter() - started


def _row(k: int | None, runs: Sequence[TimedCall], figures: RunStatistics | None) -> DraftLengthResult:
    plain = {(run.prompt, run.iteration): run for run in runs if run.k is None}
    own = [run for run in runs if run.k == k]
    throughputs, speedups = [], []
    for iteration in sorted({run.iteration for run in own}):
        part = [run for run in own if run.iteration == iteration]
        throughputs.append(sum(run.tokens for run in part) / sum(run.seconds for run in part))
        speedups.append(statistics.median(plain[run.prompt, iteration].seconds / run.seconds for run in part))
    return DraftLengthResult(
        k,
        statistics.fmean(throughputs),
        statistics.stdev(throughputs) if len(throughputs) > 1 else None,
        statistics.fmean(speedups),
        statistics.stdev(speedups) if len(speedups) > 1 else None,
        sum(run.identical for run in own),
        len(own),
        figures,
    )


def _write_trace(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, path: Path) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        _generate(model, prompt, new_tokens)
    try:
        profiler.export_chrome_trace(str(path))
    except (OSError, RuntimeError) as error:
        raise PatchError(f"the trace {path} cannot be written ({error}): give another --trace") from error


def table(sweep: KSweep) -> Table:
    """The result for a terminal."""
    result = Table(title=f"{sweep.draft}, {sweep.new_tokens} new tokens", title_justify="left")
    for heading in ("K", "tokens/s", "speed-up", "predicted", "accepted", "tokens/step", "identical"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in sweep.rows:
        figures = row.statistics or RunStatistics()
        result.add_row(
            row.name,
            f"{row.tokens_per_s:.1f}{_figure(row.tokens_per_s_std, ' ± {:.1f}')}",
            f"{row.speedup:.2f}{_figure(row.speedup_std, ' ± {:.2f}')}",
            _figure(figures.predicted_speedup, "{:.2f}"),
            _figure(figures.acceptance_rate, "{:.0%}"),
            _figure(figures.tokens_per_target_step, "{:.2f}"),
            f"{row.identical}/{row.runs}",
        )
    return result


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


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
