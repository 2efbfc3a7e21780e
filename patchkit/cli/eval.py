"""`patchkit eval`."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from patchkit.cli.common import (
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    ModelArgument,
    UsageError,
    app,
    emit,
    load,
    parse,
    print_table,
    stderr,
)
from patchkit.errors import IrreversiblePatch, PatchError
from patchkit.lm_eval.finished import finished_results, identity, key_of, label_of
from patchkit.lm_eval.scores import TaskScore, scores_markdown, scores_table
from patchkit.patch import Patch, available_patches
from patchkit.spec import parse_spec

BASELINE = "unpatched"
# Options of lm-eval that have another place here, or none.
_REFUSED = {
    "model": "the model is the first argument",
    "output_path": "use --out",
    "wandb_args": "results are in lm-eval's format in --out, from where they can be logged",
    "trackio_args": "results are in lm-eval's format in --out, from where they can be logged",
}


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    model: ModelArgument,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval, separated by commas; patchkit's own, which need no network: 'patchkit_*'.")],
    patches: Annotated[list[str] | None, typer.Option("--patches", metavar="SPEC", help="Patches; may be given several times.")] = None,
    every_patch: Annotated[
        bool, typer.Option("--every-patch", help="Every registered patch by itself, with options for short texts.")
    ] = False,
    baseline: Annotated[bool, typer.Option("--baseline", help="The unpatched model too.")] = False,
    limit: Annotated[float | None, typer.Option(help="Documents per task, or below 1 their share.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write results as they are finished, and skip those that are there.", file_okay=False)
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
) -> None:
    """Evaluate with lm-evaluation-harness, patched and unpatched. All other options are lm-eval's own (lm_eval run --help)."""
    if model.startswith("-"):
        raise UsageError(f"{model!r} is in the place of the model: give the model first, and then the options")
    if limit is not None and limit <= 0:
        raise UsageError(f"--limit {limit:g} leaves no documents: give a number, or below 1 a share")
    chosen = {name: spec for spec in patches or [] if (name := " + ".join(patch.spec for patch in parse(spec)))}
    if every_patch:
        examples = {name: cls.evaluated or name for name, cls in available_patches().items()}
        chosen = {parse_spec(example)[0].spec: example for example in examples.values()} | chosen
    if baseline or not chosen:
        chosen = {BASELINE: "", **chosen}
    if out:
        try:
            out.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(f"{out} cannot be created ({error.strerror}): create its parent folder, or give another --out") from error
    with contextlib.redirect_stdout(sys.stderr), _one_description_of_the_machine():
        config, manager = _harness(model, tasks, limit, device, out, context.args)
        cells = []
        for cell in _run(model, dtype, {name: parse(spec) for name, spec in chosen.items()}, config, manager, out):
            cells.append(cell)
            _say(cell)
            if out and cell.results:
                (out / "table.md").write_text(scores_markdown(cells), encoding="utf-8")
    if int(os.environ.get("RANK", 0)):
        return
    if as_json:
        emit({"model": model, "cells": [asdict(cell) for cell in cells]})
    else:
        console = Console()
        console.width = max(console.width, 50 + 20 * len(chosen))
        print_table(console, None, *scores_table(cells), right=True)
    unscored = [name for name in chosen if not any(cell.results for cell in cells if cell.spec == name)]
    if unscored:
        raise PatchError("; ".join(f"no score for {cell.spec}: {cell.error}" for cell in cells if cell.spec in unscored))


def task_folder() -> Path:
    """The folder of patchkit's own tasks: in a checkout, or where an installation put it."""
    checkout = Path(__file__).parents[2] / "evals" / "tasks"
    return checkout if checkout.is_dir() else Path(sysconfig.get_path("data")) / "share" / "patchkit" / "tasks"


def _tokenizer_place(model: str) -> str:
    """Place from which transformers loads the tokenizer of a model, for tasks of lm-eval that need one."""
    from patchkit.models import BUNDLED, bundled_path

    return str(bundled_path(model)) if model == "bundled" or model in BUNDLED else model


def _harness(model: str, tasks: str, limit: float | None, device: str, out: Path | None, extra: list[str]) -> tuple[Any, Any]:
    """lm-eval's configuration and tasks, from its own parser."""
    try:
        import patchkit.lm_eval.model  # noqa: F401
    except ImportError as error:
        raise UsageError(str(error)) from error
    from lm_eval.config.evaluate_config import EvaluatorConfig
    from lm_eval.utils import setup_logging

    from patchkit._compat.lm_eval import parse_options

    given = ["run", "--tasks", tasks, "--device", device, *([] if limit is None else ["--limit", str(limit)]), *extra]
    parsed, unknown = parse_options(given)
    if unknown:
        raise UsageError(f"unknown option {unknown[0]!r}: it is neither one of patchkit eval nor of lm-eval (see lm_eval run --help)")
    for name, remedy in _REFUSED.items():
        if getattr(parsed, name, None):
            raise UsageError(f"--{name} is not an option of patchkit eval: {remedy}")
    parsed.output_path = out and str(out)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        config = EvaluatorConfig.from_cli(parsed)
        if config.verbosity:
            setup_logging(config.verbosity)
        config.include_path = [task_folder(), *([config.include_path] if config.include_path else [])]
        # Tasks of patchkit's own count distances in the model's tokens.
        given_metadata = config.metadata or {}
        if not {"tokenizer", "pretrained"} & set(given_metadata):
            config.metadata = {**given_metadata, "tokenizer": config.model_args.get("tokenizer", _tokenizer_place(model))}
        manager = config.process_tasks(config.metadata)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(f"lm-eval refuses this: {error}") from error
    return config, manager


def _run(model: str, dtype: Dtype, chosen: dict[str, list[Patch]], config: Any, manager: Any, out: Path | None) -> Iterator[TaskScore]:
    """Yield the score of every task under every spec as it is finished; those in ``out`` are read from there."""
    finished = finished_results(out, _say_unfinished) if out else {}
    lm = None
    for name, patches in chosen.items():
        lm = lm or _load(model, dtype, config)
        runs = {label_of(task): identity(lm, model, name, label_of(task), config) for task in config.tasks}
        if all(key_of(run) in finished for run in runs.values()):
            yield from (TaskScore(name, task, finished[key_of(run)]) for task, run in runs.items())
            continue
        try:
            with _patched(lm, patches):
                for task in config.tasks:
                    run = runs[label_of(task)]
                    if key_of(run) in finished:
                        yield TaskScore(name, label_of(task), finished[key_of(run)])
                        continue
                    try:
                        yield TaskScore(name, label_of(task), _evaluated(lm, task, run, config, manager, out))
                    except (PatchError, OSError, ValueError) as error:
                        yield TaskScore(name, label_of(task), error=str(error))
        except IrreversiblePatch:
            lm = None
        except PatchError as error:
            yield from (TaskScore(name, task, error=str(error)) for task in runs)


def _load(model: str, dtype: Dtype, config: Any) -> Any:
    from patchkit.lm_eval.model import PatchkitLM

    sizes: dict[str, Any] = {"batch_size": config.batch_size or 1, "max_batch_size": config.max_batch_size or 64}
    if not config.model_args and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        loaded, tokenizer = load(model, dtype, config.device)
        return PatchkitLM(loaded, tokenizer=tokenizer, **sizes)
    options = {"dtype": dtype.value, "device": config.device, **sizes, **config.model_args}
    try:
        return PatchkitLM(model, **options)
    except PatchError:
        raise
    except Exception as error:  # as in patchkit.models: foreign files can raise nearly anything
        raise UsageError(f"lm-eval cannot load {model} with {config.model_args} ({type(error).__name__}: {error})") from error


@contextlib.contextmanager
def _patched(lm: Any, patches: list[Patch]) -> Iterator[None]:
    from patchkit.api import patch_model, unpatch_model

    if patches:
        patch_model(lm.model, patches, verbose=False)
    try:
        yield
    finally:
        if patches:
            unpatch_model(lm.model)


def _evaluated(lm: Any, task: Any, run: dict[str, Any], config: Any, manager: Any, out: Path | None) -> dict[str, Any]:
    """Results of lm-eval for one task, written to ``out`` in its format; empty in all processes but the first."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.utils import sanitize_model_name

    folder = out / re.sub(r"[^A-Za-z0-9=._-]+", "_", run["spec"]).strip("_") if out else None
    tracker = EvaluationTracker(**{**config.hf_hub_log_args, "output_path": folder and str(folder)})
    seeds = config.seed or [None] * 4
    results: Any = simple_evaluate(
        model=lm,
        tasks=[task],
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=config.device,
        # Cached answers of one spec must not be used for another.
        use_cache=config.use_cache and f"{config.use_cache}_{hashlib.sha256(key_of(run).encode()).hexdigest()[:16]}",
        cache_requests=config.cache_requests.get("cache_requests", False),
        rewrite_requests_cache=config.cache_requests.get("rewrite_requests_cache", False),
        delete_requests_cache=config.cache_requests.get("delete_requests_cache", False),
        limit=config.limit,
        samples=config.samples,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=config.log_samples,
        evaluation_tracker=tracker,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=bool(config.fewshot_as_multiturn),
        gen_kwargs=config.gen_kwargs,
        task_manager=manager,
        predict_only=config.predict_only,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )
    if results is None:
        return {}
    results["config"]["patchkit"]["run"] = run
    samples = results.pop("samples", None)
    if config.show_config:
        print(json.dumps(results["configs"], indent=2, default=str))
    if folder:
        names = tracker.general_config_tracker
        names.model_name, names.model_name_sanitized = run["model"], sanitize_model_name(run["model"])
        try:
            tracker.save_results_aggregated(results=results, samples=samples)
            for name in results["configs"] if samples else []:
                tracker.save_results_samples(task_name=name, samples=samples[name])
        except OSError as error:
            raise UsageError(f"{folder} cannot be written ({error.strerror}): give another --out") from error
    return results


@contextlib.contextmanager
def _one_description_of_the_machine() -> Iterator[None]:
    """lm-eval describes the machine after every task, which takes seconds; within one run it is the same."""
    from torch.utils import collect_env

    describe = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = functools.cache(describe)
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = describe


def _say_unfinished(path: Path) -> None:
    stderr().print(f"{path} holds no finished result of patchkit eval, and is ignored", highlight=False, soft_wrap=True)


def _say(cell: TaskScore) -> None:
    figures = ", ".join(f"{task} {metric} {value}" for (task, metric), value in cell.figures().items())
    line = f"{time.strftime('%H:%M:%S')} {cell.spec} | {cell.task}: {cell.error or figures}"
    stderr().print(line, highlight=False, soft_wrap=True, markup=False)
