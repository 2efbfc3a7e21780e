"""torch.compile for decoding: each step is one graph, compiled once, whatever the length of the text.

Compiled code must not depend on a Python number that changes from step to step. A step is therefore handed over as a
`StepCache`: buffers of fixed shape at fixed addresses, the slot of the new token and, in a stream, the sinks' turn and the
masks, all of them tensors. Prompts and other forwards of several tokens run eagerly, and are counted as such; only those with
which `speculative` verifies drafts are steps too, in the few lengths to which it rounds them up.

Where steps come from:

* with `streaming`, from its ring: one graph serves the filling and the full window, and rows with left padding;
* without, from a `FixedCache`, which a first forward without a cache makes, and `generate` too. It has room for a power of two
  of tokens, at least 512, and doubles when that is used up; a room that was not met before is compiled once more. A cache
  of the caller's own, a `DynamicCache` say, runs eagerly, with a line in the log.

Hooks on the decoder, among them the bookkeeping of `streaming`, stay outside the graph. PyTorch's own place for a compiled
call, ``_compiled_call_impl``, takes the whole call of a module, hooks included; what stands there is a function that runs
`Module._call_impl`, and has it find the compiled forward beneath the hooks for the time of that call. So no forward is
reassigned on a model at rest. Copies and pickles of a module leave that attribute out; `Steps` puts it back, and compiles again.

Every kind of step (batch size, room, ...) has a code object of its own: dynamo keeps compiled code, and counts
recompilations, by code object, and drops it with the function. Guards that only ask whether a module was edited since, or
a function of a library replaced, are left out: on a small model their number is what a step waits for. Guards on tensors,
types and constants stay. Instead, modules and hooks are compared at the beginning of every text (`Steps.forget_if_changed`).
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from patchkit import _compat
from patchkit.compiled.step import FixedCache, LayerOfStep, StepCache
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.exclusive import Exclusive
from patchkit.handle import Handle
from patchkit.patch import Patch, Stage, register_patch
from patchkit.record import Notices
from patchkit.streaming.cache import StreamingCache
from patchkit.target import Target

MODES = ("default", "reduce-overhead", "max-autotune")
# What a step may be called with and still be compiled; other arguments ask for something that only an eager forward gives.
_TENSORS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids")
_PLAIN = {*_TENSORS, _compat.CACHE, "use_cache", "return_dict"}
_ASKING = ("output_attentions", "output_hidden_states", "output_router_logits")

# So many forwards of at most so many tokens without a compiled step among them are worth a remark.
_IDLE_FORWARDS, _FEW_TOKENS = 16, 17

# The room that `generate` is given at first, in tokens, however many it may make.
_MOST_ROOM = 4096

_logger = logging.getLogger("patchkit")


@register_patch("compile")
@dataclass(frozen=True)
class Compile(Patch):
    """Run every decoding step as compiled code (torch.compile).

    Args:
        mode: "default"; "reduce-overhead", less time between kernels: CUDA graphs on a GPU, generated C++ instead of Python around
            the kernels on a CPU (a longer compilation); "max-autotune", kernels chosen by timing them.
        fullgraph: a step that cannot become one graph is an error; False allows graph breaks.
        cudagraphs: record CUDA graphs in any mode. Needs a CUDA device.
        scope: "model" makes one graph of the decoder; "layers" one of each kind of decoder layer, which compiles in the time of a
            layer and leaves the calls between layers to Python.
        backend: of torch.compile. Others than "inductor" ignore mode.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.COMPILE
    exact = True
    acts = ("compiled steps",)

    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    fullgraph: bool = True
    cudagraphs: bool = False
    scope: Literal["layers", "model"] = "model"
    backend: str = "inductor"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: give one of {', '.join(map(repr, MODES))}")
        if self.scope not in ("layers", "model"):
            raise ValueError(f"scope={self.scope!r}: give 'model' (one graph) or 'layers' (one for each kind of layer)")
        for name in ("fullgraph", "cudagraphs"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False")
        if not isinstance(self.backend, str):
            raise ValueError(f"backend={self.backend!r}: give the name of a backend, one of torch.compiler.list_backends()")

    @classmethod
    def candidates(cls, target: Target) -> list[Compile]:
        return [cls(), cls(mode="reduce-overhead")]

    def check(self, target: Target) -> None:
        _compat.compiler_check()
        name = type(target.model).__name__
        if self.backend not in _compat.compiler_backends():
            raise UnsupportedModel(f"backend={self.backend!r} is not known to torch.compile here: {', '.join(_compat.compiler_backends())}")
        if self.cudagraphs and target.model.device.type != "cuda":
            raise UnsupportedModel(
                f"cudagraphs=True needs a CUDA device, and {name} is on {target.model.device.type}: leave it out, or move the model first"
            )
        devices = {str(parameter.device) for parameter in target.model.parameters()}
        if len(devices) > 1 or "meta" in devices:
            raise UnsupportedModel(f"{name} is spread over {', '.join(sorted(devices))}: compile needs all of it on one device")
        if any("forward" in vars(module) for module in target.model.modules()):
            raise UnsupportedModel(f"modules of {name} have a forward of their own (accelerate's hooks, say): compile would not run it")
        kinds = {type(layer) for layer in _compat.DynamicCache(config=target.config).layers}
        for kind in sorted(kinds - {_compat.DynamicLayer, _compat.DynamicSlidingWindowLayer}, key=str):
            raise UnsupportedModel(f"{name} has cache layers of type {kind.__name__}: compile serves layers of keys and values only")
        for layer in target.attention_layers:
            if layer.kind not in ("full", "sliding"):
                raise UnsupportedModel(f"compile serves no {layer.kind} attention, which {name} has in layer {layer.index} ({layer.name})")
            if layer.alibi == "position_bias":
                raise UnsupportedModel(f"{name} cuts its ALiBi bias to the number of tokens seen, so no two steps would be one graph")
        if "dynamic" in _compat.rope_types(target.config):
            raise UnsupportedModel(f"{name} looks at its positions to choose rotary frequencies (rope_type 'dynamic'): a graph break")
        if self.scope == "layers":
            _decoder_layers(target)

    def apply(self, target: Target, handle: Handle) -> None:
        decoder = target.decoder
        runtime = decoder.__dict__.get("_patchkit_streaming")
        if runtime is not None:
            _refuse_stream(runtime.plan)
        layers = _decoder_layers(target) if self.scope == "layers" else []
        cache_layers = len(_compat.DynamicCache(config=target.config).layers)
        steps = Steps(self, decoder, layers, cache_layers, handle.hits, handle.notices)
        handle.set_attribute(decoder, "_patchkit_compile", steps)  # for copies: see `Steps.__setstate__`
        for module, call in steps.calls():
            handle.set_attribute(module, "_compiled_call_impl", call)
        if runtime is None:
            prepare = functools.partial(_prepare_cache, target.model, steps)
            handle.set_attribute(target.model, "_prepare_cache_for_generation", prepare)
        handle.changed("decoder layers" if layers else "decoders", len(layers) or 1)


def _decoder_layers(target: Target) -> list[nn.Module]:
    """The modules, one around each attention module, that the decoder runs one after the other."""
    modules = dict(target.model.named_modules())
    found: dict[int, nn.Module] = {}
    for layer in target.attention_layers:
        path = layer.name.split(".")
        inside = [".".join(path[:end]) for end in range(1, len(path) + 1)]
        listed = [name for parent, name in itertools.pairwise(inside) if isinstance(modules.get(parent), nn.ModuleList)]
        if not listed:
            raise NothingMatched(f"{layer.name} of {type(target.model).__name__} is in no list of layers: use scope='model'")
        found[id(modules[listed[0]])] = modules[listed[0]]
    return list(found.values())


def _refuse_stream(plan: Any) -> None:
    if not plan.owns_all:
        raise UnsupportedModel(
            "streaming or linear with layers= (or beside chunked layers) leaves caches that grow, so no two steps would be one graph: "
            "leave compile out, or patch all layers"
        )
    if plan.has_alibi:
        raise UnsupportedModel("streaming makes an ALiBi bias anew at every step, which cannot be compiled: leave one of the two out")


# -- run time --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Steps:
    """The compiled steps of one patched model.

    Attributes:
        step: set while its decoder runs one.
        idle: forwards of a few tokens since the last compiled step.
        seen: modules of the decoder and their hooks at the beginning of the last text.
        hooked: indices of decoder layers with hooks on a module in them: each has a graph of its own.
    """

    patch: Compile
    decoder: nn.Module
    layers: list[nn.Module]
    cache_layers: int
    hits: Counter[str]
    notices: Notices
    exclusive: Exclusive = field(default_factory=Exclusive)
    step: StepCache | None = None
    kind: tuple[Any, ...] = ()
    compiled: dict[tuple[Any, ...], Callable[..., Any]] = field(default_factory=dict)
    idle: int = 0
    seen: tuple[Any, ...] = ()
    hooked: set[int] = field(default_factory=set)

    def calls(self) -> list[tuple[nn.Module, Callable[..., Any]]]:
        """Each module with what stands in its ``_compiled_call_impl``."""
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
            self.notices.say(f"steps of this model run uncompiled: {reason}")

    def forget_if_changed(self) -> None:
        """Compile again where modules or hooks were added or taken away, which compiled code does not look at (`_compat.guard_options`)."""
        modules = tuple(self.decoder.modules())
        now = tuple((id(module), *module._forward_pre_hooks, *module._forward_hooks) for module in modules)
        if self.compiled and now != self.seen:
            self.compiled.clear()
            _logger.info("patchkit: modules or hooks of %s have changed, so its steps will be compiled again", type(self.decoder).__name__)
        if now != self.seen:
            self.hooked = {index for index, layer in enumerate(self.layers) if any(map(_has_hooks, layer.modules()))}
        self.seen = now

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "compiled": {}, "step": None, "seen": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Modules leave this attribute out of their state, so a copy gets it back here; the modules themselves may not be filled yet.
        vars(self).update(state)
        for module, call in self.calls():
            vars(module)["_compiled_call_impl"] = call


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
        return steps.decoder._call_impl(*args, **kwargs)
    finally:
        attributes.pop("forward", None)
        steps.exclusive.give_back()


def _forward(steps: Steps, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward beneath its hooks: compiled where it is a step, else the model's own."""
    decoder: Any = steps.decoder
    runtime = decoder.__dict__.get("_patchkit_streaming")
    kwargs = {name: value for name, value in _compat.by_name(decoder, args, kwargs).items() if value is not None}
    if runtime is None and _wants_cache(decoder, kwargs):
        kwargs[_compat.CACHE] = FixedCache(steps.cache_layers)
    step = _step_of(steps, decoder, kwargs)
    if step is None:
        if _is_new_text(kwargs):
            steps.forget_if_changed()
        if isinstance(kwargs.get(_compat.CACHE), StreamingCache | FixedCache):
            inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
            kwargs[_compat.CACHE].autocast = None if inputs is None else _autocast(inputs.device)
        return type(decoder).forward(decoder, **kwargs)

    cache = kwargs[_compat.CACHE]
    # One set of arguments, and one layout, whoever calls: a graph is made for both.
    kwargs = {name: _packed(kwargs[name]) for name in _TENSORS if name in kwargs} | {_compat.CACHE: step, "use_cache": True}
    steps.step = step
    steps.kind = _kind(step, kwargs)
    if runtime is not None:
        runtime.masks, runtime.step = step.masks, step
    graphs = _uses_cudagraphs(steps.patch, decoder)
    if graphs:
        torch.compiler.cudagraph_mark_step_begin()
    try:
        if steps.layers:
            output = type(decoder).forward(decoder, **kwargs)
        else:
            output = steps.run(steps.kind, _run_forward, decoder, kwargs)
    finally:
        steps.step = None
        if runtime is not None:
            runtime.masks = runtime.step = None
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
        return layer._call_impl(*args, **kwargs)
    mine = LayerOfStep(step, index)
    runtime = steps.decoder.__dict__.get("_patchkit_streaming")
    if runtime is not None:
        runtime.step = mine
    args = tuple(mine if value is step else value for value in args)
    kwargs = {name: mine if value is step else value for name, value in kwargs.items()}
    own = index if index in steps.hooked else None
    return steps.run((type(layer), own, *steps.kind), _run_call, layer, args, kwargs)


def _run_forward(decoder: Any, kwargs: dict[str, Any]) -> Any:
    return type(decoder).forward(decoder, **kwargs)


def _run_call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer._call_impl(*args, **kwargs)


def _wants_cache(decoder: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is the first forward of a text, for which the model would make a cache."""
    if _compat.CACHE in kwargs or decoder.training or torch.is_grad_enabled():
        return False
    return bool(kwargs.get("use_cache", getattr(decoder.config, "use_cache", True)))


def _step_of(steps: Steps, decoder: Any, kwargs: dict[str, Any]) -> StepCache | None:
    """The forward as compiled code sees it, with its mask and positions among ``kwargs``; None, counted, where it runs eagerly."""
    cache = kwargs.get(_compat.CACHE)
    reason = _why_eager(decoder, kwargs)
    step: StepCache | None = None
    if reason is None and isinstance(cache, StreamingCache):
        step = cache.step()
        if step is not None and step.masks is not None:
            kwargs["attention_mask"] = step.masks[0]  # not used: it keeps the model from making one
    elif reason is None and isinstance(cache, FixedCache):
        step = _fixed_step(decoder, cache, kwargs)
    if step is None:
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        steps.eager(reason, 0 if inputs is None else inputs.shape[1])
    return step


def _why_eager(decoder: Any, kwargs: dict[str, Any]) -> str | None:
    """Why a forward cannot run compiled, "" where that is a matter of course; None if it can."""
    cache, mask = kwargs.get(_compat.CACHE), kwargs.get("attention_mask")
    inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
    if decoder.training and not torch.is_grad_enabled():
        return "the model is in training mode, call model.eval()"
    if cache is None or cache.get_seq_length() == 0 or inputs is None or decoder.training:
        return ""
    if isinstance(cache, FixedCache) and not cache.step_lengths:
        return "rows of the batch advance by different numbers of tokens"
    if inputs.shape[1] not in (cache.step_lengths if isinstance(cache, FixedCache) else (1,)):
        return ""
    given = {name: value for name, value in kwargs.items() if name not in _PLAIN and not _compat.means_nothing_to_a_model(value)}
    asked = [name for name, value in given.items() if value is not False]
    asked += [name for name in _ASKING if getattr(decoder.config, name, False)]
    if asked or kwargs.get("return_dict") is False:
        return f"they are called with {', '.join(asked) or 'return_dict=False'}"
    if torch.is_grad_enabled():
        return "gradients are enabled, put torch.no_grad() around them"
    if not isinstance(cache, StreamingCache | FixedCache):
        return f"they are given a {type(cache).__name__}, leave {_compat.CACHE} out of the first call"
    if _autocast(inputs.device) != cache.autocast:
        return ""  # an eager forward finds out in which dtype the cache goes on
    if isinstance(cache, StreamingCache):
        return None
    if mask is not None and (not torch.is_tensor(mask) or mask.ndim != 2):
        return "they are given a mask that is not [batch, tokens]"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks or module._forward_hooks)


def _is_new_text(kwargs: dict[str, Any]) -> bool:
    cache = kwargs.get(_compat.CACHE)
    return cache is None or cache.get_seq_length() == 0


def _autocast(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast is on for, or None."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def _fixed_step(decoder: Any, cache: FixedCache, kwargs: dict[str, Any]) -> StepCache:
    inputs, mask = kwargs.get("input_ids", kwargs.get("inputs_embeds")), kwargs.get("attention_mask")
    assert inputs is not None
    step = cache.step(inputs.shape[1])
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
    masks = () if step.masks is None else tuple(mask.shape for mask in step.masks)
    layer: Any = step.layers[0]
    return shapes, masks, layer.keys.shape, layer.keys.dtype, torch.is_inference_mode_enabled(), _autocast(layer.keys.device)


def _uses_cudagraphs(patch: Compile, decoder: Any) -> bool:
    return patch.cudagraphs or (patch.mode == "reduce-overhead" and decoder.device.type == "cuda")


def _options(patch: Compile, decoder: Any) -> dict[str, Any]:
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


def _prepare_cache(
    model: Any,
    steps: Steps,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """`GenerationMixin._prepare_cache_for_generation`, with our cache where it would make a dynamic or static one."""
    if generation_config.use_cache is False:
        steps.notices.say("steps of this model run uncompiled: generate was called with use_cache=False")
    given, kind = model_kwargs.get(_compat.CACHE), generation_config.cache_implementation
    prepare = type(model)._prepare_cache_for_generation
    if given is not None or kind not in (None, "dynamic", "static"):
        return prepare(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    generation_config.cache_implementation = None
    result = prepare(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    generation_config.cache_implementation = kind
    if model_kwargs.get(_compat.CACHE) is not None:
        # A limit far beyond what will be generated must not cost memory, nor make every step read it.
        model_kwargs[_compat.CACHE] = FixedCache(steps.cache_layers, min(max_cache_length, _MOST_ROOM))
    return result
