"""mlp_int8: the linear layers of the feed-forward blocks over int8 weights, and nothing else.

Weights are rounded to int8, symmetric, with one scale per output channel, and stay inside the `nn.Linear` (or `Conv1D`) that
held them, as an `Int8Weight` that runs the op `int8_linear`. Fused experts run the op `int8_experts_linear` through
transformers' experts interface. Attention, embeddings, the head, routers and norms are never touched: most of a model's bytes
are in the feed-forward blocks, and they tolerate rounding best (Dettmers et al. 2022, LLM.int8(), https://arxiv.org/abs/2208.07339).

A patched model saves as a torchao checkpoint: `save_pretrained` writes torchao's `Int8Tensor` and its configuration, stock
transformers loads that, and patching what it loaded takes the same int8 values over, bit for bit.
"""

from __future__ import annotations

import fnmatch
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from patchkit import _compat
from patchkit.definitions import rounded_logits
from patchkit.errors import NothingMatched, SlowerPatch, UnsupportedModel
from patchkit.handle import Handle
from patchkit.int8.weight import FreedWeight, Int8Weight
from patchkit.kernels.int8_experts_linear import int8_experts_linear
from patchkit.patch import Patch, Promises, Stage, register_patch
from patchkit.record import Notices
from patchkit.target import Target

_logger = logging.getLogger("patchkit")

_ACTIVATION = {"weight_only": "float", "dynamic": "int8"}
# A weight-only product that costs at most this much more than a dynamic one is preferred: it is 5 to 8 dB more accurate.
_PREFER_WEIGHT_ONLY = 1.30
_CALIBRATION_TOKENS = 64
_TIMED_MODULES = 8
_TIMED_ROWS = (1, 256)


@register_patch("mlp_int8")
@dataclass(frozen=True)
class MLPInt8(Patch):
    """Feed-forward linear layers over int8 weights.

    Args:
        mode: "weight_only" keeps activations as they are; "dynamic" also rounds them to int8, per token; "auto" measures both for
            every shape on one row, here and now, and takes weight-only, which is more accurate, unless that costs over 30 % more.
        keep_original: keep the floating-point weights for `unpatch_model`. False frees them, and the patch is then for good.
        modules: names of the modules to convert, or patterns such as "*.down_proj"; None for all that are found.
        min_snr: leave out a module whose output on the calibration text has a signal-to-noise ratio, in dB, below this.
        calibration: token ids [T] or [B, T] on which that ratio is measured; None for 64 random tokens.
        strict: raise `SlowerPatch` where the patch is slower than the original; else it warns.

    Raises:
        ValueError: an option out of range.
    """

    stage = Stage.WEIGHTS

    mode: Literal["auto", "weight_only", "dynamic"] = "auto"
    keep_original: bool = True
    modules: tuple[str, ...] | None = None
    min_snr: float | None = None
    calibration: Any = None
    strict: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("auto", *_ACTIVATION):
            raise ValueError(f"mode={self.mode!r}: give 'auto', 'weight_only' or 'dynamic'")
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", (self.modules,))
        if self.modules is not None:
            if not self.modules or not all(isinstance(name, str) for name in self.modules):
                raise ValueError(f"modules={self.modules!r}: give names or patterns such as ['*.down_proj'], or None for all")
            object.__setattr__(self, "modules", tuple(self.modules))
        if self.min_snr is not None and (isinstance(self.min_snr, bool) or not isinstance(self.min_snr, int | float)):
            raise ValueError(f"min_snr={self.min_snr!r}: give decibels such as 30, or None")
        for name in ("keep_original", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: give True or False")
        if self.calibration is not None:
            ids = torch.as_tensor(self.calibration)
            if ids.ndim not in (1, 2) or ids.is_floating_point() or ids.numel() == 0:
                raise ValueError(f"calibration of shape {tuple(ids.shape)} and dtype {ids.dtype}: give token ids [T] or [B, T]")

    @property
    def irreversible(self) -> bool:
        return not self.keep_original

    def promises(self, target: Target) -> Promises:
        return Promises(definition=rounded_logits, rounds=True)

    @classmethod
    def candidates(cls, target: Target) -> list[MLPInt8]:
        return [cls(mode=mode) for mode in ("auto", "dynamic", "weight_only")]

    def check(self, target: Target) -> None:
        self._blocks(target)

    @torch.no_grad()
    def apply(self, target: Target, handle: Handle) -> None:
        linears, experts, left = self._blocks(target)
        inputs = _calibrate(target, {**{block.name: block.module for block in linears}, **experts}, self.calibration)
        blocks: list[_Linear | _Experts] = [*linears, *(_Experts.quantized(name, module) for name, module in experts.items())]
        _choose_activations(self.mode, blocks)
        kept: list[_Linear | _Experts] = []
        for block in blocks:
            snr = block.signal_to_noise(inputs.get(block.name))
            if self.min_snr is not None and snr is not None and snr < self.min_snr:
                left[block.name] = f"its SNR of {snr:.1f} dB is below {self.min_snr:g}"
                continue
            mode = next(mode for mode, activation in _ACTIVATION.items() if activation == block.activation)
            handle.describe(block.name, mode=mode, snr_db=None if snr is None else round(snr, 2), shape=block.shape)
            kept.append(block)
        for what, why in left.items():
            handle.left_alone(what, why)
        if not kept:
            raise NothingMatched(
                f"every feed-forward module has an SNR below min_snr={self.min_snr:g} dB: give a lower one, or leave it out"
            )
        self._report_speed(kept, handle)

        originals: list[tuple[nn.Module, str, nn.Parameter]] = []
        handle.on_undo(functools.partial(_put_back, originals))
        for block in kept:
            block.install(handle, originals, self.keep_original)
        _count(handle, kept)
        modules = [block.module for block in kept if isinstance(block, _Linear)]
        count = functools.partial(_count_forward, handle.hits, handle.notices, modules)
        handle.pre_hook(_compat.decoder_of(target.model), count, with_kwargs=True)
        _make_saveable(target.model, handle, [block for block in kept if isinstance(block, _Linear) and not block.transposed])
        if not self.keep_original:
            handle.make_final(
                "mlp_int8(keep_original=False) has freed the floating-point weights, so the model stays patched: load it again",
                originals.clear,
            )

    def _blocks(self, target: Target) -> tuple[list[_Linear], dict[str, nn.Module], dict[str, str]]:
        """What will be converted, and what will not be, and why; every refusal is raised here."""
        found = target.feed_forward
        name = type(target.model).__name__
        left = dict(found.left_alone)
        wanted = _selected(self.modules, [*found.linears, *found.experts], name)
        linears = []
        for path in [path for path in found.linears if path in wanted]:
            obstacle = _obstacle(found.linears[path])
            if obstacle is None:
                linears.append(_Linear(path, found.linears[path]))
            else:
                left[path] = obstacle
        experts = {path: module for path, module in found.experts.items() if path in wanted and not _left_experts(path, module, left)}
        if not linears and not experts:
            reasons = (
                "; ".join(f"{what}: {why}" for what, why in list(left.items())[:3])
                or _compat.packed_gguf(target.model)
                or "its decoder layers hold no linear layer outside attention"
            )
            raise NothingMatched(f"{name} has no feed-forward linear that can be converted ({reasons})")
        for path, module in [*((block.name, block.module) for block in linears), *experts.items()]:
            for key, weight in module.named_parameters(recurse=False):
                _refuse(f"{path}.{key}", weight)
        return linears, experts, left

    def _report_speed(self, blocks: list[_Linear | _Experts], handle: Handle) -> None:
        slower: list[str] = []
        faster: list[str] = []
        for rows in _TIMED_ROWS:
            before, after = _milliseconds(blocks, rows)
            handle.measure(f"{rows} row{'s' * (rows > 1)}", f"{before:.3g} -> {after:.3g} ms")
            (slower if after > before else faster).append(
                f"{rows} row{'s' * (rows > 1)} at once: {after:.3g} ms in these layers, {before:.3g} ms unpatched"
            )
        ratios = [facts["snr_db"] for facts in handle.modules.values() if facts["snr_db"] is not None]
        if ratios:
            handle.measure("SNR", f"{min(ratios):.1f} to {max(ratios):.1f} dB")
        if slower:
            message = f"mlp_int8 is slower than the original on this machine ({'; '.join(slower)})"
            if self.strict:
                raise SlowerPatch(f"{message}: leave the patch out, or give strict=False")
            # One row is a step of decoding, 256 are a prompt.
            advice = "leave the patch out unless you want the memory"
            if faster:
                kind, other = ("prompts", "decoding") if slower[0].startswith("256") else ("decoding", "prompts")
                advice = f"and faster with {faster[0]}. Leave the patch out where most of the time goes into {kind}, keep it for {other}"
            _logger.warning("patchkit: %s: %s", message, advice)


# -- what is converted -----------------------------------------------------------------------------------------------------------


class _Linear:
    """One `nn.Linear` or `Conv1D`, and its int8 weight once `quantize` was called."""

    def __init__(self, name: str, module: Any) -> None:
        self.name, self.module = name, module
        self.transposed = isinstance(module, _compat.Conv1D)
        self.original: nn.Parameter = module.weight
        adopted = _compat.torchao_int8(module.weight)
        self.fixed = None if adopted is None else adopted[2]
        self._adopted = adopted

    @functools.cached_property
    def weight(self) -> Int8Weight:
        """The int8 weight, made when first asked for."""
        if self._adopted is not None:
            values, scale, activation = self._adopted
            return Int8Weight(values, scale, self.original.dtype, activation)
        return Int8Weight.quantize(self.original, transposed=self.transposed)

    @property
    def activation(self) -> str:
        return self.weight.activation

    @activation.setter
    def activation(self, value: str) -> None:
        self.weight.activation = value

    @property
    def held(self) -> nn.Parameter:
        """A parameter by which the model is known again in another view of it."""
        return self.original

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.original.shape)

    @property
    def signature(self) -> Any:
        return self.shape, self.original.dtype, self.original.device, self.transposed

    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        inputs = self.shape[0] if self.transposed else self.shape[1]
        return (torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0)).to(self.original.device, self.original.dtype),)

    def run_original(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.module.bias
        if not self.transposed:
            return F.linear(x, self.original, bias)
        return x @ self.original if bias is None else torch.addmm(bias, x.reshape(-1, x.shape[-1]), self.original)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight.linear(x, self.module.bias)

    def signal_to_noise(self, inputs: tuple[Any, ...] | None) -> float | None:
        if inputs is None:
            return None
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        return _decibels(self.run_original(x), self.run(x))

    def install(self, handle: Handle, originals: list[tuple[nn.Module, str, nn.Parameter]], keep_original: bool) -> None:
        handle.describe(self.name, weight_bytes=self.weight.stored_bytes(), original_bytes=self.original.nbytes)
        originals.append((self.module, "weight", self.original))
        self.module._parameters["weight"] = nn.Parameter(self.weight, requires_grad=False)
        saved: Any = _save_torchao
        if self.transposed:
            saved = functools.partial(_save_plain, "weight", self.original if keep_original else None, self.weight)
        handle.state_dict_hook(self.module, saved)


class _Experts:
    """The fused experts of one layer: every 3-D weight [E, out, in] (or transposed) as E int8 weights."""

    fixed = None
    transposed = False

    def __init__(self, name: str, module: Any, weights: dict[str, ExpertWeights]) -> None:
        self.name, self.module, self.weights = name, module, weights

    @classmethod
    def quantized(cls, name: str, module: Any) -> _Experts:
        first = "gate_up_proj" if module.has_gate else "up_proj"
        return cls(name, module, {key: ExpertWeights.quantize(getattr(module, key), module.is_transposed) for key in (first, "down_proj")})

    @property
    def activation(self) -> str:
        return next(iter(self.weights.values())).activation

    @activation.setter
    def activation(self, value: str) -> None:
        for weights in self.weights.values():
            weights.activation = value

    @property
    def held(self) -> nn.Parameter:
        parameter: nn.Parameter = self.module.down_proj
        return parameter

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(next(iter(self.weights.values())).shape)

    @property
    def signature(self) -> Any:
        parameter = self.module.down_proj
        return self.shape, parameter.dtype, parameter.device, "experts"

    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        parameter = self.module.down_proj
        hidden = parameter.shape[-1] if self.module.is_transposed else parameter.shape[-2]
        active = min(len(parameter), getattr(self.module.config, "num_experts_per_tok", None) or 2)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, hidden, generator=generator).to(parameter.device, parameter.dtype)
        chosen = torch.stack([torch.randperm(len(parameter), generator=generator)[:active] for _ in range(rows)]).to(parameter.device)
        return x, chosen, torch.full((rows, active), 1 / active, device=parameter.device, dtype=parameter.dtype)

    def run_original(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _compat.experts_forward(self.module, self.module.config._experts_implementation or "eager")(self.module, *inputs)

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        return _run_experts(self.module, self.weights, *inputs)

    def signal_to_noise(self, inputs: tuple[Any, ...] | None) -> float | None:
        return None if inputs is None else _decibels(self.run_original(*inputs), self.run(*inputs))

    def install(self, handle: Handle, originals: list[tuple[nn.Module, str, nn.Parameter]], keep_original: bool) -> None:
        handle.set_attribute(self.module, "_patchkit_experts", self.weights)
        config = self.module.config
        implementation = config._experts_implementation or "eager"
        implementation = implementation.removeprefix(_EXPERTS)
        # Once for every module, which does no harm: undo waits for the last.
        handle.set_shared(config, "_experts_implementation_internal", register_experts_for(implementation))
        for key, weights in self.weights.items():
            original = getattr(self.module, key)
            weights.implementation = implementation
            handle.describe(self.name, **{f"{key}_bytes": weights.stored_bytes(), f"{key}_original_bytes": original.nbytes})
            originals.append((self.module, key, original))
            freed = FreedWeight(original.shape, original.dtype, original.device)
            self.module._parameters[key] = nn.Parameter(freed, requires_grad=False)
            handle.state_dict_hook(self.module, functools.partial(_save_plain, key, original if keep_original else None, weights))


class ExpertWeights:
    """One 3-D weight as E int8 weights: ``values`` E tensors [N, K], ``scale`` [E, N], ``shape`` that of the original."""

    def __init__(self, experts: list[Int8Weight], shape: torch.Size, activation: str = "float", implementation: str | None = None) -> None:
        self.shape, self.activation = shape, activation
        self.implementation = implementation  # that of the unpatched model, once installed
        self._hold(experts)
        if implementation is not None:  # loaded by a process in which nothing was patched yet
            register_experts_for(implementation)

    def _hold(self, experts: list[Int8Weight]) -> None:
        self.experts = experts
        self.values = [expert.qdata for expert in experts]
        self.scale = torch.stack([expert.scale for expert in experts])

    @classmethod
    def quantize(cls, weight: torch.Tensor, transposed: bool) -> ExpertWeights:
        return cls([Int8Weight.quantize(one, transposed=transposed) for one in weight.detach()], weight.shape)

    def __reduce__(self) -> Any:
        return ExpertWeights, (self.experts, self.shape, self.activation, self.implementation)

    def follow(self, device: torch.device) -> None:
        """Move to the device of the model, which moves its parameters only."""
        if self.scale.device != device:
            self._hold([expert.to(device) for expert in self.experts])  # type: ignore[misc]

    def dequantize(self) -> torch.Tensor:
        """The 3-D weight again."""
        return torch.stack([expert.dequantize() for expert in self.experts])

    def stored_bytes(self) -> int:
        """Bytes of the int8 values and the scales."""
        return sum(expert.stored_bytes() for expert in self.experts)


# -- run time: experts -----------------------------------------------------------------------------------------------------------

_EXPERTS = "patchkit_int8_"


@functools.lru_cache
def register_experts_for(implementation: str) -> str:
    """The experts implementation that runs int8 experts where a module has them, and else ``implementation``."""
    name = _EXPERTS + implementation
    _compat.register_experts(name, functools.partial(_experts_forward, implementation))
    return name


def _experts_forward(implementation: str, module: Any, *inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    weights = module.__dict__.get("_patchkit_experts")
    if weights is None:
        forward: Callable[..., torch.Tensor] = _compat.experts_forward(module, implementation)
        return forward(module, *inputs, **kwargs)
    return _run_experts(module, weights, *inputs, **kwargs)


def _run_experts(
    module: Any, weights: dict[str, ExpertWeights], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]: the sum of each token's k experts."""
    tokens, k = top_k_index.shape
    experts = top_k_index.reshape(-1)
    y = hidden_states.repeat_interleave(k, 0)
    for key, weight in weights.items():
        weight.follow(y.device)
        bias = getattr(module, f"{key}_bias") if module.has_bias else None
        y = int8_experts_linear(y, experts, weight.values, weight.scale, bias, weight.activation)
        if key == "gate_up_proj":
            y = module._apply_gate(y)
        elif key == "up_proj":
            y = module.act_fn(y)
    if getattr(module, "has_post_expert_norm", False):  # not in every supported transformers
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1, 1)
    return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)


# -- undo, saving, counting ------------------------------------------------------------------------------------------------------


def _put_back(originals: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for module, key, original in reversed(originals):
        now = module._parameters[key]
        if now is not None:  # the patched model may have been moved, or cast
            original.data = original.data.to(now.device, now.dtype)
        module._parameters[key] = original


def _save_torchao(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    weight = module.weight
    assert isinstance(weight, Int8Weight)
    state[f"{prefix}weight"] = _compat.to_torchao(weight.qdata, weight.scale, weight.dtype, weight.activation == "int8")


def _save_plain(
    key: str, original: torch.Tensor | None, int8: Any, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """torchao knows no `Conv1D`, and transformers runs no torchao tensor as fused experts: these are saved in floating point."""
    now = getattr(module, key)
    state[prefix + key] = (int8.dequantize() if original is None else original.detach()).to(now.device, now.dtype)


def _make_saveable(model: Any, handle: Handle, linears: list[_Linear]) -> None:
    """Let `save_pretrained` write a torchao checkpoint, and `from_pretrained` find its configuration in it."""
    if not linears or getattr(model, "hf_quantizer", None) is not None or not _compat.has_torchao():
        return
    dynamic = {block.name: block.activation == "int8" for block in linears}
    quantization, quantizer = _compat.torchao_quantizer(dynamic)
    handle.set_shared(model.config, "quantization_config", quantization)
    handle.set_attribute(model, "hf_quantizer", quantizer)
    handle.set_attribute(model, "is_quantized", True)


def _count(handle: Handle, blocks: list[_Linear | _Experts]) -> None:
    for what, kind in (("feed-forward linears", _Linear), ("layers of fused experts", _Experts)):
        count = sum(isinstance(block, kind) for block in blocks)
        if count:
            handle.changed(what, count)
    modes = Counter(str(facts["mode"]) for facts in handle.modules.values())
    handle.measure("mode", " and ".join(f"{mode} ({count})" if len(modes) > 1 else mode for mode, count in sorted(modes.items())))


def _count_forward(hits: Counter[str], notices: Notices, modules: list[nn.Module], decoder: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():  # of the user's own: a count that changes would be a graph of its own for every call
        return
    hits["forwards"] += 1
    replaced = sum(not isinstance(module._parameters.get("weight"), Int8Weight) for module in modules)
    if replaced:
        notices.say(f"{replaced} of {len(modules)} layers were given another weight after they were patched, and run over that")


# -- finding and refusing --------------------------------------------------------------------------------------------------------


def _selected(patterns: tuple[str, ...] | None, names: list[str], model: str) -> set[str]:
    """The names that ``patterns`` mean: all without any.

    Raises:
        NothingMatched: a pattern matches none.
    """
    if patterns is None:
        return set(names)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.endswith(f".{pattern}")]
        if not matched:
            raise NothingMatched(
                f"modules={list(patterns)}: {pattern!r} matches no feed-forward linear of {model}. "
                f"There are {len(names)}, such as {', '.join(names[:4])}"
            )
        chosen.update(matched)
    return chosen


def _obstacle(module: Any) -> str | None:
    if getattr(module, "quantization_scheme", None) is not None:
        return "compressed-tensors runs it over packed weights: load the model with run_compressed=False"
    weight = module.weight
    if module._parameters.get("weight") is not weight:
        return "its weight is computed from other tensors (pruning, weight_norm, a parametrization)"
    if _compat.torchao_int8(weight) is not None:
        return None
    if type(weight) is not nn.Parameter and not _is_sharded(weight):
        return f"its weight is already a {type(weight).__name__}"
    if not weight.is_floating_point() or weight.element_size() < 2:
        return f"its weight is already quantised ({weight.dtype})"
    return None


def _left_experts(path: str, module: Any, left: dict[str, str]) -> bool:
    parameter = module.down_proj
    if getattr(module, "_is_expert_parallel", False):
        left[path] = "its experts are spread over several processes"
    elif not torch.is_tensor(parameter) or not parameter.is_floating_point() or parameter.ndim != 3:
        left[path] = "its experts are already quantised"
    return path in left


def _is_sharded(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "DTensor" or type(getattr(weight, "data", None)).__name__ == "DTensor"


def _refuse(name: str, weight: torch.Tensor) -> None:
    if _is_sharded(weight):
        raise UnsupportedModel(
            f"{name} is sharded over several processes (tensor parallel): load the model without tp_plan for int8 weights"
        )
    if weight.device.type == "meta":
        raise UnsupportedModel(f"{name} is offloaded or not loaded: load the model so that its weights are in memory, then patch it")


# -- calibration, choice, timing -------------------------------------------------------------------------------------------------


def _calibrate(target: Target, modules: dict[str, Any], calibration: Any) -> dict[str, tuple[Any, ...]]:
    """What every module receives in one forward over the calibration text; a module that is not called is missing."""
    seen: dict[str, tuple[Any, ...]] = {}

    def notice(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(name, args)

    if calibration is None:
        vocabulary = getattr(target.config, "vocab_size", 100)
        longest = min(_CALIBRATION_TOKENS, target.position_limit or _CALIBRATION_TOKENS)
        calibration = torch.randint(vocabulary, (longest,), generator=torch.Generator().manual_seed(0))
    ids = torch.as_tensor(calibration).reshape(-1, torch.as_tensor(calibration).shape[-1]).to(target.model.device)
    hooks = [module.register_forward_pre_hook(functools.partial(notice, name)) for name, module in modules.items()]
    try:
        target.forward(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: args for name, args in seen.items() if args}


# By signature and number of threads: timed once in a process, so that two views of one model round alike.
# By the first weight of every shape, and the number of threads: views of one model (those that draft, prove or tune) choose alike, and
# no model goes by what another one was found to be.
_found_faster: Any = WeakIdKeyDictionary()


def _choose_activations(mode: str, blocks: list[_Linear | _Experts]) -> None:
    for signature in dict.fromkeys(block.signature for block in blocks):
        alike = [block for block in blocks if block.signature == signature]
        if mode == "auto":
            known = _found_faster.setdefault(alike[0].held, {})
            threads = torch.get_num_threads()
            if threads not in known:
                known[threads] = _faster(alike)
            activation = known[threads]
        else:
            activation = _ACTIVATION[mode]
        for block in alike:
            block.activation = block.fixed if mode == "auto" and block.fixed else activation


def _faster(alike: list[_Linear | _Experts]) -> str:
    timed = alike[:_TIMED_MODULES]
    cost = {}
    for activation in ("float", "int8"):
        for block in timed:
            block.activation = activation
        cost[activation] = _milliseconds(timed, 1)[1]
    return "float" if cost["float"] <= _PREFER_WEIGHT_ONLY * cost["int8"] else "int8"


@torch.no_grad()
def _milliseconds(blocks: list[_Linear | _Experts], rows: int) -> tuple[float, float]:
    """Time in all blocks for ``rows`` tokens, before and after: the least of interleaved passes over a few blocks of every shape.

    One pass goes over different weights, as a token does, so that they come from memory and not from a cache.
    """
    before = after = 0.0
    for signature in dict.fromkeys(block.signature for block in blocks):
        alike = [block for block in blocks if block.signature == signature]
        timed = alike[: _TIMED_MODULES if rows == 1 else 1]
        inputs = timed[0].sample(rows)
        passes: list[list[float]] = [[], []]
        for repetition in range(7 if rows == 1 else 3):
            for times, run in zip(passes, ("run_original", "run"), strict=True):
                _synchronize(inputs[0])
                started = time.perf_counter()
                for block in timed:
                    getattr(block, run)(*inputs)
                _synchronize(inputs[0])
                if repetition:
                    times.append(time.perf_counter() - started)
        # The least of several passes: other work on the machine only ever adds.
        before += min(passes[0]) / len(timed) * len(alike) * 1e3
        after += min(passes[1]) / len(timed) * len(alike) * 1e3
    return before, after


def _synchronize(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)


def _decibels(signal: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal-to-noise ratio, 20 log10(|signal| / |signal - approximation|)."""
    noise = (signal.float() - approximation.float()).norm().clamp(min=1e-30)
    return float(20 * torch.log10(signal.float().norm().clamp(min=1e-30) / noise))
