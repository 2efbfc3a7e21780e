"""The command line: `patchkit demo | inspect | generate | ppl | patches | kernels | train-heads | linearize | ksweep`.

Results go to stdout, progress and remarks to stderr. With `--json` stdout carries one JSON object and nothing else. What a
user can get wrong ends in one line on stderr and exit code 1 (2 for a wrong call), never in a traceback.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from patchkit.errors import PatchError, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patchkit.api import Report
    from patchkit.patch import Patch
    from patchkit.quality.perplexity import Bucket

# torch and transformers take seconds to import, so each command imports what it needs.


class UsageError(PatchError):
    """The command is well-formed, but what it was given cannot be used."""


class _Commands(typer.core.TyperGroup):
    """Turns a PatchError of any command into one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PatchError as error:
            _stderr().print(f"error: {' '.join(str(error).split())}", style="bold red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Change how a Hugging Face causal language model runs: in one line, reversibly, with evidence.",
)


class Dtype(str, Enum):
    """Precision of the weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="'bundled', a model directory, or a hub id.")]
PatchesOption = Annotated[
    str, typer.Option("--patches", metavar="SPEC", help="Patches, such as 'streaming(sinks=4, window=508)'; default none.")
]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Precision of the weights.")]
DeviceOption = Annotated[str, typer.Option("--device", help="Where the model runs, such as 'cpu' or 'cuda'.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")]


def main() -> None:
    """The console script."""
    app(prog_name="patchkit")


def _show_version(wanted: bool) -> None:
    if wanted:
        from patchkit.quality.environment import version_of

        typer.echo(f"patchkit {version_of('patchkit')}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave.")] = False,
) -> None:
    # transformers imports torchao where it is installed, and that says which of its CUDA libraries did not load.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="'bundled', a model directory, or a hub id.")] = "bundled",
    tokens: Annotated[int, typer.Option(min=2, help="How many tokens of text to stream.")] = 16384,
    windows: Annotated[str, typer.Option(help="StreamingLLM windows in tokens, separated by commas.")] = "508,252,124",
    out: Annotated[Path, typer.Option(help="The picture to write.", dir_okay=False)] = Path("patchkit-demo.png"),
    as_json: JsonOption = False,
) -> None:
    """Stream real text through a model, unpatched and with StreamingLLM: perplexity, time and memory by position."""
    sizes = _window_list(windows)
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.quality import demo as show

    loaded, tokenizer = _load(model)
    with _progress() as bar:
        task = bar.add_task("", total=show.work(tokens, sizes))
        result = show.run_demo(
            loaded, tokenizer, tokens, sizes, advance=lambda what, count: bar.update(task, advance=count, description=what)
        )
        bar.update(task, completed=bar.tasks[0].total, description="done")
    try:
        show.draw(result, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        from patchkit.quality.environment import environment

        _emit({"model": model, **result.to_dict(), "picture": str(out), "environment": environment()})
        return
    console = Console()
    # A pipe counts as 80 columns, and a table that is cut off is worth nothing.
    console.width = max(console.width, 110)
    console.print(show.table(result))
    console.print(f"curves: {out}", highlight=False, soft_wrap=True)
    console.print(result.ratio_line(), highlight=False, soft_wrap=True)


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False) -> None:
    """Show what patchkit finds in a model, and which patches would apply."""
    from patchkit.patch import available_patches
    from patchkit.target import Target

    loaded, _ = _load(model)
    target = Target(loaded)
    facts: dict[str, Any] = {
        "model": model,
        "class": type(loaded).__name__,
        "parameters": sum(p.numel() for p in loaded.parameters()),
    }
    try:
        facts |= target.describe()
    except PatchError as error:
        facts["attention_layers"] = []
        facts["obstacle"] = str(error)
    facts["patches"] = {name: _verdict(cls, target) for name, cls in available_patches().items()}
    if as_json:
        _emit(facts)
        return
    layers, verdicts = facts.pop("attention_layers"), facts.pop("patches")
    console = Console()
    _print_pairs(console, facts)
    if layers:
        console.print(_layer_table(layers))
    _print_table(console, "patches with their default options", ["patch", "applies", "why"], [
        [name, "yes" if verdict["applies"] else "no", verdict["reason"] or ""] for name, verdict in verdicts.items()
    ])  # fmt: skip


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option("--prompt", metavar="TEXT|-", help="The text to continue; '-' reads it from stdin.")],
    patches: PatchesOption = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token; above, tokens are sampled.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Continue a text; tokens are printed as they come."""
    chosen = _parse(patches)
    text = _stdin() if prompt == "-" else prompt
    if not text.strip():
        raise UsageError("the prompt is empty: give some text with --prompt, or pipe it in with --prompt -")
    import torch
    from transformers import TextStreamer

    loaded, tokenizer = _load(model, dtype, device)
    _patch(loaded, chosen)
    inputs = tokenizer(text, return_tensors="pt")
    prompt_tokens = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    if tokenizer.pad_token_id is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    if not as_json:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(seed)
    started = time.perf_counter()
    try:
        output = loaded.generate(
            input_ids=inputs["input_ids"].to(loaded.device),
            attention_mask=inputs["attention_mask"].to(loaded.device),
            max_new_tokens=max_new_tokens,
            **options,
        )
    except IndexError as error:
        raise UnsupportedModel(
            f"{type(loaded).__name__} cannot take a text of {prompt_tokens} + {max_new_tokens} tokens ({error}): its position table is "
            "shorter, or the tokenizer is not its own. Shorten the prompt or lower --max-new-tokens"
        ) from error
    seconds = time.perf_counter() - started
    new = output[0, prompt_tokens:]
    if as_json:
        _emit({
            "model": model,
            "patches": _report(loaded, chosen).to_dict()["patches"],
            "prompt": text,
            "text": tokenizer.decode(new, skip_special_tokens=True),
            "prompt_tokens": prompt_tokens,
            "new_tokens": len(new),
            "seconds": seconds,
            "tokens_per_s": len(new) / seconds,
        })  # fmt: skip
        return
    remarks = _stderr()
    remarks.print(
        f"{len(new)} tokens in {seconds:.2f} s after a prompt of {prompt_tokens}: {len(new) / seconds:.1f} tokens/s", highlight=False
    )
    remarks.print(str(_report(loaded, chosen)) or "unpatched", highlight=False, soft_wrap=True, markup=False)


@app.command()
def ppl(
    model: ModelArgument,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="The UTF-8 text to score.")],
    patches: PatchesOption = "",
    chunk: Annotated[int, typer.Option(min=1, help="Tokens per forward.")] = 512,
    max_tokens: Annotated[int | None, typer.Option(min=2, help="Score only the first tokens of the text.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Score the unpatched model too.")] = False,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Perplexity of a text streamed through one cache, in total and by position."""
    chosen = _parse(patches)
    from patchkit.quality.perplexity import by_position, default_edges, encode, read_text, stream_nll

    content = read_text(text)
    loaded, tokenizer = _load(model, dtype, device)
    ids = encode(tokenizer, content)[:max_tokens]
    edges = default_edges(len(ids) - 1)
    results: dict[str, dict[str, Any]] = {}
    buckets: dict[str, list[Bucket]] = {}
    with _progress() as bar:
        for name in (["unpatched"] if baseline or not chosen else []) + (["patched"] if chosen else []):
            patched = chosen if name == "patched" else []
            _patch(loaded, patched)
            task = bar.add_task(name, total=len(ids) - 1)
            started = time.perf_counter()
            nll = stream_nll(loaded, ids, chunk=chunk, progress=lambda count, task=task: bar.update(task, advance=count))  # type: ignore[misc]
            total = by_position(nll, [0, len(nll)])[0]
            buckets[name] = [*by_position(nll, edges), total]
            results[name] = {
                "patches": _report(loaded, patched).to_dict()["patches"],
                **dataclasses.asdict(total),
                "by_position": [dataclasses.asdict(bucket) for bucket in buckets[name][:-1]],
                "tokens_per_s": len(nll) / (time.perf_counter() - started),
            }
    ratio = math.exp(results["patched"]["nll"] - results["unpatched"]["nll"]) if len(results) == 2 else None
    if as_json:
        _emit(
            {"model": model, "text": str(text), "chunk": chunk, "tokens": len(ids) - 1, "results": results, "patched_over_unpatched": ratio}
        )
        return
    rows = []
    for columns in zip(*buckets.values(), strict=True):
        last = columns[0] is next(iter(buckets.values()))[-1]
        span = "all" if last else f"{columns[0].start}-{columns[0].stop}"
        rows.append([span, str(columns[0].tokens), *(f"{b.perplexity:.3f} ± {b.perplexity * b.stderr:.3f}" for b in columns)])
    _print_table(Console(), f"perplexity of {text}", ["position", "tokens", *buckets], rows, right=True)
    remarks = _stderr()
    remarks.print(str(_report(loaded, chosen)) or "unpatched", highlight=False, soft_wrap=True, markup=False)
    if ratio is not None:
        remarks.print(f"patched / unpatched: {ratio:.4f}", highlight=False)


@app.command()
def patches(as_json: JsonOption = False) -> None:
    """List the patches that --patches can name, with their options."""
    from patchkit.patch import available_patches

    listed: dict[str, dict[str, Any]] = {
        name: {
            "summary": (cls.__doc__ or "").strip().splitlines()[0] if cls.__doc__ else "",
            "stage": cls.stage.name.lower(),
            "options": {field.name: _default_of(field) for field in dataclasses.fields(cls) if field.init},
        }
        for name, cls in available_patches().items()
    }
    if as_json:
        _emit(listed)
        return
    rows = [
        [name, entry["stage"], ", ".join(f"{option}={value!r}" for option, value in entry["options"].items()), entry["summary"]]
        for name, entry in listed.items()
    ]
    _print_table(Console(), None, ["patch", "stage", "options", "what it does"], rows)


@app.command()
def kernels(as_json: JsonOption = False) -> None:
    """Show which backend of every op would run on this machine, and why the others would not."""
    import torch

    from patchkit.kernels import available_ops
    from patchkit.kernels.op import VARIABLE

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, dict[str, Any]] = {}
    for name, op in available_ops().items():
        label, args = next(op.sample_inputs(device))
        found[name] = {"sample": label, "device": device, "runs": op.choose(*args), "refusals": op.explain(*args)}
    if as_json:
        _emit(found)
        return
    rows = [
        [name, entry["runs"], backend, "serves" if reason is None else reason]
        for name, entry in found.items()
        for backend, reason in [*entry["refusals"].items(), ("reference", None)]
    ]
    for index in range(len(rows) - 1, 0, -1):  # name an op once
        if rows[index][0] == rows[index - 1][0]:
            rows[index][:2] = ["", ""]
    _print_table(Console(), f"on {device}; {VARIABLE}=auto|reference|cpu|triton|native chooses", ["op", "runs", "backend", "why"], rows)


class HeadsKind(str, Enum):
    """Which heads to train."""

    eagle = "eagle"
    medusa = "medusa"


@app.command(name="train-heads")
def train_heads(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", metavar="FILE|stdlib", help="UTF-8 text to learn on, or Python's standard library.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.", dir_okay=False)],
    kind: Annotated[HeadsKind, typer.Option("--kind", help="Heads to train.")] = HeadsKind.eagle,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1000,
    depth: Annotated[int, typer.Option(min=1, help="How many tokens ahead to learn: Medusa's number of heads.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 16,
    length: Annotated[int, typer.Option(min=8, help="Tokens per text.")] = 256,
    on_policy: Annotated[float, typer.Option(min=0, max=1, help="Share of steps on the model's own continuations.")] = 0.0,
    checkpoint: Annotated[Path | None, typer.Option(help="Write and resume from this file.", dir_okay=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Train heads that draft for a model, on hidden states computed as they are needed."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    import torch

    from patchkit.generation import heads_training
    from patchkit.quality.perplexity import encode, read_text
    from patchkit.quality.stdlib_text import read_texts, stdlib_files

    texts = read_texts(stdlib_files("train")) if text == "stdlib" else [read_text(text)]
    loaded, tokenizer = _load(model, dtype, device)
    tokens = torch.tensor([token for each in texts for token in encode(tokenizer, each)])
    kept = len(tokens) // 20 // length * length  # the end is kept back, to see what the heads are worth
    started = time.perf_counter()
    heads = heads_training.train_heads(
        loaded, tokens[: len(tokens) - kept], kind.value, steps, depth=depth, batch=batch, length=length, on_policy=on_policy, seed=seed,
        checkpoint=checkpoint,
    )  # fmt: skip
    heads.save(out)
    seconds = time.perf_counter() - started
    shares = None
    if kept:
        found = heads_training.agreement(heads, loaded, tokens[len(tokens) - kept :].view(-1, length)[:64], depth)
        shares = heads_training.accepted_by_position(found).tolist()
    if as_json:
        _emit({
            "model": model,
            "kind": kind.value,
            "out": str(out),
            "bytes": out.stat().st_size,
            "seconds": seconds,
            "accepted_by_position": shares,
        })  # fmt: skip
        return
    console = Console()
    console.print(f"{kind.value} heads: {out}, {out.stat().st_size / 2**20:.2f} MiB, {seconds:.0f} s", highlight=False, soft_wrap=True)
    if shares:
        listed = " ".join(f"{share:.2f}" for share in shares)
        console.print(f"drafts of 1 to {depth} tokens that are the model's choice, on text kept back: {listed}", highlight=False)


@app.command()
def linearize(
    model: ModelArgument,
    text: Annotated[str, typer.Option("--text", metavar="FILE|stdlib", help="UTF-8 text to learn on, or Python's standard library.")],
    out: Annotated[Path, typer.Option("--out", help="The safetensors file to write.", dir_okay=False)],
    feature_map: Annotated[str, typer.Option("--feature-map", help="hedgehog, t2r, elu1, relu or identity.")] = "hedgehog",
    window: Annotated[int, typer.Option(min=1, help="Last tokens that keep softmax attention.")] = 64,
    layers: Annotated[str | None, typer.Option(help="Layers to convert, separated by commas; default all.")] = None,
    horizon: Annotated[int | None, typer.Option(min=1, help="Old tokens beyond which their weight grows no more.")] = None,
    closed_form: Annotated[bool, typer.Option("--closed-form/--no-closed-form", help="Fit a readout per head in closed form.")] = True,
    transfer_steps: Annotated[int, typer.Option("--transfer-steps", min=0, help="Steps of the gradient fit of the feature maps.")] = 40,
    lora_steps: Annotated[int, typer.Option("--lora-steps", min=0, help="Steps of low-rank recovery on the language model's loss.")] = 200,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapters.")] = 8,
    distill: Annotated[float, typer.Option(min=0, max=1, help="Share of the softmax model's distribution in the recovery's loss.")] = 0.5,
    keep_softmax: Annotated[int, typer.Option("--keep-softmax", min=0, help="Layers, the worst ones, that stay as they are.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Texts per step.")] = 4,
    length: Annotated[int, typer.Option(min=8, help="Tokens per text; best more than the model's context.")] = 1024,
    checkpoint: Annotated[Path | None, typer.Option(help="Write and resume from this file.", dir_okay=False)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Convert softmax attention to a softmax window over a linear memory, for the patch 'linear'."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    indices = None if layers is None else _number_list(layers, "--layers", smallest=0)
    from patchkit.linear import conversion
    from patchkit.linear.feature_maps import available_feature_maps
    from patchkit.quality.demo import heldout_ids
    from patchkit.quality.perplexity import read_text
    from patchkit.quality.stdlib_text import read_texts, stdlib_files

    if feature_map not in available_feature_maps():
        raise UsageError(f"--feature-map {feature_map} is unknown: give one of {', '.join(available_feature_maps())}")
    texts = list(read_texts(stdlib_files("train"))) if text == "stdlib" else [read_text(text)]
    loaded, tokenizer = _load(model, dtype, device)
    result = conversion.linearize(
        loaded, texts, tokenizer, feature_map=feature_map, window=window, layers=indices, horizon=horizon, closed_form=closed_form,
        transfer_steps=transfer_steps, lora_steps=lora_steps, rank=rank, distill=distill, keep_softmax=keep_softmax, batch=batch,
        length=length, seed=seed, heldout=heldout_ids(tokenizer, 16384)[0] if text == "stdlib" else None, checkpoint=checkpoint,
    )  # fmt: skip
    result.state.save(out)
    if as_json:
        _emit({"model": model, "out": str(out), "bytes": out.stat().st_size, **result.to_json()})
        return
    console = Console()
    console.width = max(console.width, 130)
    for table in result.tables():
        console.print(table)
    times = ", ".join(f"{name} {milliseconds:.2f}" for name, milliseconds in result.ms_per_token.items())
    console.print(f"ms per token: {times}", highlight=False)
    console.print(f"linear attention: {out}, {out.stat().st_size / 2**20:.2f} MiB", highlight=False, soft_wrap=True)


@app.command()
def ksweep(
    model: ModelArgument,
    draft: Annotated[str, typer.Option("--draft", metavar="NAME|PATH", help="What drafts: a model, 'prompt_lookup', 'medusa', 'eagle'.")],
    ks: Annotated[str, typer.Option("--ks", help="Numbers of drafts per round, separated by commas.")] = "0,1,2,3,4,6,8",
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE|stdlib", help="A prompt per line (.json: a list of texts), or held-out library files.")
    ] = "stdlib",
    n_prompts: Annotated[int, typer.Option("--n-prompts", min=1, help="How many prompts.")] = 8,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Length of the prompts from the library.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Tokens to generate per prompt.")] = 128,
    iterations: Annotated[int, typer.Option(min=1, help="How often everything is repeated.")] = 3,
    out: Annotated[Path, typer.Option(help="The folder to write to.", file_okay=False)] = Path("patchkit-ksweep"),
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace of one run of the fastest K.", dir_okay=False)] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Sweep the number of drafts against plain decoding: throughput, acceptance, and whether the text stays the same."""
    sizes = _number_list(ks, "--ks", smallest=0)
    for folder in [out.absolute().parent] + ([trace.absolute().parent] if trace else []):
        if not folder.is_dir():
            raise UsageError(f"the folder {folder} does not exist: create it, or write elsewhere")
    from patchkit.generation import ksweep as sweep

    loaded, tokenizer = _load(model, dtype, device)
    texts = sweep.load_prompts(prompts, tokenizer, n_prompts, prompt_tokens)
    with _progress() as bar:
        task = bar.add_task("", total=sweep.work(sizes, len(texts), iterations))

        def advance(what: str, count: int) -> None:
            bar.update(task, advance=count, description=what)

        result = sweep.run_ksweep(loaded, draft, sizes, texts, new_tokens, iterations, trace, advance)
        bar.update(task, description="done")
    try:
        result.write(out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    if as_json:
        _emit({"model": model, **result.to_dict(), "out": str(out)})
    else:
        console = Console()
        console.width = max(console.width, 100)
        console.print(sweep.table(result))
        console.print(f"best: K = {result.best.k or 0}; {', '.join(sweep.FILES)} in {out}", highlight=False, soft_wrap=True)
    if not result.identical:
        wrong = sum(not run.identical for run in result.runs)
        raise PatchError(f"{wrong} of {len(result.runs)} texts differ from plain decoding: use --dtype float32, as 16 bits leave ties")


def _load(model: str, dtype: Dtype = Dtype.float32, device: str = "cpu") -> tuple[Any, PreTrainedTokenizerBase]:
    import torch
    import transformers

    from patchkit.models import load_model

    # What goes wrong is said by patchkit; the rest of transformers' remarks would bury it.
    transformers.logging.set_verbosity_error()
    loaded: Any
    loaded, tokenizer = load_model(model, dtype=getattr(torch, dtype.value))
    try:
        return loaded.to(device), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the model cannot go to device {device!r} ({str(error).splitlines()[0]}): use --device cpu") from error


def _parse(spec: str) -> list[Patch]:
    """The patches of a spec, before anything large is loaded. An empty spec means none."""
    from patchkit.patch import parse_spec

    return parse_spec(spec) if spec.strip() else []


def _patch(model: PreTrainedModel, chosen: list[Patch]) -> None:
    from patchkit.api import patch_model

    if chosen:
        patch_model(model, *chosen, verbose=False)


def _report(model: PreTrainedModel, chosen: list[Patch]) -> Report:
    """What the patches changed, with their counters so far; empty for an unpatched model."""
    from patchkit.api import Report, report

    return report(model) if chosen else Report([])


def _verdict(cls: type[Patch], target: Any) -> dict[str, Any]:
    try:
        cls().check(target)
    except (PatchError, TypeError) as error:  # TypeError: an option without a default
        return {"applies": False, "reason": str(error)}
    return {"applies": True, "reason": None}


def _window_list(text: str) -> list[int]:
    return _number_list(text, "--windows", smallest=1)


def _number_list(text: str, option: str, smallest: int) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 2,4,8", param_hint=option) from None
    if min(numbers) < smallest:
        raise typer.BadParameter(f"{min(numbers)} is too small: give at least {smallest}", param_hint=option)
    return list(dict.fromkeys(numbers))


def _stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text ({error.reason} at byte {error.start}): pipe text in") from error


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default


def _stderr() -> Console:
    return Console(stderr=True)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=_stderr())


def _emit(result: dict[str, Any]) -> None:
    typer.echo(json.dumps(_plain(result), allow_nan=False))


def _plain(value: Any) -> Any:
    """What JSON can hold: infinities and NaN become null, objects their text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def _print_pairs(console: Console, pairs: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2))
    for name, value in pairs.items():
        grid.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _word(value))
    console.print(grid, highlight=False, markup=False)


def _layer_table(layers: list[dict[str, Any]]) -> Table:
    """One line per run of neighbouring layers that are alike; `layer` and `module` are what tells them apart."""
    facts = [name for name in layers[0] if name not in ("layer", "module")]
    facts = [name for name in facts if any(layer[name] is not None for layer in layers)]
    runs: list[list[dict[str, Any]]] = []
    for layer in layers:
        if runs and all(runs[-1][-1][name] == layer[name] for name in facts):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    table = Table(title=f"{len(layers)} attention layers", title_justify="left")
    for heading in ("layers", *facts):
        table.add_column(heading.replace("_", " "))
    for run in runs:
        first, last = run[0]["layer"], run[-1]["layer"]
        table.add_row(str(first) if first == last else f"{first}-{last}", *(_word(run[0][name]) for name in facts))
    return table


def _word(value: Any) -> str:
    return "-" if value is None else str(value)


def _print_table(console: Console, title: str | None, headings: list[str], rows: list[list[str]], right: bool = False) -> None:
    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if right and index else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
