"""The compiled steps of one patched model: how a decoder's call becomes one."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from patchkit import _compat
from patchkit.compiled.eligibility import TENSORS, autocast_of, is_new_text, wants_cache, why_eager
from patchkit.errors import UnsupportedModel
from patchkit.exclusive import Exclusive
from patchkit.record import Warnings
from patchkit.static_step import FixedCache, LayerOfStep, StepCache
from patchkit.streaming.cache import StreamingCache
from patchkit.streaming.runtime import runtime_of

# So many forwards of at most so many tokens without a compiled step among them are worth a remark.
_IDLE_FORWARDS, _FEW_TOKENS = 16, 17

_logger = logging.getLogger("patchkit")


class Options(Protocol):
    """The options of the patch `compile`."""

    @property
    def mode(self) -> str: ...
    @property
    def fullgraph(self) -> bool: ...
    @property
    def cudagraphs(self) -> bool: ...
    @property
    def backend(self) -> str: ...


@dataclass(eq=False)
class Steps:
    """The compiled steps of one patched model.

    Attributes:
        step: set while its decoder runs one.
        idle: forwards of a few tokens since the last compiled step.
        seen: modules of the decoder and their hooks at the beginning of the last text.
        hooked: indices of decoder layers with hooks on a module in them: each has a graph of its own.
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
        """Each module with what stands in its `COMPILED_CALL`."""
        layers = [(layer, functools.partial(_call_layer, self, index)) for index, layer in enumerate(self.layers)]
        return [(self.decoder, functools.partial(_call_decoder, self)), *layers]

    def run(self, kind: tuple[Any, ...], function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, compiled; the same ``kind`` always runs the same graph.

        Raises:
            UnsupportedModel: it does not compile.
        """
        compiled = self.compiled.get(kind)
        if compiled is None:
            own = types.FunctionType(function.__code__.replace(), function.__globals__)
            options = _options(self.patch, self.decoder)
            compiled = torch.compile(own, fullgraph=self.patch.fullgraph, backend=self.patch.backend, dynamic=False, options=options)
            self.compiled[kind] = compiled
        before, started = _compat.graphs_compiled(), time.perf_counter()
        try:
            output = compiled(*args)
        except _compat.compile_errors() as error:
            raise UnsupportedModel(
                f"a step of {type(self.decoder).__name__} does not compile: {error}\n"
                "Leave compile out, or, where it says graph break, allow them with fullgraph=False"
            ) from error
        new = _compat.graphs_compiled() - before
        if new:
            seconds = time.perf_counter() - started
            self.hits["graphs compiled"] += new
            self.hits["compile milliseconds"] += round(1000 * seconds)
            place = f", kept in {_compat.inductor_cache()} for later runs" if self.patch.backend == "inductor" else ""
            _logger.info("patchkit: compiled %d graph(s) of %s in %.1f s%s", new, type(args[0]).__name__, seconds, place)
        return output

    def eager(self, reason: str | None, tokens: int) -> None:
        """Count a forward of ``tokens`` tokens as eager; say why, once, where that may come as a surprise.

        A single forward of a few tokens is nothing to speak of, but many in a row are what compiled steps are for.
        """
        self.hits["eager forwards"] += 1
        self.idle += tokens <= _FEW_TOKENS
        if not reason and self.idle == _IDLE_FORWARDS:
            reason = f"{_IDLE_FORWARDS} forwards of at most {_FEW_TOKENS} tokens, one after the other, were none of one token with a cache"
        if reason:
            self.warnings.add(f"steps of this model run uncompiled: {reason}")

    def forget_if_changed(self) -> None:
        """Compile again where modules or hooks were added or taken away, which compiled code does not look at (`_compat.guard_options`)."""
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
    """The decoder's call: its hooks as ever, and beneath them `_forward`."""
    attributes = vars(steps.decoder)
    if "forward" in attributes and getattr(attributes["forward"], "func", None) is not _forward:
        raise UnsupportedModel(
            f"{type(steps.decoder).__name__} was given a forward of its own after it was patched (accelerate's hooks, say): "
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
    """The decoder's forward beneath its hooks: compiled where it is a step, else the model's own."""
    decoder: Any = steps.decoder
    runtime = runtime_of(decoder)
    kwargs = {name: value for name, value in _compat.by_name(decoder, args, kwargs).items() if value is not None}
    if runtime is None and wants_cache(decoder, kwargs):
        kwargs[_compat.CACHE] = FixedCache(steps.cache_layers)
    step = _step_of(steps, decoder, kwargs)
    if step is None:
        if is_new_text(kwargs):
            steps.forget_if_changed()
        if isinstance(kwargs.get(_compat.CACHE), StreamingCache | FixedCache):
            inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            kwargs[_compat.CACHE].autocast = None if inputs is None else autocast_of(inputs.device)
        return type(decoder).forward(decoder, **kwargs)

    cache = kwargs[_compat.CACHE]
    # One set of arguments, and one layout, whoever calls: a graph is made for both.
    kwargs = {name: _packed(kwargs[name]) for name in TENSORS if name in kwargs} | {_compat.CACHE: step, "use_cache": True}
    steps.step = step
    steps.kind = _kind(step, kwargs)
    graphs = _uses_cudagraphs(steps.patch, decoder)
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
    """A decoder layer's call: compiled while a step is under way."""
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


def _step_of(steps: Steps, decoder: Any, kwargs: dict[str, Any]) -> StepCache | None:
    """The forward as compiled code sees it, with its mask and positions among ``kwargs``; None, counted, where it runs eagerly."""
    cache = kwargs.get(_compat.CACHE)
    reason = why_eager(decoder, kwargs)
    step: StepCache | None = None
    if reason is None and isinstance(cache, StreamingCache):
        step = cache.fixed_step()
        if step is not None:
            kwargs["attention_mask"] = step.masks[0]  # not used: it keeps the model from making one
    elif reason is None and isinstance(cache, FixedCache):
        step = _fixed_step(decoder, cache, kwargs)
    if step is None:
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        steps.eager(reason, 0 if inputs is None else inputs.shape[1])
    return step


def _fixed_step(decoder: Any, cache: FixedCache, kwargs: dict[str, Any]) -> StepCache:
    inputs, mask = kwargs.get("input_ids", kwargs.get("inputs_embeds")), kwargs.get("attention_mask")
    assert inputs is not None
    step = cache.fixed_step(inputs.shape[1])
    if mask is not None:
        kwargs["attention_mask"] = nn.functional.pad(mask.to(torch.int64), (0, cache.room - mask.shape[1]))
        return step
    # Some models make a mask of as many ones as tokens were seen, or take positions from it.
    kwargs["attention_mask"] = inputs.new_ones(len(inputs), cache.room, dtype=torch.int64)
    if "position_ids" in _compat.argument_names(decoder):
        kwargs.setdefault("position_ids", step.layers[0].slots.expand(len(inputs), -1))
    return step


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the strides of a fresh tensor; `contiguous` would leave those of dimensions of size 1 as they are."""
    return tensor.clone(memory_format=torch.contiguous_format)


def _kind(step: StepCache, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a graph is made for; steps that differ in this have graphs of their own."""
    shapes = tuple((name, value.shape, value.dtype) for name, value in kwargs.items() if torch.is_tensor(value))
    masks = tuple(mask.shape for mask in step.masks)
    layer: Any = step.layers[0]
    return shapes, masks, layer.keys.shape, layer.keys.dtype, torch.is_inference_mode_enabled(), autocast_of(layer.keys.device)


def _uses_cudagraphs(patch: Options, decoder: Any) -> bool:
    return patch.cudagraphs or (patch.mode == "reduce-overhead" and decoder.device.type == "cuda")


def _options(patch: Options, decoder: Any) -> dict[str, Any]:
    """Of torch.compile, where mode and options exclude each other."""
    options: dict[str, Any] = _compat.guard_options()
    if patch.backend == "inductor":
        options.update({"size_asserts": False, "nan_asserts": False, "scalar_asserts": False})
        options["triton.cudagraphs"] = _uses_cudagraphs(patch, decoder)
        if patch.mode == "max-autotune":
            options.update({"max_autotune": True, "coordinate_descent_tuning": True})
        if patch.mode == "reduce-overhead" and decoder.device.type == "cpu":
            options["cpp_wrapper"] = True
    return options
