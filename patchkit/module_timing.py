"""Timing of modules that a patch changes, original against changed, on the machine where it is patched."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from patchkit.errors import NothingMatched, SlowerPatch
from patchkit.record import Record
from patchkit.views import synchronize

TIMED_MODULES = 8


class TimedModule(Protocol):
    """A module in its original and in its changed form.

    Attributes:
        signature: equal for modules that take the same time, such as those of one shape and dtype.
    """

    @property
    def signature(self) -> Any: ...
    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Inputs of ``rows`` tokens."""

    # Both take what `sample` returns.
    @property
    def run_original(self) -> Callable[..., torch.Tensor]: ...
    @property
    def run(self) -> Callable[..., torch.Tensor]: ...


@torch.no_grad()
def milliseconds(modules: Sequence[TimedModule], rows: int) -> tuple[float, float]:
    """Milliseconds in all modules for ``rows`` tokens, original and changed, from interleaved passes over a few modules of every signature.

    The fastest pass counts. One pass goes over different weights, as a token does, so that they come from memory and not from a cache.
    """
    before = after = 0.0
    for signature in dict.fromkeys(module.signature for module in modules):
        alike = [module for module in modules if module.signature == signature]
        timed = alike[: TIMED_MODULES if rows == 1 else 1]
        inputs = timed[0].sample(rows)
        passes: list[list[float]] = [[], []]
        for repetition in range(7 if rows == 1 else 3):
            for times, run in zip(passes, ("run_original", "run"), strict=True):
                synchronize(inputs[0].device)
                started = time.perf_counter()
                for module in timed:
                    getattr(module, run)(*inputs)
                synchronize(inputs[0].device)
                if repetition:
                    times.append(time.perf_counter() - started)
        # The fastest of several passes, since other work on the machine only adds time.
        before += min(passes[0]) / len(timed) * len(alike) * 1e3
        after += min(passes[1]) / len(timed) * len(alike) * 1e3
    return before, after


def report_speed(
    patch: str, modules: Sequence[TimedModule], record: Record, strict: bool, row_counts: tuple[int, ...], otherwise: str
) -> None:
    """Time all modules for each number of rows, 1 (a step of decoding) or 256 (a prompt); warn where they became slower.

    Args:
        otherwise: advice where they are slower throughout.

    Raises:
        SlowerPatch: they are slower, and ``strict`` is set.
    """
    slower: list[str] = []
    faster: list[str] = []
    for rows in row_counts:
        before, after = milliseconds(modules, rows)
        record.measured(f"{rows} row{'s' * (rows > 1)}", f"{before:.3g} -> {after:.3g} ms")
        (slower if after > before else faster).append(
            f"{rows} row{'s' * (rows > 1)} at once: {after:.3g} ms in these layers, {before:.3g} ms unpatched"
        )
    if not slower:
        return
    message = f"{patch} is slower than the original on this machine ({'; '.join(slower)})"
    if strict:
        raise SlowerPatch(f"{message}: leave the patch out, or give strict=False")
    advice = otherwise
    if faster:
        kind, other = ("prompts", "decoding") if slower[0].startswith("256") else ("decoding", "prompts")
        advice = f"and faster with {faster[0]}. Leave the patch out where most of the time goes into {kind}, keep it for {other}"
    record.warn(f"{message}: {advice}", log=True)


def patterns_of(modules: Any) -> tuple[str, ...] | None:
    """Return a patch's option ``modules`` as `selected` takes it: a string is one pattern, and None stays None.

    Raises:
        ValueError: it is neither, nor strings in a list or any other iterable.
    """
    if modules is None:
        return None
    patterns = (modules,) if isinstance(modules, str) else tuple(modules) if isinstance(modules, Iterable) else ()
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"modules={modules!r}: give names or patterns such as ['*.down_proj'], or None for all")
    return patterns


def selected(patterns: tuple[str, ...] | None, names: list[str], kind: str, model: str) -> set[str]:
    """Return the ``names`` that match ``patterns``; None matches all.

    Args:
        kind: what is named, "linear layer"; model: the model's name; both for the message.

    Raises:
        NothingMatched: a pattern matches no name.
    """
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")]
        if not matched:
            raise NothingMatched(
                f"modules={list(patterns)}: {pattern!r} matches no {kind} of {model}. "
                f"There are {len(names)}, such as {', '.join(names[:4])}"
            )
        chosen.update(matched)
    return chosen
