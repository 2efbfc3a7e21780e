"""The compiled steps of one patched model, and the calls that run them. `patchkit.patches.compile` describes the mechanism."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.compiled.eligibility import autocast_of, is_new_sequence, wants_cache
from patchkit.compiled.options import Options, compiler_options, uses_cudagraphs
from patchkit.compiled.step_arguments import kind_of, packed_arguments, step_of
from patchkit.errors import UnsupportedModel
from patchkit.exclusive import Exclusive
from patchkit.record import Warnings
from patchkit.static_step import FixedCache, LayerOfStep, StepCache
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.runtime import runtime_of

# Warn after 16 forwards of at most 17 tokens each without a compiled step among them.
_IDLE_FORWARDS, _FEW_TOKENS = 16, 17

_logger = logging.getLogger("patchkit")


@dataclass(eq=False)
class Steps:
    """The compiled steps of one patched model.

    Attributes:
        step: the cache of the compiled step that the decoder runs now, or None.
        kind: of that step (`kind_of`).
        compiled: compiled functions by kind.
        idle: forwards of a few tokens since the last compiled step.
        seen: modules of the decoder and their hooks at the beginning of the last sequence.
        hooked: indices of decoder layers with hooks on a module in them: each has its own graph.
    """

    patch: Options
    decoder: nn.Module
    layers: list[nn.Module]
    cache_layers: int
    hits: Counter[str]
    warnings: Warnings
    exclusive: Exclusive = field(default_factory=Exclusive)
    step: StepCache | None = None
    kind: tuple[Any, ...] = ()
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)
    idle: int = 0
    seen: tuple[Any, ...] = ()
    hooked: set[int] = field(default_factory=set)

    def calls(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Return each module with the function for its attribute `COMPILED_CALL`."""
        layers = [(layer, functools.partial(_call_layer, self, index)) for index, layer in enumerate(self.layers)]
        return [(self.decoder, functools.partial(_call_decoder, self)), *layers]

    def run(self, kind: tuple[Any, ...], function: Callable[..., Any], *args: Any) -> Any:
        """Return ``function(*args)``, run as compiled code; calls of one ``kind`` run one graph.

        Raises:
            UnsupportedModel: the function does not compile.
        """
        compiled = self.compiled.get(kind)
        if compiled is None:
            own = types.FunctionType(function.__code__.replace(), function.__globals__)
            options = compiler_options(self.patch, self.decoder)
            compiled = torch.compile(own, fullgraph=self.patch.fullgraph, backend=self.patch.backend, dynamic=False, options=options)
            self.compiled[kind] = compiled
        before, started = _compat.graphs_compiled(), time.perf_counter()
        try:
            output = compiled(*args)
        except _compat.compile_errors() as error:
            raise UnsupportedModel(
                f"a step of {type(self.decoder).__name__} does not compile: {error}\n"
                "Leave compile out; if the message names a graph break, fullgraph=False allows it"
            ) from error
        new = _compat.graphs_compiled() - before
        if new:
            seconds = time.perf_counter() - started
            self.hits["graphs compiled"] += new
            self.hits["compile milliseconds"] += round(1000 * seconds)
            place = f", kept in {_compat.inductor_cache()} for later runs" if self.patch.backend == "inductor" else ""
            _logger.info("patchkit: compiled %d graph(s) of %s in %.1f s%s", new, type(args[0]).__name__, seconds, place)
        return output

    def count_eager(self, reason: str | None, tokens: int) -> None:
        """Count a forward of ``tokens`` tokens as eager, and warn with the reason, once, where that may be a surprise.

        A single forward of a few tokens may be intended. Many in a row should have been compiled steps.
        """
        self.hits["eager forwards"] += 1
        self.idle += tokens <= _FEW_TOKENS
        if not reason and self.idle == _IDLE_FORWARDS:
            reason = f"{_IDLE_FORWARDS} forwards of at most {_FEW_TOKENS} tokens in a row, none of them of one token with a cache"
        if reason:
            self.warnings.add(f"steps of this model run uncompiled: {reason}")

    def forget_if_changed(self) -> None:
        """Drop compiled code where modules or hooks were added or removed, which it does not check itself (`_compat.guard_options`)."""
        modules = tuple(self.decoder.modules())
        now = tuple((id(module), *_compat.forward_hooks_of(module)) for module in modules)
        if self.compiled and now != self.seen:
            self.compiled.clear()
            _logger.info("patchkit: modules or hooks of %s have changed, so its steps will be compiled again", type(self.decoder).__name__)
        if now != self.seen:
            self.hooked = {index for index, layer in enumerate(self.layers) if any(map(_compat.forward_hooks_of, layer.modules()))}
        self.seen = now

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": {}, "step": None, "seen": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules leave this attribute out of their state, so a copy gets it back here; the modules themselves may not be filled yet.
        vars(self).update(state)
        for module, call in self.calls():
            vars(module)[_compat.COMPILED_CALL] = call


def _call_decoder(steps: Steps, *args: Any, **kwargs: Any) -> Any:
    """Call the decoder with its hooks, and with `_forward` in place of its forward."""
    attributes = vars(steps.decoder)
    if "forward" in attributes and getattr(attributes["forward"], "func", None) is not _forward:
        raise UnsupportedModel(
            f"{type(steps.decoder).__name__} was given its own forward after it was patched (accelerate's hooks, say): "
            "unpatch_model first, then wrap it"
        )
    steps.exclusive.take(f"a forward of this {type(steps.decoder).__name__}")
    attributes["forward"] = functools.partial(_forward, steps)
    try:
        return _compat.run_hooks_and_forward(steps.decoder, *args, **kwargs)
    finally:
        attributes.pop("forward", None)
        steps.exclusive.give_back()


def _forward(steps: Steps, *args: Any, **kwargs: Any) -> Any:
    """Run the decoder's forward inside its hooks: compiled where it is a step, otherwise the model's own."""
    decoder: Any = steps.decoder
    runtime = runtime_of(decoder)
    kwargs = {name: value for name, value in _compat.by_name(decoder, args, kwargs).items() if value is not None}
    if runtime is None and wants_cache(decoder, kwargs):
        kwargs[_compat.CACHE] = FixedCache(steps.cache_layers)
    if is_new_sequence(kwargs):
        steps.forget_if_changed()
    step, reason = step_of(decoder, kwargs)
    if step is None:
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        steps.count_eager(reason, 0 if inputs is None else inputs.shape[1])
        if isinstance(kwargs.get(_compat.CACHE), StreamingCache | FixedCache):
            kwargs[_compat.CACHE].autocast = None if inputs is None else autocast_of(inputs.device)
        return type(decoder).forward(decoder, **kwargs)

    cache = kwargs[_compat.CACHE]
    kwargs = packed_arguments(step, kwargs)
    steps.step = step
    steps.kind = kind_of(decoder, step, kwargs)
    graphs = uses_cudagraphs(steps.patch, decoder)
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    try:
        with contextlib.nullcontext() if runtime is None else runtime.running(step):
            if steps.layers:
                output = type(decoder).forward(decoder, **kwargs)
            else:
                output = steps.run(steps.kind, _run_forward, decoder, kwargs)
    finally:
        steps.step = None
    if graphs:  # the next step writes over the memory of this one's output
        output = type(output)(**{name: value.clone() if torch.is_tensor(value) else value for name, value in output.items()})
    if isinstance(cache, FixedCache):
        cache.advance(step.layers[0].slots.shape[0])
    output[_compat.CACHE] = cache
    steps.hits["compiled steps"] += 1
    steps.idle = 0
    return output


def _call_layer(steps: Steps, index: int, *args: Any, **kwargs: Any) -> Any:
    """Call a decoder layer, as compiled code during a step."""
    layer: Any = steps.layers[index]
    step = steps.step
    if step is None:
        return _compat.run_hooks_and_forward(layer, *args, **kwargs)
    mine = LayerOfStep(step, index)
    args = tuple(mine if value is step else value for value in args)
    kwargs = {name: mine if value is step else value for name, value in kwargs.items()}
    own = index if index in steps.hooked else None
    runtime = runtime_of(steps.decoder)
    with contextlib.nullcontext() if runtime is None else runtime.running(mine):
        return steps.run((type(layer), own, *steps.kind), _run_call, layer, args, kwargs)


def _run_forward(decoder: Any, kwargs: dict[str, Any]) -> Any:
    return type(decoder).forward(decoder, **kwargs)


def _run_call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _compat.run_hooks_and_forward(layer, *args, **kwargs)
