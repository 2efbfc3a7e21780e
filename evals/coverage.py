# ruff: noqa: E402  (the environment and the path are set before transformers and the modules of tests/ are imported)
"""Which causal-LM types of transformers stream exactly: writes docs/coverage.md.

    python evals/coverage.py                      # every type, writes docs/coverage.md
    python evals/coverage.py llama gemma2         # these types, prints the table only
    python evals/coverage.py --oracle-only        # no patch: the oracle against the plain forward, prints only

Every type is built tiny with random weights, patched with streaming, run in five modes over 24 tokens, unpatched, and compared
with the brute-force oracle of tests/oracle.py. Verdicts:

exact          every mode agrees with the oracle; a mode that is broken in the unpatched model too is named, not counted
refused        the patch refused, with a reason, and left the model unchanged
stock broken   no mode agrees, and the unpatched model does not agree with itself in these modes either
wrong          anything else that ran: another result, or traces left on the model
crashed        an exception that is no refusal, or more than the time limit
not built      the unpatched model cannot be built or run in this environment

Exit status 1 if any type is wrong or crashed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import platform
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# Before transformers is imported: nothing may be downloaded, and the types are compared on equal terms.
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
import transformers
from oracle import OracleUnsupported, oracle_logits
from tiny_configs import model_types, tiny_model

from patchkit import Patch, PatchError, StreamingLLM, _compat, patch_model, report, unpatch_model
from patchkit.definitions import NoDefinition
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot

SINKS, WINDOW, LENGTH, CHUNK, PROMPT = 2, 6, 24, 5, 5
# ids outside of this range are special tokens of some type
LOW, HIGH = 3, 99
STREAMING = StreamingLLM(sinks=SINKS, window=WINDOW)
TOLERANCE = TOLERANCES[torch.float32]
VERDICTS = ("exact", "refused", "stock broken", "not built", "wrong", "crashed")
FAILURES = ("wrong", "crashed")
WAYS = ("step by step", f"chunks of {CHUNK}", "whole", "whole, no cache", "generate")


class TimedOut(BaseException):
    """The time limit of one type; derived from BaseException, so that no library handler swallows it."""


@dataclasses.dataclass
class Row:
    """One line of the table."""

    model_type: str
    verdict: str
    error: float | None = None
    note: str = ""


def build(model_type: str) -> Any:
    """Tiny model without a forced last token, which would be outside the ids that the oracle covers."""
    model = tiny_model(model_type)
    if model.generation_config is not None:
        model.generation_config.forced_eos_token_id = None
    return model


def text(length: int = LENGTH) -> torch.Tensor:
    """Random token ids [1, length] without special tokens, always the same."""
    return torch.randint(LOW, HIGH + 1, (1, length), generator=torch.Generator().manual_seed(0))


def in_chunks(model: Any, ids: torch.Tensor, size: int) -> torch.Tensor:
    """Logits [1, T, V] of one sequence that is fed ``size`` tokens at a time."""
    cache, rows = None, []
    for start in range(0, ids.shape[1], size):
        out = model(input_ids=ids[:, start : start + size], use_cache=True, **({} if cache is None else cache))
        name = next((n for n in (_compat.CACHE, "cache_params") if getattr(out, n, None) is not None), None)
        if name is None:
            raise LookupError("forward(use_cache=True) returns no cache")
        cache = {name: getattr(out, name)}
        rows.append(out.logits)
    return torch.cat(rows, dim=1)


def generated(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [1, LENGTH] after the first PROMPT tokens of ``ids``, and the logits [1, LENGTH - PROMPT, V] that chose them."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    count = LENGTH - PROMPT
    out = model.generate(
        ids[:, :PROMPT],
        attention_mask=torch.ones_like(ids[:, :PROMPT]),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        min_new_tokens=count,
        max_new_tokens=count,
        pad_token_id=0,
        suppress_tokens=[i for i in range(vocabulary) if not LOW <= i <= HIGH],
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@dataclasses.dataclass
class Runs:
    """Logits of a model in every mode, or the exception of a mode that failed.

    Attributes:
        written: the tokens that generate returned.
        replayed: logits of those tokens, fed one by one to the same model.
    """

    logits: dict[str, torch.Tensor | Exception]
    written: torch.Tensor | None = None
    replayed: torch.Tensor | None = None


def run_all(model: Any, ids: torch.Tensor) -> Runs:
    """Run all modes on the model in its present state."""
    runs = Runs({})

    def generate() -> torch.Tensor:
        runs.written, chosen = generated(model, ids)
        runs.replayed = in_chunks(model, runs.written, 1)[:, PROMPT - 1 : -1]
        return chosen

    ways: list[Callable[[], torch.Tensor]] = [
        lambda: in_chunks(model, ids, 1),
        lambda: in_chunks(model, ids, CHUNK),
        lambda: model(input_ids=ids, use_cache=True).logits,
        lambda: model(input_ids=ids, use_cache=False).logits,
        generate,
    ]
    for way, run in zip(WAYS, ways, strict=True):
        try:
            runs.logits[way] = run()
        except Exception as error:  # a failing mode is a result of this survey, not its end
            runs.logits[way] = error
    return runs


def errors_of(runs: Runs, expected: torch.Tensor, continued: torch.Tensor | None) -> dict[str, float]:
    """Error of every mode, infinite where it failed; ``continued`` are the logits expected of generate."""
    errors = {}
    for way, found in runs.logits.items():
        reference = continued if way == "generate" else expected
        errors[way] = float("inf") if isinstance(found, Exception) or reference is None else logit_error(found, reference)
    return errors


def stock_errors(model: Any, ids: torch.Tensor) -> dict[str, float]:
    """Error of every mode of the unpatched model, relative to its own plain forward."""
    plain = model(input_ids=ids, use_cache=False).logits
    runs = run_all(model, ids)
    continued = None if runs.written is None else model(input_ids=runs.written, use_cache=False).logits[:, PROMPT - 1 : -1]
    errors = errors_of(runs, plain, continued)
    # without a cache only prefixes can be compared: later tokens must not change them
    errors["whole, no cache"] = max(
        logit_error(model(input_ids=ids[:, :end], use_cache=False).logits, plain[:, :end]) for end in (1, CHUNK, SINKS + WINDOW, LENGTH - 1)
    )
    return errors


# Logits [1, T, V] of an unpatched model under a patch, for (model, ids), by definition.
Oracle = Callable[[Any, torch.Tensor], torch.Tensor]


def streamed(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Logits of ids [1, T] under `streaming`, by the oracle."""
    return oracle_logits(model, ids, SINKS, WINDOW)


def check_type(model_type: str, patch: Patch = STREAMING, oracle: Oracle = streamed) -> Row:
    """Verdict on one type: build, patch, run, unpatch, compare."""
    ids = text()
    try:
        model = build(model_type)
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception as error:  # the reason is the note of its row
        return Row(model_type, "not built", note=short(error))
    before = snapshot(model)
    try:
        patch_model(model, patch, verbose=False)
    except PatchError as refusal:
        return untouched(before, model, Row(model_type, "refused", note=short(refusal, name=False)))
    with torch.no_grad():
        runs = run_all(model, ids)
        done = report(model).patches[0]
        unpatch_model(model)
        row = untouched(before, model, compare(model_type, model, ids, runs, patch, oracle))
    if row.verdict == "exact":
        changed = ", ".join(f"{count} {what}" for what, count in done.changed.items())
        left = "; ".join(f"{what}: {why}" for what, why in done.left_alone.items())
        row.note = "; ".join(part for part in (changed, left, row.note) if part)
    return row


def untouched(before: Any, model: Any, row: Row) -> Row:
    """Return ``row``, or the verdict "wrong" if the patch left a trace."""
    try:
        assert_restored(before, model)
    except AssertionError as error:
        return Row(row.model_type, "wrong", row.error, short(error, name=False))
    return row


def compare(model_type: str, model: Any, ids: torch.Tensor, runs: Runs, patch: Any, oracle: Oracle) -> Row:
    """Verdict on ``runs`` of the patched model; ``model`` is unpatched again."""
    notes: list[str] = []
    continued: torch.Tensor | None
    try:
        expected = oracle(model, ids)
        continued = None if runs.written is None else oracle(model, runs.written)[:, PROMPT - 1 : -1]
        if logit_error(expected, model(input_ids=ids, use_cache=False).logits) < TOLERANCE.differs:
            notes.append(f"{patch.name} changes nothing on this model")
    except (OracleUnsupported, NoDefinition) as error:
        # weaker: the stock model as long as nothing is evicted, and then the modes against each other
        notes.append(f"no oracle ({error}); weaker check: the text that fits equals stock, and the ways agree")
        fitting = in_chunks(model, ids[:, : patch.sinks + patch.window], 1)
        steps = runs.logits["step by step"]
        expected = fitting if isinstance(steps, Exception) else torch.cat([fitting, steps[:, fitting.shape[1] :]], dim=1)
        continued = runs.replayed
    errors = errors_of(runs, expected, continued)
    failed = [way for way, error in errors.items() if not error < TOLERANCE.logits]
    if not failed:
        return Row(model_type, "exact", max(errors.values()), "; ".join(notes))
    stock = stock_errors(model, ids)
    if continued is runs.replayed:
        # without an oracle the steps are the reference, and no better than those of the stock model
        stock = {way: max(error, stock["step by step"]) for way, error in stock.items()}
    unexcused = [way for way in failed if stock[way] < TOLERANCE.logits]
    if unexcused:
        raised = [(way, found) for way in unexcused if isinstance(found := runs.logits[way], Exception)]
        notes = [f"{way}: {where(found)}" for way, found in raised[:1]] or [f"{way} {errors[way]:.1e}" for way in unexcused] + notes
        return Row(model_type, "crashed" if raised else "wrong", max(errors.values()), "; ".join(notes))
    notes.append("stock parity broken: " + ", ".join(f"{way} (stock {stock[way]:.1e}, patched {errors[way]:.1e})" for way in failed))
    sound = [error for way, error in errors.items() if way not in failed]
    return Row(model_type, "exact" if sound else "stock broken", max(sound or errors.values()), "; ".join(notes))


def check_oracle(model_type: str) -> Row:
    """Verdict on the oracle alone: tokens that fill the cache and evict nothing must give the plain forward."""
    ids = text()
    try:
        model = build(model_type)
        with torch.no_grad():
            plain = model(input_ids=ids, use_cache=False).logits
    except Exception as error:  # as in check_type
        return Row(model_type, "not built", note=short(error))
    try:
        found = streamed(model, ids)
    except OracleUnsupported as error:
        return Row(model_type, "refused", note=str(error))
    with torch.no_grad():
        error = logit_error(found[:, : SINKS + WINDOW], model(input_ids=ids[:, : SINKS + WINDOW], use_cache=False).logits)
    verdict = "exact" if error < TOLERANCE.logits else "wrong"
    return Row(model_type, verdict, error, f"differs from stock by {logit_error(found, plain):.1e}")


def limited(check: Callable[[str], Row], model_type: str, seconds: int) -> Row:
    """Row of ``check(model_type)`` within ``seconds`` of processor time; an exception that escapes is a crash."""

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimedOut

    # processor time does not depend on other work on the machine; wall time stops a check that waits for ever
    previous = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(10 * seconds)
    try:
        row = check(model_type)
    except TimedOut:
        row = Row(model_type, "crashed", note=f"not done after {seconds} s of processor time")
    except Exception as error:  # the survey goes on; the row and the exit status tell
        row = Row(model_type, "crashed", note=where(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        gc.collect()
    return row


def short(error: BaseException, name: bool = True, limit: int = 300) -> str:
    """Exception as one line for a table cell."""
    line = " ".join(str(error).split()).replace("|", "/").replace(str(ROOT), ".")
    line = f"{type(error).__name__}: {line}" if name else line
    return line if len(line) <= limit else line[: limit - 1] + "…"


def where(error: BaseException) -> str:
    """Exception as one line, with the file and line that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{short(error)} ({Path(last.filename).name}:{last.lineno})"


def document(rows: list[Row], seconds: float) -> str:
    """Content of docs/coverage.md."""
    count = Counter(row.verdict for row in rows)
    meanings = {
        "exact": "every way that is sound in the unpatched model agrees with the oracle",
        "refused": "the patch refuses, with the reason below, and leaves the model as it was",
        "stock broken": "the unpatched model does not agree with itself in these ways",
        "not built": "the unpatched model cannot be built or run tiny in this environment",
        "wrong": "another answer than the oracle",
        "crashed": "an exception that is no refusal, or out of time",
    }
    lines = [
        "# Coverage of StreamingLLM",
        "",
        f"`make coverage` writes this page. Every causal-LM type of transformers is built tiny with random weights, patched with "
        f"`streaming(sinks={SINKS}, window={WINDOW})`, and run over {LENGTH} tokens: {', '.join(WAYS)}. Each way must agree with the "
        f"brute-force oracle of `tests/oracle.py` within {TOLERANCE.logits:g} in the logits (relative to a tenth of the largest logit "
        f"where that exceeds 10), and unpatching must leave no trace. A way in which the unpatched model does not agree with itself "
        f"is not counted; the row names it with both errors (stock parity broken).",
        "",
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.system()} {platform.machine()}, CPU, fp32, 1 thread, {seconds:.0f} s.",
        "",
        "| verdict | types | meaning |",
        "|---|---:|---|",
        *(f"| {verdict} | {count[verdict]} | {meanings[verdict]} |" for verdict in VERDICTS),
        f"| all | {len(rows)} | |",
        "",
        table(rows),
    ]
    return "\n".join(lines) + "\n"


def table(rows: list[Row]) -> str:
    """Markdown table with one row per type, failures first."""
    lines = ["| type | verdict | max error | what was patched, or the reason |", "|---|---|---:|---|"]
    for row in sorted(rows, key=lambda row: (row.verdict not in FAILURES, row.model_type)):
        error = "" if row.error is None else f"{row.error:.1e}"
        lines.append(f"| {row.model_type} | {row.verdict} | {error} | {row.note} |")
    return "\n".join(lines)


def main() -> int:
    """Run the survey; the exit status is 1 if any type is wrong or crashed."""
    parser = argparse.ArgumentParser(description="Which causal-LM types of transformers stream exactly.")
    parser.add_argument("types", nargs="*", help="model types; all of them, and docs/coverage.md is written, if none is given")
    parser.add_argument("--oracle-only", action="store_true", help="patch nothing: check the oracle against the plain forward")
    parser.add_argument("--seconds", type=int, default=60, help="processor time per type (default 60)")
    options = parser.parse_args()
    unknown = sorted(set(options.types) - set(model_types()))
    if unknown:
        parser.error(f"unknown types {', '.join(unknown)}: python -c 'import tiny_configs; print(tiny_configs.model_types())' lists them")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    chosen = options.types or model_types()
    rows: list[Row] = []
    started = time.perf_counter()
    for number, model_type in enumerate(chosen, 1):
        begun = time.perf_counter()
        row = limited(check_oracle if options.oracle_only else check_type, model_type, options.seconds)
        rows.append(row)
        error = "" if row.error is None else f" {row.error:.1e}"
        took = time.perf_counter() - begun
        print(f"[{number:3}/{len(chosen)}] {model_type}: {row.verdict}{error} ({took:.1f} s) {row.note[:160]}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    if options.types or options.oracle_only:
        print(table(rows))
    else:
        path = ROOT / "docs" / "coverage.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(document(rows, seconds), encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}", file=sys.stderr)
    count = Counter(row.verdict for row in rows)
    print(", ".join(f"{verdict} {count[verdict]}" for verdict in VERDICTS if count[verdict]) + f" of {len(rows)}", file=sys.stderr)
    return 1 if any(count[verdict] for verdict in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
