"""Time of prefill and decoding by operator, unpatched and patched, with PyTorch's profiler."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function
from transformers import PreTrainedModel

from patchkit import _compat
from patchkit.api import patch_model
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.patch import Patch, Stage
from patchkit.views import synchronize, twin

_WARMUP_TOKENS = 3


@dataclass(frozen=True)
class OpCost:
    """One operator in one phase, without the operators that it calls.

    Attributes:
        calls: number of calls.
        ms: milliseconds, on the accelerator where the model is on one, else on the CPU.
        share: its share of the time of all operators in the phase.
        bytes: memory that its calls allocated and did not free.
    """

    name: str
    calls: int
    ms: float
    share: float
    bytes: int


@dataclass(frozen=True)
class Phase:
    """Profile of one variant of the model in one phase.

    Attributes:
        variant: "unpatched" or "patched".
        name: "prefill", a forward over the context; "decode", steps of one token; "generate", a whole call, prompt included.
        wall_ms: duration, including the overhead of the profiler.
        ops_ms: time in operators; the rest is Python, launches and the profiler.
        ops: operators, the costliest first.
    """

    variant: str
    name: str
    wall_ms: float
    ops_ms: float
    ops: list[OpCost]


def run_profile(model: PreTrainedModel, patches: Sequence[Patch], ids: torch.Tensor, tokens: int, trace: Path) -> list[Phase]:
    """Profile an unpatched and a patched view of a model, which itself is not touched; one Chrome trace holds all phases and memory.

    With a patch that acts in `generate` (`Stage.GENERATION`) both variants decode by `generate`.

    Args:
        patches: none for the unpatched model alone.
        ids: context [T] of real text.
        tokens: number of tokens to decode after it.
        trace: the JSON file to write, for chrome://tracing or https://ui.perfetto.dev.

    Raises:
        UnsupportedModel: the model cannot take so many tokens.
        PatchError: patches that do not fit, or a trace that cannot be written.
    """
    views = {"unpatched": twin(model).eval()}
    if patches:
        views["patched"] = patch_model(twin(model).eval(), *patches, verbose=False)
    try:
        trace.open("a").close()
    except OSError as error:
        raise PatchError(f"the trace {trace} cannot be written ({error.strerror}): write elsewhere") from error
    decode = _generate if any(patch.stage is Stage.GENERATION for patch in patches) else _decode
    ids = ids[None].to(model.device)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])
    try:
        with torch.no_grad():
            for view in views.values():  # warm up: compilation is no cost of a token
                decode(view, ids, min(tokens, _WARMUP_TOKENS), contextlib.nullcontext)
            with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
                for name, view in views.items():
                    decode(view, ids, tokens, _Marks(name, model.device))
    except IndexError as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot take {ids.shape[1]} + {tokens} tokens ({error}): its position table ends, "
            "give a smaller context, or the tokenizer is not its own"
        ) from error
    profiler.export_chrome_trace(str(trace))  # which raises nothing where it cannot write
    if trace.stat().st_size == 0:
        raise PatchError(f"the trace {trace} could not be written: is the disk full?")
    return _phases(list(profiler.events() or []), on_accelerator=model.device.type != "cpu")


Mark = Callable[[str], contextlib.AbstractContextManager[Any]]


def _prefill(model: Any, ids: torch.Tensor, mark: Mark) -> Any:
    options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with mark("prefill"):
        return model(input_ids=ids, use_cache=True, **options)


def _decode(model: Any, ids: torch.Tensor, tokens: int, mark: Mark) -> None:
    out = _prefill(model, ids, mark)
    with mark("decode"):
        for _ in range(tokens):
            token = out.logits[:, -1:].argmax(-1)
            out = model(input_ids=token, use_cache=True, **{_compat.CACHE: _compat.cache_of(out)})


def _generate(model: Any, ids: torch.Tensor, tokens: int, mark: Mark) -> None:
    _prefill(model, ids, mark)
    with mark("generate"):
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )


@dataclass(frozen=True)
class _Marks:
    """Marks the phases of one variant in the profile."""

    variant: str
    device: torch.device

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with record_function(f"{self.variant}: {phase}"):
            yield
            synchronize(self.device)


def _phases(events: Sequence[Any], on_accelerator: bool) -> list[Phase]:
    """Sort the profiler's events into the marked phases."""
    own = [event for event in events if event.device_type == DeviceType.CPU and not event.name.startswith("[")]
    marks = [event for event in own if event.name.startswith(("unpatched: ", "patched: "))]
    phases = []
    for mark in marks:
        begin, end = mark.time_range.start, mark.time_range.end
        sums: dict[str, list[float]] = {}
        for event in own:
            if event is not mark and begin <= event.time_range.start < end:
                ms = (event.self_device_time_total if on_accelerator else event.self_cpu_time_total) / 1000
                size = event.self_device_memory_usage if on_accelerator else event.self_cpu_memory_usage
                calls, total, memory = sums.setdefault(event.name, [0, 0.0, 0])
                sums[event.name] = [calls + 1, total + ms, memory + size]
        ops_ms = sum(ms for _, ms, _ in sums.values())
        ops = [OpCost(name, int(calls), ms, ms / ops_ms if ops_ms else 0.0, int(size)) for name, (calls, ms, size) in sums.items()]
        variant, _, name = mark.name.partition(": ")
        phases.append(Phase(variant, name, (end - begin) / 1000, ops_ms, sorted(ops, key=lambda op: -op.ms)))
    return phases
