"""What tests of patches need: tolerances by name, tiny models of many anatomies, and a check that nothing was left behind.

    from patchkit.testing import TOLERANCES, assert_restored, families, snapshot, tiny_model

    model = tiny_model("gpt_neox")
    before = snapshot(model)
    with patched(model, "streaming(sinks=2, window=6)"):
        ...
    assert_restored(before, model)

Nothing here needs a network or a GPU.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Tolerance:
    """One row of ``TOLERANCES``.

    Attributes:
        logits: largest allowed ``logit_error`` between two ways to compute the same logits.
        ratio: largest allowed RMSE of an op's output relative to the RMS of its reference.
        differs: a difference of logits that rounding cannot explain: what a test asks for where a rule must show.
    """

    logits: float
    ratio: float
    differs: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = MappingProxyType(
    {
        torch.float64: Tolerance(logits=1e-9, ratio=1e-10, differs=1e-6),
        torch.float32: Tolerance(logits=1e-4, ratio=1e-5, differs=1e-3),
        torch.float16: Tolerance(logits=2e-2, ratio=2e-3, differs=1e-1),
        torch.bfloat16: Tolerance(logits=1.5e-1, ratio=1.5e-2, differs=5e-1),
    }
)


def logit_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference of two logit tensors of one shape, relative to ``max |expected|`` where that exceeds 10.

    The result is infinite if one tensor has a NaN or an infinity where the other has not.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"logits of shape {list(actual.shape)} cannot be compared with {list(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    left, right = actual.detach().double(), expected.detach().double()
    finite = right.isfinite()
    if not torch.equal(left[~finite].nan_to_num(), right[~finite].nan_to_num()) or not left[finite].isfinite().all():
        return float("inf")
    if not finite.any():
        return 0.0
    return ((left - right)[finite].abs().max() / (right[finite].abs().max() / 10).clamp(min=1.0)).item()


# --- tiny models --------------------------------------------------------------------------------------------------------------

_SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA: dict[str, Any] = _SIZES | dict(num_key_value_heads=2, head_dim=16, intermediate_size=128)
_ONE_KIND: dict[str, Any] = _SIZES | dict(intermediate_size=128)
_GPT2: dict[str, Any] = dict(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2)
_MLA: dict[str, Any] = _SIZES | dict(
    intermediate_size=128,
    num_key_value_heads=4,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
)
_EXPERTS: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2)
_BOTH_KINDS: dict[str, Any] = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=8)


def _scaled(rope_type: str, **options: Any) -> dict[str, Any]:
    """Llama with scaled rotary positions."""
    return _LLAMA | dict(rope_parameters=dict(rope_type=rope_type, rope_theta=10000.0, **options))


# family -> (model type of transformers, arguments of its config); one line says what is special in its anatomy
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    # rotary, half split, grouped keys
    "llama": ("llama", _LLAMA),
    "llama_linear": ("llama", _scaled("linear", factor=4.0)),
    # the frequencies change once a position passes 64: a stream of bounded positions must not get there
    "llama_dynamic": ("llama", _scaled("dynamic", factor=4.0) | dict(max_position_embeddings=64)),
    "phi3_longrope": (
        "phi3",
        _scaled("longrope", short_factor=[1.0] * 8, long_factor=[1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5])
        | dict(sliding_window=None, original_max_position_embeddings=64),
    ),
    # attention_scaling is not 1: it must enter once, not once per rotation
    "llama_yarn": ("llama", _scaled("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama_llama3": (
        "llama",
        _scaled("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=128),
    ),
    # q and k biases
    "qwen2": ("qwen2", _LLAMA),
    # norms on q and k before the rotation
    "qwen3": ("qwen3", _LLAMA),
    # norms on q and k after the rotation: a cached key cannot be rotated further by a plain rotation
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _LLAMA),
    # every layer has its own window
    "mistral": ("mistral", _LLAMA | dict(sliding_window=8)),
    # layers without any position, every second one
    "smollm3": ("smollm3", _LLAMA | dict(no_rope_layers=[1, 0], no_rope_layer_interval=2)),
    # fused q, k, v; partial rotary; attention and MLP in parallel
    "gpt_neox": ("gpt_neox", _ONE_KIND | dict(rotary_pct=0.25)),
    "phi": ("phi", _ONE_KIND | dict(num_key_value_heads=2, partial_rotary_factor=0.5)),
    "stablelm": ("stablelm", _ONE_KIND | dict(num_key_value_heads=2, partial_rotary_factor=0.25, qk_layernorm=True)),
    # fused projection with norms per head
    "persimmon": ("persimmon", _ONE_KIND | dict(partial_rotary_factor=0.5)),
    "phi3": ("phi3", _LLAMA | dict(sliding_window=None)),
    # rotary, interleaved; glm rotates half of the head only
    "glm": ("glm", _LLAMA | dict(partial_rotary_factor=0.5)),
    "cohere": ("cohere", _LLAMA | dict(logit_scale=1.0)),
    # codegen and gptj keep no inv_freq buffer and bypass the attention interface
    "gptj": ("gptj", _GPT2 | dict(rotary_dim=8)),
    # interleaved, sliding layers, full layers without position
    "cohere2": ("cohere2", _LLAMA | _BOTH_KINDS | dict(logit_scale=1.0)),
    # soft-capped scores
    "gemma2": ("gemma2", _LLAMA | _BOTH_KINDS | dict(query_pre_attn_scalar=16)),
    # a rotary base per kind of layer
    "gemma3_text": ("gemma3_text", _LLAMA | _BOTH_KINDS | dict(query_pre_attn_scalar=16)),
    # a learned sink per head
    "gpt_oss": ("gpt_oss", _LLAMA | _BOTH_KINDS | _EXPERTS),
    # experts
    "mixtral": ("mixtral", _LLAMA | _EXPERTS | dict(sliding_window=None)),
    "qwen3_moe": ("qwen3_moe", _LLAMA | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)),
    # latent attention: the cache holds the compressed keys and, in the place of the values, the rotary part
    "deepseek_v3": ("deepseek_v3", _MLA),
    "deepseek_v2": ("deepseek_v2", _MLA | dict(topk_method="greedy")),
    # ALiBi
    "bloom": ("bloom", dict(vocab_size=128, hidden_size=64, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "mpt": ("mpt", dict(vocab_size=128, d_model=64, n_layers=2, n_heads=4, max_seq_len=512, expansion_ratio=2)),
    "falcon_alibi": (
        "falcon",
        _SIZES | dict(alibi=True, new_decoder_architecture=False, multi_query=False, parallel_attn=False, bias=True),
    ),
    # one key head, attention outside the interface
    "falcon": ("falcon", _SIZES | dict(alibi=False, new_decoder_architecture=False, multi_query=True, parallel_attn=True)),
    # learned absolute positions
    "gpt2": ("gpt2", _GPT2),
    "opt": ("opt", _SIZES | dict(ffn_dim=128, word_embed_proj_dim=64)),
    # recurrent mixers beside attention without position
    "jamba": (
        "jamba",
        _LLAMA
        | dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=4,
            num_experts_per_tok=2,
            mamba_d_state=16,
            mamba_d_conv=4,
            mamba_expand=2,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    "nemotron_h": (
        "nemotron_h",
        _LLAMA
        | dict(
            num_hidden_layers=3,
            layers_block_type=["mamba", "attention", "mlp"],
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=1,
            chunk_size=8,
        ),
    ),
    # linear attention beside partial rotary with a gate
    "qwen3_next": (
        "qwen3_next",
        _LLAMA
        | dict(
            layer_types=["linear_attention", "full_attention"],
            partial_rotary_factor=0.25,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=32,
        ),
    ),
    # short convolutions beside attention
    "lfm2": ("lfm2", _LLAMA | dict(layer_types=["conv", "full_attention"])),
    # a state-space mixer and attention side by side in every layer
    "falcon_h1": (
        "falcon_h1",
        _LLAMA | dict(mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_chunk_size=8),
    ),
    # no attention at all
    "mamba": (
        "mamba",
        dict(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=16, pad_token_id=0, bos_token_id=1, eos_token_id=2),
    ),
}


def families() -> list[str]:
    """Names that ``tiny_model`` builds: at least 25 families that differ in anatomy, sorted."""
    return sorted(_FAMILIES)


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random causal LM of 2 or 3 layers, about 10^5 parameters and a vocabulary of 128, in eval mode on the CPU.

    Every weight is moved by noise, so that no norm, bias or gate is the identity and hides a bug. The ids 0, 1 and 2 are special;
    texts should use 3 to 127. Layers with a window of their own have a window of 8 tokens.

    Args:
        family: a name of ``families()``.
        seed: the same seed gives the same weights; the global random state is left as it was.
        dtype: dtype of the floating parameters; the values are those of float32, rounded.

    Raises:
        ValueError: ``family`` is unknown; the message names the nearest.
    """
    if family not in _FAMILIES:
        near = difflib.get_close_matches(family, _FAMILIES, n=1, cutoff=0.0)
        raise ValueError(f"unknown family {family!r}, did you mean {near[0]!r}? available: {', '.join(families())}")
    model_type, kwargs = _FAMILIES[family]
    config = AutoConfig.for_model(model_type, **copy.deepcopy(kwargs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


# --- nothing left behind ------------------------------------------------------------------------------------------------------

_HOOK_DICTS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_PROBE_LENGTH = 12


@dataclass(frozen=True)
class Snapshot:
    """What ``assert_restored`` compares. It holds a copy of every tensor of the state dict."""

    modules: dict[str, nn.Module] = field(repr=False)
    attributes: dict[str, dict[str, Any]] = field(repr=False)
    hooks: dict[tuple[str, str], dict[int, Any]] = field(repr=False)
    tensors: dict[str, tuple[int, torch.Tensor]] = field(repr=False)
    buffers: dict[str, torch.Tensor] = field(repr=False)
    configs: dict[str, dict[str, Any]] = field(repr=False)
    logits: torch.Tensor = field(repr=False)


def snapshot(model: PreTrainedModel) -> Snapshot:
    """The state of ``model`` for a later ``assert_restored``: modules, hooks, attributes, tensors, config and probe logits.

    The model runs once on a probe input of 12 tokens. Every tensor of the state dict is copied: meant for small models.
    """
    # the probe runs first, here and in assert_restored: scaled rotary positions reset their buffers on a short input
    logits = _probe_logits(model)
    return Snapshot(
        modules=dict(model.named_modules()),
        attributes={name: dict(vars(module)) for name, module in model.named_modules()},
        hooks={(name, kind): dict(getattr(module, kind, {})) for name, module in model.named_modules() for kind in _HOOK_DICTS},
        tensors={key: (tensor.data_ptr(), tensor.detach().clone()) for key, tensor in model.state_dict().items()},
        buffers={key: tensor.detach().clone() for key, tensor in model.named_buffers()},
        configs={name: _config_values(config) for name, config in _configs(model)},
        logits=logits,
    )


def assert_restored(before: Snapshot, model: PreTrainedModel) -> None:
    """Raise an AssertionError that lists every trace that was left on ``model`` since ``before`` was taken.

    Compared are the identity of every module; hooks of all kinds; the names of all instance attributes, and which function they
    hold where they hold one; keys, storage and bits of the state dict, and the bits of the other buffers; config, sub-configs
    and generation config, the attention implementation included; and the logits of a probe input, bit by bit.
    """
    logits = _probe_logits(model)
    found = list(_differences(before, model))
    if logits.shape != before.logits.shape or not _same_bits(logits, before.logits):
        found.append(f"logits of the probe input differ by {logit_error(logits, before.logits):.3e}")
    if found:
        shown = "\n  ".join(found[:20]) + (f"\n  and {len(found) - 20} more" if len(found) > 20 else "")
        raise AssertionError(f"{type(model).__name__} is not as it was before:\n  {shown}")


def _differences(before: Snapshot, model: PreTrainedModel) -> Iterator[str]:
    """One line per trace that is not a matter of logits."""
    now = dict(model.named_modules())
    yield from _changed_names("module", before.modules, now)
    common = [name for name in before.modules if name in now]
    for name in common:
        label = name or "the model"
        if now[name] is not before.modules[name]:
            yield f"{label} is another object: {type(now[name]).__name__}, was {type(before.modules[name]).__name__}"
            continue
        yield from _changed_names(f"attribute of {label}", before.attributes[name], vars(now[name]))
        for key, old in before.attributes[name].items():
            new = vars(now[name]).get(key, old)
            if (callable(old) or callable(new) or isinstance(old, bool)) and new is not old:
                yield f"attribute {key!r} of {label} is {new!r}, was {old!r}"
        for kind in _HOOK_DICTS:
            old_hooks, new_hooks = before.hooks[name, kind], getattr(now[name], kind, {})
            if old_hooks != dict(new_hooks):
                added = [_name_of(hook) for key, hook in new_hooks.items() if key not in old_hooks]
                removed = [_name_of(hook) for key, hook in old_hooks.items() if key not in new_hooks]
                yield f"{kind} of {label}: added {added}, removed {removed}"
    state = model.state_dict()
    yield from _changed_names("state_dict key", before.tensors, state)
    for key, (pointer, old_tensor) in before.tensors.items():
        if key not in state:
            continue
        new_tensor = state[key]
        if (new_tensor.dtype, new_tensor.shape, new_tensor.device) != (old_tensor.dtype, old_tensor.shape, old_tensor.device):
            yield f"{key} is {_describe(new_tensor)}, was {_describe(old_tensor)}"
        elif not _same_bits(new_tensor, old_tensor):
            yield f"{key} has other values, by up to {(new_tensor.double() - old_tensor.double()).abs().max().item():.3e}"
        elif new_tensor.data_ptr() != pointer:
            yield f"{key} has moved to another storage"
    buffers = dict(model.named_buffers())
    yield from _changed_names("buffer", before.buffers, buffers)
    for key, old_tensor in before.buffers.items():
        if key not in state and key in buffers and not (buffers[key].shape == old_tensor.shape and _same_bits(buffers[key], old_tensor)):
            yield f"buffer {key} has other values"
    configs = {name: _config_values(config) for name, config in _configs(model)}
    yield from _changed_names("config", before.configs, configs)
    for name, old_values in before.configs.items():
        new_values = configs.get(name, old_values)
        yield from _changed_names(f"field of {name}", old_values, new_values)
        for key, value in old_values.items():
            if key in new_values and new_values[key] != value:
                yield f"{name}.{key} is {new_values[key]!r}, was {value!r}"


def _changed_names(what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """One line per name that came or went."""
    yield from (f"{what} {name!r} was added" for name in now if name not in before)
    yield from (f"{what} {name!r} is gone" for name in before if name not in now)


def _name_of(hook: Any) -> str:
    """The name under which a person knows a hook."""
    return getattr(hook, "__qualname__", None) or type(hook).__name__


def _describe(tensor: torch.Tensor) -> str:
    """Dtype, shape and device, for messages."""
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality of the stored bytes, so that NaN equals NaN and 0.0 differs from -0.0."""
    return torch.equal(left.detach().contiguous().view(-1).view(torch.uint8), right.contiguous().view(-1).view(torch.uint8))


def _configs(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The config, its sub-configs and the generation config, each with a name for messages."""
    pending: list[tuple[str, Any]] = [("config", model.config)]
    while pending:
        name, config = pending.pop(0)
        yield name, config
        for key in getattr(config, "sub_configs", {}):
            if isinstance(vars(config).get(key), PreTrainedConfig):
                pending.append((f"{name}.{key}", vars(config)[key]))
    if getattr(model, "generation_config", None) is not None:
        yield "generation_config", model.generation_config


def _config_values(config: Any) -> dict[str, Any]:
    """A copy of the fields of one config, sub-configs left out."""
    values = {key: copy.deepcopy(value) for key, value in vars(config).items() if not isinstance(value, PreTrainedConfig)}
    if hasattr(config, "_attn_implementation"):
        values["_attn_implementation"] = config._attn_implementation
    return values


def _probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits ``[1, 12, V]`` of a fixed input, computed without gradient, cache or dropout, from a fixed random state."""
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, torch.Tensor)
    ids = (torch.arange(_PROBE_LENGTH) * 7 + 3).remainder(embeddings.shape[0])[None].to(model.device)
    training = model.training
    try:
        # some models draw random numbers in eval mode too (Reformer's hashing)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model.train(False)(input_ids=ids, use_cache=False).logits
    finally:
        if training:
            model.train(True)
