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
