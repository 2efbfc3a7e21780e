"""What the hooks of one patched model share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from patchkit import _compat
from patchkit.anatomy.rotary import Rotary
from patchkit.anatomy.target import Target
from patchkit.attention import Masks, alias_of
from patchkit.exclusive import Exclusive
from patchkit.handle import Handle
from patchkit.record import Warnings
from patchkit.static_step import StepCache
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.rule import ForwardContext, LayerRule, Plan


@dataclass(eq=False)
class Frequencies:
    """The buffer ``module.name`` that holds the frequencies of ``rotary``, and how to recognise the one that was read last."""

    rotary: Rotary
    module: nn.Module
    name: str
    read: tuple[Any, ...] = ()

    def follow(self) -> None:
        """Read the buffer again if it is another one, or was written to."""
        buffer: Any = _compat.buffers_of(self.module)[self.name]
        now = id(buffer), buffer.data_ptr(), buffer.dtype, _compat.version_of(buffer)
        if now != self.read:
            self.read = now
            self.rotary.follow(buffer)


def frequencies_of(target: Target, plan: Plan) -> list[Frequencies]:
    if {"dynamic", "longrope"} & set(_compat.rope_types(target.config)):
        return []  # the model writes to the buffer in its own forward; the frequencies are those of a short text
    modules = dict(target.model.named_modules())
    # Rules share the rotation of one of their layers; a layer rotates its queries by its own.
    rules, layers = plan.rules.values(), [layer for layer in target.attention_layers if layer.index in plan.rules]
    rotaries: dict[int, Rotary] = {}
    for each in [rule.rotary for rule in rules] + [layer.rotary for layer in layers]:
        if each is not None:
            rotaries[id(each)] = each
    found = []
    for rotary in rotaries.values():
        path, _, name = rotary.buffer.removeprefix("-").rpartition(".")
        found.append(Frequencies(rotary, modules[path], name))
    return found


_STATE = "_patchkit_streaming"  # the attribute of a decoder


@dataclass(eq=False)
class Runtime:
    """State that the hooks of one patched model share. ``context`` is set while its decoder runs.

    Attributes:
        counters: the rule that each patch has brought, and the patch's hits.
        implementations: of attention, that the configs named before.
        warnings: of the first patch.
        configs: those in which the alias of our attention must stand.
        frequencies: where those of the rules' rotations come from.
        mask_configs: those by which the model's masks are made.
    """

    plan: Plan
    counters: list[tuple[LayerRule, Counter[str]]]
    implementations: tuple[str, ...]
    warnings: Warnings
    configs: list[Any] = dataclasses.field(default_factory=list)
    frequencies: list[Frequencies] = dataclasses.field(default_factory=list)
    exclusive: Exclusive = dataclasses.field(default_factory=Exclusive)
    context: ForwardContext | None = None
    cache: StreamingCache | None = None
    own_masks: Masks | None = None  # while a forward is under way, what its masks come from,
    outer_masks: Masks | None = None  # and what they came from before
    mask_configs: tuple[Any, ...] = ()
    step: StepCache | None = None  # while a fixed step runs, whose tensors are at fixed addresses

    @contextlib.contextmanager
    def running(self, step: StepCache) -> Iterator[None]:
        """Within this context, attention reads cache and masks of ``step``, which `StreamingCache.fixed_step` has handed out."""
        self.step = step
        try:
            yield
        finally:
            self.step = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A patched model may be loaded by a process in which nothing was patched yet: its config names the aliases.
        vars(self).update(state)
        for implementation in self.implementations:
            alias_of(implementation)


def runtime_of(decoder: nn.Module) -> Runtime | None:
    """The streaming state of a patched decoder; None of one that does not stream."""
    return vars(decoder).get(_STATE)


def keep_runtime(handle: Handle, decoder: nn.Module, runtime: Runtime) -> None:
    """Leave ``runtime`` on the decoder, until it is unpatched."""
    handle.set_attribute(decoder, _STATE, runtime)
