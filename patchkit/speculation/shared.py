"""State that the calls of `generate` of one patched model share, and its statistics."""

from __future__ import annotations

import functools
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.attention import alias_of
from patchkit.errors import PatchConflict
from patchkit.exclusive import Exclusive
from patchkit.freshness import WeightWatch
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
    """State that the calls of `generate` of one patched model share.

    Attributes:
        label: the drafter as text.
        controller: lives as long as the patch, so that its measurements serve later calls.
        ragged: rows may advance by different numbers of tokens (`find_obstacle`).
        runs: statistics of the last calls.
        aliased: attention implementations whose alias the model's configs name.
        compiled: forwards of `VERIFIED_LENGTHS` tokens are compiled steps.
        watching: the decoder's hook keeps hidden states.
        hidden: [R, T, D], the hidden states of the last forward, with the outputs of `layers` behind them; None while not watching.
        layers: decoder layers, by index, whose outputs are kept too.
        outputs: of these layers in the current forward, [R, T, D] each.
        weights: tells whether the model's weights have changed since the last call.
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
    layers: tuple[int, ...] = ()
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    weights: WeightWatch | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A patched model may be loaded by a process in which nothing was patched yet: its config names the aliases.
        vars(self).update(state)
        for implementation in self.aliased:
            alias_of(implementation)


def statistics_of(model: Any) -> RunStatistics:
    """Statistics of the last calls of ``model.generate``, up to 256, since the model was patched or since `reset_statistics`.

    Raises:
        PatchConflict: the model is not patched with speculative.
    """
    return RunStatistics.merged(speculation_of(model).runs)


def reset_statistics(model: Any) -> None:
    """Clear the runs that `statistics_of` reports. The controller keeps its measurements.

    Raises:
        PatchConflict: the model is not patched with speculative.
    """
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
    """Set ``speculation`` on a model or its decoder, until it is unpatched."""
    handle.set_attribute(module, _STATE, speculation)
