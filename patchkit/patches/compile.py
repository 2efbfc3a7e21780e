"""torch.compile for decoding: each step is one graph, compiled once, whatever the length of the sequence.

1. A step works on a `StepCache`: tensors of fixed shape at fixed addresses (buffers, slots, masks, sink rotation) and no Python number
   that changes. `streaming` makes it from its ring, for filling and full windows; otherwise a `FixedCache` does, which starts with room
   for 512 tokens and doubles. Each new room compiles once. Other caches run eagerly, with a warning; so do prompts, without one.
2. torch calls ``_compiled_call_impl`` of a module, if that is set, in place of the module. `Steps` sets it to a function that installs
   the compiled forward, runs `Module._call_impl`, so that hooks run eagerly around it, and removes the forward again.
3. Copies and pickles of a module leave that attribute out; `Steps.__setstate__` sets it again, and the copy compiles again.
4. Every kind of step (batch size, room, ...) has its own code object, because dynamo keeps compiled code by code object.
5. Guards on modules and library functions are left out, because checking them takes most of a step's time on small models. `Steps`
   compares modules and hooks at the beginning of every sequence instead. Guards on tensors, types and constants stay.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from patchkit import _compat
from patchkit.anatomy.target import Target
from patchkit.compiled.generate import prepare_cache
from patchkit.compiled.steps import Steps
from patchkit.errors import NothingMatched, UnsupportedModel
from patchkit.handle import Handle
from patchkit.patch import Facts, Patch, Stage, register_patch
from patchkit.streaming.runtime import runtime_of

MODES = ("default", "reduce-overhead", "max-autotune")


@register_patch("compile")
@dataclass(frozen=True)
class Compile(Patch):
    """Run every decoding step as compiled code (torch.compile).

    Forwards of several tokens run eagerly, except those in which `speculative` verifies drafts.

    Args:
        mode: "default"; "reduce-overhead", less time between kernels: CUDA graphs on a GPU, generated C++ instead of Python around
            the kernels on a CPU (a longer compilation); "max-autotune", kernels chosen by timing them.
        fullgraph: a step that cannot become one graph is an error; False allows graph breaks.
        cudagraphs: record CUDA graphs in any mode. Needs a CUDA device.
        scope: "model" makes one graph of the decoder; "layers" makes one graph of each kind of decoder layer, which compiles in the time
            of one layer and leaves the calls between layers to Python.
        backend: name of a backend of torch.compile. Only "inductor" uses ``mode``.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.COMPILE
    exact = True
    acts = ("compiled steps",)
    example = "compile(backend=eager)"
    facts = Facts(
        goal="no Python between kernels",
        exact="yes, to rounding",
        cost="compilation, once per kind of step: reported, and kept on disk",
        source="[torch.compile](https://docs.pytorch.org/docs/stable/torch.compiler.html)",
    )

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
            remedy = _compat.loaded_by(target.model)
            raise UnsupportedModel(
                f"modules of {name} have their own forward (accelerate's hooks, say), which compile would not run{remedy}"
            )
        kinds = {type(layer) for layer in _compat.DynamicCache(config=target.config).layers}
        for kind in sorted(kinds - {_compat.DynamicLayer, _compat.DynamicSlidingWindowLayer}, key=str):
            raise UnsupportedModel(f"{name} has cache layers of type {kind.__name__}: compile serves layers of keys and values only")
        for layer in target.attention_layers:
            if layer.kind not in ("full", "sliding"):
                raise UnsupportedModel(f"compile serves no {layer.kind} attention, which {name} has in layer {layer.index} ({layer.name})")
            if layer.alibi == "position_bias":
                raise UnsupportedModel(f"{name} cuts its ALiBi bias to the number of tokens seen, so no two steps would be one graph")
        if "dynamic" in _compat.rope_types(target.config):
            raise UnsupportedModel(f"{name} reads its positions to choose rotary frequencies (rope_type 'dynamic'): a graph break")
        if self.scope == "layers":
            _decoder_layers(target)

    def apply(self, target: Target, handle: Handle) -> None:
        decoder = target.decoder
        runtime = runtime_of(decoder)
        if runtime is not None:
            _refuse_stream(runtime.plan)
        layers = _decoder_layers(target) if self.scope == "layers" else []
        cache_layers = len(_compat.DynamicCache(config=target.config).layers)
        steps = Steps(self, decoder, layers, cache_layers, handle.record.hits, handle.record.warnings)
        handle.set_attribute(decoder, "_patchkit_compile", steps)  # for copies: see `Steps.__setstate__`
        for module, call in steps.calls():
            handle.set_attribute(module, _compat.COMPILED_CALL, call)
        if runtime is None:
            prepare = functools.partial(prepare_cache, target.model, steps)
            handle.set_attribute(target.model, _compat.PREPARE_CACHE, prepare)
        handle.record.changed("decoder layers" if layers else "decoders", len(layers) or 1)


def _decoder_layers(target: Target) -> list[nn.Module]:
    """The decoder layers: the modules in a list of modules, one around each attention module."""
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
            "streaming or linear with layers= (or with chunked layers) leaves caches that grow, so no two steps would be one graph: "
            "leave compile out, or patch all layers"
        )
    if plan.has_alibi:
        raise UnsupportedModel("streaming makes a new ALiBi bias at every step, which cannot be compiled: leave one of the two out")
