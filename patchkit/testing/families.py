"""Tiny models of many anatomies, with random weights; nothing is downloaded."""

from __future__ import annotations

import copy
import difflib
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
    # recurrent mixers, and attention without position
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
    # linear attention, and partial rotary with a gate
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
    # short convolutions, and attention
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
    sequences should use 3 to 127. Sliding-window layers have a window of 8 tokens.

    Args:
        family: a name of ``families()``.
        seed: equal seeds give equal weights; the global random state is not changed.
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
