"""smollm2 decoded by others and by patchkit, on one machine, in one run: `make peers`.

    python evals/peers/run.py                              # writes evals/results/peers/peers.json and table.md
    python evals/peers/run.py --families patchkit --rounds 1

Each family of peers runs in its own process and environment (`.venv-peers/<family>`, pinned in requirements/), with two threads. Every way
answers the same prompts greedily through the chat template; within a round all ways answer a prompt in turns before the next comes, and a
ratio is the median over prompts and rounds of transformers' plain decoding in the same turn over this. A way that cannot run is a row with
the reason.

Two figures go with the times: the bytes of weights, keys and values that a token reads (weights as they are stored; with drafts, passes per
token times a pass, and what the drafter reads), and these bytes per second over the bytes per second that a copy moves on this machine.
Before the first run heads for `speculative` are trained (20 minutes) and `patchkit tune` looks for a spec (8 minutes).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

from answers import prompt_ids  # noqa: E402
from peer import Answer, Made  # noqa: E402
from prompts import EDITS, STORIES, WARM_UP  # noqa: E402
from rich.console import Console  # noqa: E402
from transformers import AutoTokenizer, GenerationConfig  # noqa: E402

from patchkit.measure.english_text import english_documents, english_ids  # noqa: E402
from patchkit.measure.environment import environment  # noqa: E402
from patchkit.measure.paired import median_ratio  # noqa: E402
from patchkit.models import bundled_path, smollm2_gguf  # noqa: E402

VENVS = ROOT / ".venv-peers"
# What is named in the table's environment, by family.
FAMILIES = {
    "llama_cpp": ("llama_cpp_python",),
    "transformers": ("torch", "transformers", "torchao"),
    "economize": ("torch", "transformers", "economize"),
    "kvpress": ("torch", "transformers", "kvpress"),
    "patchkit": ("torch", "transformers", "patchkit"),
}
REFERENCE = ("transformers", "plain")
# The number of stories and of edits of evals/prompts.py; then a text that is longer than every window.
PROMPTS, NEW_TOKENS = 2, 48
LONG, AFTER_LONG = 2048, 32
CACHED = (1000, 8000)
HEADS_MINUTES, TUNE_MINUTES, TUNE_INCREASE = 20, 8, "1%"


class Failed(Exception):
    """A way cannot do what it was asked, for the reason that the text gives."""


class Family:
    """The process of one family of peers; started again, without the way at fault, when it dies."""

    def __init__(self, name: str, python: Path, made: Made) -> None:
        self.name, self.python, self.made = name, python, made
        self.process: subprocess.Popen[str] | None = None
        self.ways: list[str] = []
        self.alive: set[str] = set()
        self.start()

    def start(self) -> None:
        fields = {name: value if name == "ends" else str(value) for name, value in dataclasses.asdict(self.made).items()}
        self.process = subprocess.Popen(
            [str(self.python), str(HERE / "worker.py"), self.name, json.dumps(fields)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # What libraries print is kept, to find the reason of a crash in.
            stderr=(self.made.folder / f"{self.name}.log").open("a"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "TOKENIZERS_PARALLELISM": "false"},
        )
        self.ways = self._reply()["ways"]

    def ask(self, way: str | None = None, **request: Any) -> Any:
        """A reply of the process. The way at fault is not asked again if the process died of it; the others are made anew.

        Raises:
            Failed: the library raised something, or the process died.
        """
        if way is not None and "make" not in request and way not in self.alive:
            raise Failed("the process died of it before")
        assert self.process is not None and self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        try:
            reply = self._reply()
        except Failed:
            self.alive.discard(way or "")
            self.start()
            for other in self.alive:
                self.ask(make=other)
            raise
        if "error" in reply:
            raise Failed(reply["error"])
        if way is not None:
            self.alive.add(way)
        return reply["reply"]

    def _reply(self) -> Any:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"its process ended with status {self.process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Row:
    """What was measured of one way, and what cannot be."""

    family: str
    way: str
    facts: dict[str, Any] = field(default_factory=dict)
    first_answer_seconds: float | None = None
    answers: dict[str, list[Answer]] = field(default_factory=dict)
    cache_bytes: dict[str, int | None] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Prompt:
    name: str
    ids: list[int]
    new_tokens: int


def made_in(folder: Path) -> Made:
    """The files that the families read; nothing is measured before they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    model = bundled_path("smollm2")
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    return Made(
        model=model,
        gguf=smollm2_gguf(),
        draft=bundled_path("stdlib-1m-draft"),
        folder=folder,
        heads=folder / "eagle.safetensors",
        spec=folder / "tuned.spec",
        ends=tuple(ends if isinstance(ends, list) else [ends]),
    )


def prepare(made: Made, tell: Callable[[str], object]) -> None:
    """Train heads and look for the best spec, unless an earlier run has done so."""
    text = made.folder / "english.txt"
    if not text.exists():
        text.write_text("\n\n".join(paragraph for _, found in english_documents() for paragraph in found))
    command = [str(Path(sys.executable).parent / "patchkit")]
    if not made.heads.exists():
        tell(f"training heads for {HEADS_MINUTES} minutes")
        options = ["--text", str(text), "--batch", "4", "--minutes", str(HEADS_MINUTES), "--out", str(made.heads)]
        subprocess.run([*command, "train-heads", "smollm2", *options, "--checkpoint", str(made.heads.with_suffix(".ckpt"))], check=True)
    if not made.spec.exists():
        tell(f"looking for the best spec for {TUNE_MINUTES} minutes")
        options = ["--text", str(text), "--max-ppl-increase", TUNE_INCREASE, "--minutes", str(TUNE_MINUTES), "--out", str(made.spec)]
        subprocess.run([*command, "tune", "smollm2", *options], check=True)


def prompts_of(tokenizer: Any) -> list[Prompt]:
    """Stories and edits in turns, then a long text."""
    groups = {"story": STORIES[:PROMPTS], "edit": EDITS[:PROMPTS]}
    short = [
        Prompt(f"{group} {index + 1}", prompt_ids(tokenizer, groups[group][index])[0].tolist(), NEW_TOKENS)
        for index in range(PROMPTS)
        for group in groups
    ]
    return [*short, Prompt("long", english_ids(tokenizer, LONG)[0].tolist(), AFTER_LONG)]


def rows_of(
    families: Sequence[Family], warm_up: Sequence[list[int]], tell: Callable[[str], object], only: str = ""
) -> Iterator[tuple[Family, Row]]:
    """Every way, made, and warm where it can be: a short prompt and a long one are answered first, of which each may be compiled for.

    All ways of a family are made before the first of them is warmed: to patch a model makes torch forget all code that it has compiled.
    """
    for family in families:
        rows = [Row(family.name, way) for way in family.ways if re.search(only, f"{family.name} {way}") or (family.name, way) == REFERENCE]
        for row in rows:
            try:
                row.facts = family.ask(row.way, make=row.way)
            except Failed as failed:
                row.reasons.append(str(failed))
        for row in rows:
            way = row.way
            try:
                started = time.perf_counter()
                if not row.reasons:
                    family.ask(way, answer=way, prompt=warm_up[0], new_tokens=16)
                row.first_answer_seconds = None if row.reasons else time.perf_counter() - started
                for prompt in warm_up[1:] if not row.reasons else []:
                    family.ask(way, answer=way, prompt=prompt, new_tokens=4)
            except Failed as failed:
                row.reasons.append(str(failed))
            tell(f"{family.name} {way}: {'; '.join(row.reasons) or f'first answer after {row.first_answer_seconds:.1f} s'}")
            yield family, row


def measure(rows: Sequence[tuple[Family | None, Row]], prompts: Sequence[Prompt], first: int) -> None:
    """One round: each prompt is answered by all ways in turns, `first` says which begins."""
    for index, prompt in enumerate(prompts):
        able = [(family, row) for family, row in rows if family is not None and not row.reasons]
        turn = (first + index) % max(1, len(able))
        for family, row in able[turn:] + able[:turn]:
            try:
                found = family.ask(row.way, answer=row.way, prompt=prompt.ids, new_tokens=prompt.new_tokens)
                row.answers.setdefault(prompt.name, []).append(Answer(**found))
            except Failed as failed:
                row.reasons.append(f"{prompt.name}: {failed}")


def measure_caches(rows: Sequence[tuple[Family | None, Row]], text: list[int], tell: Callable[[str], object]) -> None:
    for family, row in rows:
        for tokens in CACHED:
            if family is None or row.reasons:
                continue
            try:
                row.cache_bytes[str(tokens)] = family.ask(row.way, cache=row.way, prompt=text[:tokens])
            except Failed as failed:
                row.cache_bytes[str(tokens)] = None
                row.reasons.append(f"cache at {tokens} tokens: {failed}")
            tell(f"{family.name} {row.way}: cache after {tokens} tokens {row.cache_bytes[str(tokens)]}")


def figures(row: Row, reference: Row, prompts: Sequence[Prompt], bandwidth: float) -> dict[str, Any]:
    """The table's figures of one way; None where there is nothing to compute one from."""
    short = [prompt for prompt in prompts if prompt.name != "long"]

    def per_token(answers: Sequence[Answer]) -> list[float]:
        return [answer.decode_ms / answer.decoded for answer in answers if answer.decoded]

    def median(values: Sequence[float]) -> float | None:
        return statistics.median(values) if values else None

    found: dict[str, Any] = {}
    for group in ("story", "edit", "long"):
        names = [prompt.name for prompt in prompts if prompt.name.startswith(group)]
        pairs = [pair for name in names for pair in zip(reference.answers.get(name, []), row.answers.get(name, []), strict=False)]
        timed = [(ours, theirs) for ours, theirs in pairs if ours.decoded and theirs.decoded]
        found[group] = {
            "ms_per_token": median(per_token([theirs for _, theirs in timed])),
            "plain_over_this": dataclasses.asdict(median_ratio(per_token([a for a, _ in timed]), per_token([b for _, b in timed])))
            if timed
            else None,
            "prefill_ms": median([theirs.prefill_ms for _, theirs in pairs]),
        }
    decoded = [(prompt, answer) for prompt in short for answer in row.answers.get(prompt.name, []) if answer.decoded]
    if decoded:
        tokens, ms = sum(answer.decoded for _, answer in decoded), sum(answer.decode_ms for _, answer in decoded)
        read = sum(bytes_read(row.facts, prompt, answer) for prompt, answer in decoded)
        found |= {
            "bytes_per_token": read / tokens,
            "passes_per_token": sum(answer.forwards for _, answer in decoded) / tokens,
            "share_of_copy_bandwidth": read / (ms / 1000) / bandwidth,
            "identical": sum(same(row, reference, prompt.name) for prompt in short),
            "prompts": len(short),
        }
    return found


def bytes_read(facts: dict[str, Any], prompt: Prompt, answer: Answer) -> float:
    """Bytes that an answer read after its first token: weights once per pass, and keys and values of what is in the context by then."""
    context = len(prompt.ids) + len(answer.ids) / 2
    held = facts["slots"] or min(context, facts["window"] or context)
    # What the drafter read before the first token is not timed: its share is left out.
    drafting = answer.drafting_bytes * answer.decoded / len(answer.ids)
    return answer.forwards * (facts["weight_bytes"] + held * facts["kv_bytes"]) + drafting


def same(row: Row, reference: Row, name: str) -> bool:
    """Whether all answers of a way are the reference's."""
    answers, expected = row.answers.get(name, []), reference.answers.get(name, [])
    return bool(answers and expected) and all(answer.ids == expected[0].ids for answer in answers)


def merged(result: dict[str, Any], before: Path, partial: bool) -> dict[str, Any]:
    """A result whose rows take the place of theirs in an earlier one, if it is a part of a run on the same machine.

    Each row was compared with plain decoding in its own run. The copy's speed and the command of each run are kept in "runs".
    """
    facts = {name: result[name] for name in ("copy_bytes_per_second", "command", "seconds", "load_before")}
    if not partial or not before.exists():
        return {**result, "runs": [facts]}
    earlier = json.loads(before.read_text())
    same = ("cpu", "cpu_flags", "cores", "threads")
    if any(earlier["environment"][name] != result["environment"][name] for name in same):
        return {**result, "runs": [facts]}
    # One copy's speed for all shares: the highest.
    fastest = max(earlier["copy_bytes_per_second"], result["copy_bytes_per_second"])
    for run in (earlier, result):
        for row in run["rows"]:
            if "share_of_copy_bandwidth" in row["figures"]:
                row["figures"]["share_of_copy_bandwidth"] *= run["copy_bytes_per_second"] / fastest
    new = {(row["family"], row["way"]): row for row in result["rows"] if (row["family"], row["way"]) != REFERENCE}
    rows = [new.pop((row["family"], row["way"]), row) for row in earlier["rows"]]
    runs = [run for run in earlier.get("runs", []) if run["command"] != facts["command"]]
    return {
        **earlier,
        "copy_bytes_per_second": fastest,
        "rows": [*rows, *new.values()],
        "runs": [*runs, facts],
        "environment": result["environment"] | {"peers": earlier["environment"]["peers"] | result["environment"]["peers"]},
    }


def table(result: dict[str, Any]) -> str:
    """The table in Markdown, families in order, ways as they were made."""
    lines = [
        "| way | dtype | ms per token: stories; edits; after 2,048 tokens | plain / this: stories; edits | MB read per token | share of "
        "copy bandwidth | texts identical | prefill of 2,048 tokens, s | cache after 1,000; 8,000 tokens, MB | first answer, s |",
        "|" + "---|" * 10,
    ]

    def shown(value: float | None, form: str = ".1f", scale: float = 1.0) -> str:
        return "-" if value is None else format(value * scale, form)

    for row in result["rows"]:
        found = row["figures"]
        name = f"{row['family']}: {row['way']}"
        if not found.get("prompts"):
            lines.append(f"| {name} | | cannot run: {'; '.join(row['reasons'])} | | | | | | | |")
            continue
        ratios = [found[group]["plain_over_this"] for group in ("story", "edit")]
        caches = [row["cache_bytes"].get(str(tokens)) for tokens in CACHED]
        cells = [
            name,
            row["facts"]["dtype"],
            "; ".join(shown(found[group]["ms_per_token"]) for group in ("story", "edit", "long")),
            "; ".join(shown(ratio and ratio["value"], ".2f") for ratio in ratios),
            shown(found["bytes_per_token"], ".0f", 1e-6),
            shown(found["share_of_copy_bandwidth"], ".2f"),
            f"{found['identical']} of {found['prompts']}",
            shown(found["long"]["prefill_ms"], ".2f", 1e-3),
            "; ".join(shown(value, ".1f", 1e-6) for value in caches),
            shown(row["first_answer_seconds"], ".0f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
        lines += [f"| | | of this: {reason} | | | | | | | |" for reason in row["reasons"]]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument(
        "--only",
        default="",
        help="a regular expression: only the ways in whose family and name it is found, and transformers' plain decoding",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "evals" / "results" / "peers")
    parser.add_argument("--made", type=Path, default=VENVS / "made", help="where heads, the spec and requantised files are kept")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True, highlight=False)
    made = made_in(given.made)
    prepare(made, console.print)
    tokenizer = AutoTokenizer.from_pretrained(made.model)
    prompts = prompts_of(tokenizer)
    load_before = os.getloadavg()[0]
    pythons = {name: VENVS / name / "bin" / "python" for name in FAMILIES} | {"patchkit": Path(sys.executable)}
    # The reference first: the ratios need it, whatever else is asked for.
    names = dict.fromkeys([REFERENCE[0], *given.families])
    families: list[Family] = []
    missing: list[tuple[Family | None, Row]] = []
    for name in sorted(names, key=list(FAMILIES).index):
        try:
            families.append(Family(name, pythons[name], made))
        except (Failed, OSError) as error:
            missing.append((None, Row(name, "all", reasons=[f"it does not start: {error}"])))
    started = time.perf_counter()
    try:
        warm_up = [prompt_ids(tokenizer, WARM_UP)[0].tolist(), prompts[-1].ids]
        rows = [*rows_of(families, warm_up, console.print, given.only), *missing]
        reference = next(row for _, row in rows if (row.family, row.way) == REFERENCE)
        bandwidths: list[float] = []
        copying = next(family for family in families if family.name == REFERENCE[0])

        def write() -> None:
            result = {
                "what": f"smollm2, greedy, {NEW_TOKENS} new tokens after a chat prompt, {AFTER_LONG} after {LONG} of text; medians of "
                f"{given.rounds} rounds in turns over {2 * PROMPTS} prompts",
                "copy_bytes_per_second": max(bandwidths),
                "rows": [{**dataclasses.asdict(row), "figures": figures(row, reference, prompts, max(bandwidths))} for _, row in rows],
                "seconds": time.perf_counter() - started,
                "load_before": load_before,
                "command": " ".join(["python", "evals/peers/run.py", *(arguments or sys.argv[1:])]),
                "environment": environment() | {"peers": {family.name: family.ask(versions=FAMILIES[family.name]) for family in families}},
            }
            given.out.mkdir(parents=True, exist_ok=True)
            result = merged(result, given.out / "peers.json", partial=bool(given.only) or set(given.families) != set(FAMILIES))
            (given.out / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
            (given.out / "table.md").write_text(table(result))

        for turn in range(given.rounds):
            bandwidths.append(copying.ask(bandwidth=True))
            measure(rows, prompts, first=turn * len(prompts))
            write()
            console.print(f"round {turn + 1} of {given.rounds} after {(time.perf_counter() - started) / 60:.1f} min")
        measure_caches(rows, english_ids(tokenizer, max(CACHED))[0].tolist(), console.print)
        write()
    finally:
        for family in families:
            family.stop()
    console.print((given.out / "table.md").read_text(), markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
