"""Fused experts whose weights are quantised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from patchkit import _compat
from patchkit.handle import Handle
from patchkit.quantised.calibration import decibels
from patchkit.quantised.freed import FreedWeight
from patchkit.quantised.saving import Original, save_plain
from patchkit.quantised.scheme import Scheme
from patchkit.quantised.weight import QuantisedWeight


class QuantisedExperts:
    """The fused experts of one layer, with every 3-D weight [E, out, in] (or [E, in, out]) as E quantised weights.

    It has the interface of `QuantisedLinear`, so that both kinds of block are timed, measured and installed alike.
    """

    fixed = None
    transposed = False

    def __init__(self, name: str, module: Any, weights: dict[str, ExpertWeights], scheme: Scheme) -> None:
        self.name, self.module, self.weights, self.scheme = name, module, weights, scheme

    @classmethod
    def quantized(cls, name: str, module: Any, scheme: Scheme) -> QuantisedExperts:
        """Round the weights of a module of fused experts."""
        first = "gate_up_proj" if module.has_gate else "up_proj"
        made = {key: ExpertWeights.quantize(getattr(module, key), module.is_transposed, scheme) for key in (first, "down_proj")}
        return cls(name, module, made, scheme)

    @property
    def activation(self) -> str:
        """The kind of activation, "float" or "int8"; see the scheme's op."""
        return next(iter(self.weights.values())).activation

    @activation.setter
    def activation(self, value: str) -> None:
        for weights in self.weights.values():
            weights.activation = value

    @property
    def held(self) -> nn.Parameter:
        """A parameter that another view of the model holds too, by which timings are shared."""
        parameter: nn.Parameter = self.module.down_proj
        return parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape [E, out, in] or [E, in, out] of the first weight."""
        return tuple(next(iter(self.weights.values())).shape)

    @property
    def signature(self) -> Any:
        """A hashable value; blocks with equal signatures take the same time."""
        parameter = self.module.down_proj
        return self.shape, parameter.dtype, parameter.device, "experts"

    def sample(self, rows: int) -> tuple[torch.Tensor, ...]:
        """Random inputs for ``rows`` tokens: hidden states [rows, hidden], experts [rows, k] int64, their weights [rows, k]."""
        parameter = self.module.down_proj
        hidden = parameter.shape[-1] if self.module.is_transposed else parameter.shape[-2]
        active = min(len(parameter), getattr(self.module.config, "num_experts_per_tok", None) or 2)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(rows, hidden, generator=generator).to(parameter.device, parameter.dtype)
        chosen = torch.stack([torch.randperm(len(parameter), generator=generator)[:active] for _ in range(rows)]).to(parameter.device)
        return x, chosen, torch.full((rows, active), 1 / active, device=parameter.device, dtype=parameter.dtype)

    def run_original(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [rows, hidden] of the unpatched module."""
        return _compat.experts_forward(self.module, _compat.experts_named(self.module.config))(self.module, *inputs)

    def run(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Outputs [rows, hidden] over the quantised weights."""
        return _run_experts(self.module, self.weights, *inputs)

    def signal_to_noise(self, inputs: tuple[Any, ...] | None) -> float | None:
        """Signal-to-noise ratio in dB of the outputs on ``inputs``; None without inputs."""
        return None if inputs is None else decibels(self.run_original(*inputs), self.run(*inputs))

    def install(self, handle: Handle, originals: list[Original], keep_original: bool) -> None:
        """Make the module run over the quantised weights, and append the replaced parameters to ``originals``."""
        handle.set_attribute(self.module, _WEIGHTS, self.weights)
        config = self.module.config
        implementation = _compat.experts_named(config).removeprefix(_EXPERTS)
        # Set once for every module; undo waits for the last.
        handle.set_shared(config, _compat.EXPERTS_NAME, register_experts_for(implementation))
        for key, weights in self.weights.items():
            original = getattr(self.module, key)
            weights.implementation = implementation
            handle.record.describe(self.name, **{f"{key}_bytes": weights.stored_bytes(), f"{key}_original_bytes": original.nbytes})
            originals.append(Original(self.module, key, original))
            freed = FreedWeight(original.shape, original.dtype, original.device)
            _compat.parameters_of(self.module)[key] = nn.Parameter(freed, requires_grad=False)
            handle.state_dict_hook(self.module, functools.partial(save_plain, key, original if keep_original else None, weights))


class ExpertWeights:
    """One 3-D weight as E quantised weights.

    Attributes:
        values: E tensors of integers.
        scale: [E, N] float32.
        shape: of the original weight.
        activation: kind of activation; see the scheme's op.
    """

    def __init__(
        self,
        experts: list[QuantisedWeight],
        shape: torch.Size,
        scheme: Scheme,
        activation: str = "float",
        implementation: str | None = None,
    ) -> None:
        self.shape, self.scheme, self.activation = shape, scheme, activation
        self.implementation = implementation  # that of the unpatched model, once installed
        self._hold(experts)
        if implementation is not None:  # loaded by a process in which nothing was patched yet
            register_experts_for(implementation)

    def _hold(self, experts: list[QuantisedWeight]) -> None:
        self.experts = experts
        self.values = [expert.qdata for expert in experts]
        self.scale = torch.stack([expert.scale for expert in experts])

    @classmethod
    def quantize(cls, weight: torch.Tensor, transposed: bool, scheme: Scheme) -> ExpertWeights:
        """Round ``weight`` [E, N, K], or ``transposed`` [E, K, N]."""
        return cls([scheme.quantize(one, transposed) for one in weight.detach()], weight.shape, scheme)

    def __reduce__(self) -> Any:
        return ExpertWeights, (self.experts, self.shape, self.scheme, self.activation, self.implementation)

    def follow(self, device: torch.device) -> None:
        """Move to ``device``, since moving a model moves only its parameters."""
        if self.scale.device != device:
            self._hold([expert.to(device) for expert in self.experts])  # type: ignore[misc]

    def dequantize(self) -> torch.Tensor:
        """Return the rounded 3-D weight in the original's shape and dtype."""
        return torch.stack([expert.dequantize() for expert in self.experts])

    def stored_bytes(self) -> int:
        """Bytes of the integers and the scales."""
        return sum(expert.stored_bytes() for expert in self.experts)


_EXPERTS = "patchkit_quantised_"
_WEIGHTS = "_patchkit_experts"  # the attribute of a module of fused experts


@functools.lru_cache
def register_experts_for(implementation: str) -> str:
    """Register an experts implementation that runs quantised experts where a module has them, else ``implementation``; return its name."""
    name = _EXPERTS + implementation
    _compat.register_experts(name, functools.partial(_experts_forward, implementation))
    return name


def quantised_experts_of(module: nn.Module) -> dict[str, ExpertWeights] | None:
    """The quantised weights of a module of fused experts, by parameter name; None for other modules."""
    return vars(module).get(_WEIGHTS)


def _experts_forward(implementation: str, module: Any, *inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    weights = quantised_experts_of(module)
    if weights is None:
        forward: Callable[..., torch.Tensor] = _compat.experts_forward(module, implementation)
        return forward(module, *inputs, **kwargs)
    return _run_experts(module, weights, *inputs, **kwargs)


def _run_experts(
    module: Any, weights: dict[str, ExpertWeights], hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Weighted sum [tokens, hidden] of each token's k experts.

    Args:
        hidden_states: [tokens, hidden].
        top_k_index, top_k_weights: [tokens, k].
    """
    tokens, k = top_k_index.shape
    experts = top_k_index.reshape(-1)
    y = hidden_states.repeat_interleave(k, 0)
    for key, weight in weights.items():
        weight.follow(y.device)
        bias = getattr(module, f"{key}_bias") if module.has_bias else None
        y = weight.scheme.run_experts(y, experts, weight, bias)
        if key == "gate_up_proj":
            y = _compat.apply_gate(module, y)
        elif key == "up_proj":
            y = module.act_fn(y)
    if getattr(module, "has_post_expert_norm", False):  # not in every supported transformers
        y = module.post_expert_norm(y)
    y = y * top_k_weights.reshape(-1, 1)
    return y.view(tokens, k, -1).sum(1).to(hidden_states.dtype)
