"""State that the hooks of one patched model share."""

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
    """The buffer ``module.name`` that holds the frequencies of ``rotary``; ``read`` identifies the version that was read last."""

    rotary: Rotary
    module: nn.Module
    name: str
    read: tuple[Any, ...] = ()

    def follow(self) -> None:
        """Read the buffer again if it has been replaced or written to."""
        buffer: Any = _compat.buffers_of(self.module)[self.name]
        now = id(buffer), buffer.data_ptr(), buffer.dtype, _compat.version_of(buffer)
        if now != self.read:
            self.read = now
            self.rotary.follow(buffer)


def frequencies_of(target: Target, plan: Plan) -> list[Frequencies]:
    """The buffers with the frequencies of a plan's rotary embeddings; none where the model itself changes them (dynamic RoPE)."""
    if {"dynamic", "longrope"} & set(_compat.rope_types(target.config)):
        return []  # the model writes to the buffer in its own forward; the frequencies are those of a short sequence
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
    """State that the hooks of one patched model share.

    Attributes:
        counters: for each patch, its main rule and its hits.
        implementations: names of the attention implementations before patching.
        warnings: of the first patch.
        configs: configs that must name the alias of patchkit's attention.
        frequencies: buffers with the frequencies of the rules' rotary embeddings.
        context: set while the decoder runs, as is ``cache``.
        mask_configs: configs from which the model's masks are made.
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
    own_masks: Masks | None = None  # during a forward, the builder of its masks,
    outer_masks: Masks | None = None  # and the builder that was set before
    mask_configs: tuple[Any, ...] = ()
    step: StepCache | None = None  # while a fixed step runs, whose tensors are at fixed addresses

    @contextlib.contextmanager
    def running(self, step: StepCache) -> Iterator[None]:
        """Make attention read the cache and masks of ``step``, from `StreamingCache.fixed_step`, within this context."""
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
    """The streaming state of a decoder; None if it does not stream."""
    return vars(decoder).get(_STATE)


def keep_runtime(handle: Handle, decoder: nn.Module, runtime: Runtime) -> None:
    """Set ``runtime`` on the decoder, until it is unpatched."""
    handle.set_attribute(decoder, _STATE, runtime)
