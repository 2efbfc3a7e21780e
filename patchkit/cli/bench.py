"""`patchkit bench`."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from patchkit.cli.common import (
    MODEL_HELP,
    Dtype,
    JsonOption,
    UsageError,
    app,
    emit,
    load,
    parse,
    patch,
    print_table,
    progress,
    report,
    stderr,
)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=f"{MODEL_HELP[:-1]}; with --endpoint its name there.")] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML; other options override it.")] = None,
    patches: Annotated[str | None, typer.Option("--patches", metavar="SPEC", help="Patches of a local model.")] = None,
    endpoint: Annotated[str | None, typer.Option("--endpoint", metavar="URL", help="A server, such as http://localhost:8000/v1.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Ask /chat/completions instead of /completions.")] = None,
    prompts: Annotated[str | None, typer.Option("--prompts", metavar="stdlib|FILE", help="A prompt per line, or a JSON list.")] = None,
    n_prompts: Annotated[int | None, typer.Option("--n-prompts", help="How many prompts.")] = None,
    new_tokens: Annotated[int | None, typer.Option("--new-tokens", help="Tokens to ask for.")] = None,
    iterations: Annotated[int | None, typer.Option("--iterations", help="How often each prompt is measured.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Requests at a time, for a server.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", help="Seconds for a request.")] = None,
    retries: Annotated[int | None, typer.Option("--retries", help="Further attempts after a passing failure.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for bench.json and bench.csv.", file_okay=False)] = Path("patchkit-bench"),
    as_json: JsonOption = False,
) -> None:
    """Time to first token, latency and tokens per second of a model, or of a server with OpenAI's interface."""
    if not out.absolute().parent.is_dir():
        raise UsageError(f"the folder {out.absolute().parent} does not exist: create it, or give another --out")
    from patchkit.bench import config as config_module
    from patchkit.bench import harness, local, results, server
    from patchkit.measure.environment import environment

    given = dict(
        model=model, patches=patches, endpoint=endpoint, chat=chat, prompts=prompts, n_prompts=n_prompts, new_tokens=new_tokens,
        iterations=iterations, concurrency=concurrency, timeout_s=timeout, retries=retries,
    )  # fmt: skip
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings = config_module.Config.from_yaml(config, **overrides) if config else config_module.Config(**overrides)
    chosen = parse(settings.patches)
    texts = harness.load_prompts(settings.prompts, settings.n_prompts, settings.prompt_chars)
    loaded: Any = None
    generate: harness.Generator | None = None
    if settings.endpoint is None:
        loaded, tokenizer = load(settings.model, Dtype(settings.dtype), settings.device)
        patch(loaded, chosen)
        generate = local.LocalModel(loaded, tokenizer, settings.new_tokens)
    samples, interrupted = [], False
    try:
        out.mkdir(exist_ok=True)
        table = results.SampleFile(out / "bench.csv")
    except OSError as error:
        raise UsageError(f"{out} cannot be written ({error.strerror}): give another --out") from error
    generate = generate or server.Server(settings)
    started = time.perf_counter()
    with progress() as bar:
        task = bar.add_task("warming up", total=len(texts) * settings.iterations)
        try:
            harness.warm_up(settings, generate, texts)
            started = time.perf_counter()
            for sample in harness.run(settings, generate, texts):
                samples.append(sample)
                table.add(sample)
                bar.update(task, advance=1, description="measuring")
        except KeyboardInterrupt:
            interrupted = True
    seconds = time.perf_counter() - started
    answered = [sample for sample in samples if sample.error is None]
    result = {
        "config": dataclasses.asdict(settings),
        "patches": report(loaded, chosen).to_dict()["patches"] if loaded else [],
        "interrupted": interrupted,
        "answers": len(answered),
        "failures": len(samples) - len(answered),
        "figures": results.summary(samples),
        "tokens_per_s_in_all": sum(sample.tokens or 0 for sample in answered) / seconds,
        "samples": [dataclasses.asdict(sample) | {"tokens_per_s": sample.tokens_per_s} for sample in samples],
        "environment": environment(),
    }
    (out / "bench.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if as_json:
        emit(result)
    else:
        columns = ["mean", "median", "std", "min", "max", "p95"]
        rows = [[name, *(f"{figures[column]:.2f}" for column in columns)] for name, figures in results.summary(samples).items()]
        title = f"{settings.model} at {settings.endpoint}" if settings.endpoint else " + ".join([settings.model, *(p.spec for p in chosen)])
        print_table(Console(), f"{title}: {len(answered)} answers", ["", *columns], rows, right=True)
        Console().print(f"{out / 'bench.json'}, {out / 'bench.csv'}", highlight=False, soft_wrap=True)
    if interrupted:
        stderr().print(f"interrupted: what was measured is in {out}", highlight=False, soft_wrap=True)
        raise typer.Exit(130)
    if len(answered) < len(samples):
        first = next(sample.error for sample in samples if sample.error)
        raise UsageError(f"{len(samples) - len(answered)} of {len(samples)} requests failed, the first because {first}")
