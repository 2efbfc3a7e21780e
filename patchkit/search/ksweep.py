"""Sweep over draft lengths K: every K on the same prompts, interleaved with plain decoding."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patchkit.api import patch_model
from patchkit.errors import PatchError
from patchkit.measure.perplexity import TextError
from patchkit.measure.texts import encode, heldout_texts, read_prompts, spread
from patchkit.patches.speculative import Speculative
from patchkit.search.ksweep_result import DraftLengthResult, KSweep, TimedCall
from patchkit.speculation.shared import reset_statistics, statistics_of
from patchkit.speculation.statistics import RunStatistics
from patchkit.views import twin

_WARM_UP_TOKENS = 16

Advance = Callable[[str, int], object]


def encoded_prompts(source: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[torch.Tensor]:
    """Token ids [1, T] of prompts.

    Args:
        source: "stdlib": the first `length` tokens of `count` held-out standard library files, spread over all; or a UTF-8 file, of which
            every line that is not blank is a prompt (a `.json` file: a list of texts), the first `count` of them.

    Raises:
        TextError: no such text, or none in it.
    """
    if source == "stdlib":
        library = (encode(tokenizer, text) for text in heldout_texts("give a file of your own with --prompts"))
        prompts = spread([ids[:length] for ids in library if len(ids) >= 2 * length], count)
    else:
        prompts = [encode(tokenizer, text) for text in read_prompts(Path(source))[:count]]
    if not prompts:
        raise TextError(f"{source} has no prompt of {length} tokens: give a smaller --prompt-tokens, or a file with --prompts")
    return [torch.tensor([ids]) for ids in prompts]


def work(ks: Sequence[int], prompts: int, iterations: int) -> int:
    """Number of calls that `run_ksweep` reports to `advance`."""
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
    """Time greedy generation with every K and without drafts, interleaved prompt by prompt, so that drift in load affects all alike.

    Every configuration is a view of the same weights; `model` itself stays unpatched.

    Args:
        draft: option `draft` of `Speculative`.
        prompts: ids [1, T] each.
        trace: where to write a Chrome trace, by PyTorch's profiler, of one more run of the fastest K.
        advance: called with a description of the work and a number of finished calls.

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
            order.append(order.pop(0))  # rotated, so that none always follows the same one
            plain, _ = found[None]
            for key in views:
                new, seconds = found[key]
                runs.append(TimedCall(key, index, iteration, new.numel(), seconds, torch.equal(new, plain)))
    figures = {k: statistics_of(views[k]) for k in ks}
    plain_ms = figures[0].plain_ms if 0 in figures else None
    if plain_ms is not None:
        for each in figures.values():
            each.plain_ms_by_rows = {1: plain_ms}
    rows = [result_of(None, runs, None), *(result_of(k, runs, figures[k]) for k in ks)]
    result = KSweep(figures[ks[0]].drafter, new_tokens, rows, runs)
    if trace is not None:
        _write_trace(views[max(result.rows[1:], key=lambda row: row.tokens_per_s).k], prompts[0], new_tokens, trace)
    return result


def _generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> tuple[torch.Tensor, float]:
    """Return the new tokens [n] on the CPU, and the duration in seconds."""
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
    new = output[0, ids.shape[1] :].cpu()  # waits for the device
    return new, time.perf_counter() - started


def result_of(k: int | None, runs: Sequence[TimedCall], figures: RunStatistics | None) -> DraftLengthResult:
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
