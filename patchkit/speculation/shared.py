"""What the calls of `generate` of one patched model share."""

from __future__ import annotations

import functools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.attention import alias_of
from patchkit.errors import PatchConflict
from patchkit.exclusive import Exclusive
from patchkit.handle import Handle
from patchkit.record import Warnings
from patchkit.speculation.acceptance import Acceptance
from patchkit.speculation.controllers import ControllerSession
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.statistics import RunStatistics

# Calls of generate whose statistics are kept.
_MOST_RUNS = 256


_STATE = "_patchkit_speculative"  # the attribute of a model and of its decoder


@dataclass(eq=False)
class Speculation:
    """What the calls of generate of one patched model share.

    Attributes:
        label: the drafter as text.
        controller: lives as long as the patch: what it has measured holds for the next text too.
        ragged: rows may advance by their own numbers of tokens (`find_obstacle`).
        runs: statistics of the last calls.
        aliased: implementations of attention whose alias the model's configs name.
        compiled: forwards of `VERIFIED_LENGTHS` tokens are compiled steps.
        watching, hidden: whether the decoder's hook keeps its output, and the last one.
    """

    drafter: Drafter
    label: str
    acceptance: Acceptance
    controller: ControllerSession
    ragged: bool
    hits: Counter[str]
    warnings: Warnings
    aliased: tuple[str, ...] = ()
    compiled: bool = False
    exclusive: Exclusive = field(default_factory=Exclusive)
    runs: deque[RunStatistics] = field(default_factory=functools.partial(deque, maxlen=_MOST_RUNS))
    watching: bool = False
    hidden: torch.Tensor | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A patched model may be loaded by a process in which nothing was patched yet: its config names the aliases.
        vars(self).update(state)
        for implementation in self.aliased:
            alias_of(implementation)


def statistics_of(model: Any) -> RunStatistics:
    """What the last calls of ``model.generate`` did, up to 256, since the model was patched or since `reset_statistics`.

    Raises:
        PatchConflict: the model is not patched with speculative.
    """
    return RunStatistics.merged(speculation_of(model).runs)


def reset_statistics(model: Any) -> None:
    """Start `statistics_of` afresh; what the controller has learned stays."""
    speculation_of(model).runs.clear()


def speculation_of(module: Any) -> Speculation:
    """The state of a model patched with speculative, or of its decoder.

    Raises:
        PatchConflict: it is not patched with speculative.
    """
    found = vars(module).get(_STATE)
    if found is None:
        raise PatchConflict(f"this {type(module).__name__} is not patched with speculative: patch_model(model, 'speculative') first")
    speculation: Speculation = found
    return speculation


def keep_speculation(handle: Handle, module: Any, speculation: Speculation) -> None:
    """Leave ``speculation`` on a model or its decoder, until it is unpatched."""
    handle.set_attribute(module, _STATE, speculation)
