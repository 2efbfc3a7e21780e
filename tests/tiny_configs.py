"""Tiny models of every causal-LM type that transformers can build, from rules on the names of config fields.

    from tiny_configs import model_types, tiny_config, tiny_model

    model = tiny_model("qwen3_next")  # random, perturbed weights, eval, float32

Every config of transformers is a dataclass, so its fields are known. One set of rules shrinks the numeric ones; lists that name
the kind of each layer are replaced by one entry per distinct kind of the full-size default, so that hybrids keep every kind.
``OVERRIDES`` holds the few facts of single types that no rule can guess. Nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY, POSITIONS = 64, 2, 4, 2, 16, 128, 128, 512

Rule = int | Callable[[int, str], int]

# (regex on the field name, new value or function(old, name) -> new). The first match wins. Only integer defaults are touched.
_RULES: list[tuple[str, Rule]] = [
    # token ids and vocabularies
    (r"^pad_token_id$", 0),
    (r"^(bos_token_id|decoder_start_token_id|cls_token_id)$", 1),
    (r"^(eos_token_id|sep_token_id|forced_eos_token_id|eod_token_id)$", 2),
    (r"_token_(id|index)$", lambda old, name: 100 + sum(map(ord, name)) % 20),
    (r"^(mask_index|unk_index)$", 3),
    (r"vocab_size$|^encoder_hash_byte_group_vocab$|^ngram_vocab_size_base$", lambda old, name: min(old, VOCABULARY)),
    # depth
    (r"^(num_hidden_layers|n_layers?|num_layers|(num_)?(encoder|decoder)_layers)$", LAYERS),
    (r"^(num_blocks)$", LAYERS),
    (r"^num_kv_shared_layers$", 0),
    (r"^(num_mtp_layers|num_nextn_predict_layers)$", 0),
    # widths
    (
        r"^(hidden_size|d_model|n_embd|dim_model|emb_dim|backbone_hidden_size|input_embedding_size|embedding_size"
        r"|word_embed_proj_dim|hidden_dim|embed_dim)$",
        HIDDEN,
    ),
    (r"^(output_embedding_size)$", HIDDEN),
    (r"^(lru_width|attention_hidden_size|embedding_dim)$", HIDDEN),
    (r"^mamba_d_ssm$", 2 * HIDDEN),
    # heads
    (r"(^|_)(num_key_value_heads|num_kv_heads|n_kv_heads)$", lambda old, name: 1 if old == 1 else KV_HEADS),
    (r"^linear_num_key_heads$", 2),
    (r"^linear_num_value_heads$", 4),
    (r"^(index_n_heads|indexer_n_heads|indexer_kv_heads)$", 2),
    (r"^heads_per_ngram$", 2),
    (r"^(mamba_n_heads|mamba_num_heads)$", 8),
    (r"^n_mamba_heads$", lambda old, name: min(old, 8)),
    (r"(num_attention_heads|^n_heads?$|^num_heads$|attention_heads$)", HEADS),
    (
        r"^(linear_key_head_dim|linear_value_head_dim|linear_head_dim|dim_head|attention_head_size|kv_channels|d_head|head_dim"
        r"|swa_head_dim|global_head_dim|v_head_dim|index_head_dim|indexer_head_dim|attention_head_dim)$",
        HEAD_DIM,
    ),
    (r"^mamba_head_dim$", HEAD_DIM),
    (r"^qk_rope_head_dim$", 8),
    (r"^qk_nope_head_dim$", 8),
    (r"^qk_head_dim$", 16),
    (r"(q|kv|o)_lora_rank$", 32),
    (r"^(gated_norm_rank|laurel_rank|hc_lowrank|adapter_rank)$", 8),
    (r"^o_groups$", 2),
    (r"^rotary_dim$", 8),
    (r"^query_pre_attn_scalar$", HEAD_DIM),
    # feed-forward
    (r"(moe|expert|experts)_(intermediate_size|ffn_hidden_size)$|^moe_shared_expert_intermediate_size$|^moe_latent_size$", 32),
    (
        r"(intermediate_size|ffn_dim|^d_ff|^dff|^dim_ff|^d_inner|^n_inner|ffn_hidden_size|intermediate_size_mlp|feed_forward_size"
        r"|prompt_mid_dim|dense_intermediate_size)$",
        FEED_FORWARD,
    ),
    (r"^router_hidden_size$", 16),
    (r"^hidden_size_per_layer_input$", 8),
    # experts
    (r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts)$", lambda old, name: min(old, 4)),
    (r"^(num_experts_per_tok|moe_topk|moe_k|top_k_experts)$", lambda old, name: min(old, 2)),
    (r"^(n_shared_experts|num_shared_experts|moe_num_shared_experts)$", lambda old, name: min(old, 1)),
    (r"^(n_group|topk_group)$", 1),
    (r"^zero_expert_num$", 2),
    (r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index)$", lambda old, name: min(old, 1)),
    (r"^num_centroids$", 8),
    (r"^centroid_intermediate_top_k$", 2),
    # state-space, linear and sparse attention
    (r"^(state_size|ssm_state_size|mamba_d_state)$", 16),
    (r"^(mamba_n_groups|n_groups|mamba_ngroups)$", 1),
    (r"^(mamba_chunk_size|chunk_size|attention_chunk_size)$", 8),
    (r"^(index_topk|indexer_budget|index_block_size|index_topk_blocks)$", 4),
    (
        r"^(attn_layer_period|expert_layer_period|layer_group_size|global_attn_every_n_layers|no_rope_layer_interval|sliding_window_pattern)$",
        2,
    ),
    (r"^(attn_layer_offset)$", 1),
    # lengths
    (
        r"(max_position_embeddings|^n_positions|^n_ctx|^max_seq_len|^context_length|^max_(source|target)_positions|^max_seqlen"
        r"|^position_bias_max_distance|^rel_extent)$",
        POSITIONS,
    ),
    (r"^original_max_position_embeddings$", POSITIONS),
    (
        r"^(sliding_window|window_size|local_attention|attention_window_size|sliding_window_size|keep_window_size|local_attention_window_len)$",
        8,
    ),
    (r"^(block_size)$", 8),
    (r"^(prompt_length)$", 4),
    (r"^(pronunciation_embed_dim|shape_embed_dim)$", 16),
    # vision and audio towers that some composite configs bring along
    (r"^(depth)$", 1),
    (r"^(image_size)$", 32),
    (r"^(patch_size)$", 8),
    (r"^(num_mel_bins)$", 16),
]
RULES = [(re.compile(pattern), new) for pattern, new in _RULES]

# Fields whose default is still None after __post_init__, but which the modeling code needs.
NONE_DEFAULTS: dict[str, int | None] = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": KV_HEADS,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "ffn_hidden_size": FEED_FORWARD,
    "qk_head_dim": None,
}

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_DOTS3_WINDOW = {
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "head_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1]),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "mamba2": dict(num_heads=8),
    "longcat_flash": dict(head_dim=8, num_layers=1, num_hidden_layers=2),
    # without clip_qkv the attention of dbrx clamps with no bound at all and fails
    "dbrx": dict(
        attn_config={"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8},
        ffn_config={"hidden_size": HIDDEN, "ffn_hidden_size": FEED_FORWARD, "moe_num_experts": 4},
    ),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"sliding_attention": {**_ROPE, "mrope_section": [4, 2, 2]}, "full_attention": None},
    ),
    "reformer": dict(
        axial_pos_shape=[16, 32],
        axial_pos_embds_dim=[16, 48],
        num_hidden_layers=2,
        attn_layers=["local", "lsh"],
        num_buckets=4,
        local_attn_chunk_length=8,
        lsh_attn_chunk_length=8,
    ),
    "xmod": dict(default_language="en_XX"),
    "xlstm": dict(qk_dim_factor=1.0, chunk_size=64, max_inference_chunksize=64),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid", "linear_attention", "hybrid"]),
    "qwen4_exp_text": dict(
        eos_token_id=2,
        ple_layer_ids=[1],
        heads_per_ngram=2,
        ple_embed_dim=HIDDEN,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=HEAD_DIM,
        indexer_budget=8,
        indexer_compress_ratio=4,
        split_ngram_parts=1,
        make_ngram_vocab_size_divisible_by=8,
    ),
    "dots3_note_text": dict(
        layer_types=["indexed_attention", "sliding_attention"],
        num_hidden_layers=2,
        **{f"swa_{name}": value for name, value in _DOTS3_WINDOW.items()},
    ),
    "gemma4_text": dict(vocab_size_per_layer_input=VOCABULARY),
}

# lists that hold one entry per layer and name the kind of each layer
KIND_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types", "block_types")
_BASE_FIELDS = {f.name for f in dataclasses.fields(PreTrainedConfig)}


def model_types() -> list[str]:
    """Every model type that transformers maps to a causal LM; a few of them cannot be built tiny."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **extra: Any) -> PreTrainedConfig:
    """A small config of ``model_type``; ``extra`` overrides single fields."""
    config_class = CONFIG_MAPPING[model_type]
    # composite configs whose causal LM takes the text (or decoder) part only
    wanted = getattr(_model_class(config_class), "config_class", None)
    if wanted is not None and wanted is not config_class and not issubclass(config_class, wanted):
        config_class, model_type = wanted, getattr(wanted, "model_type", model_type)
    config = config_class(**{**shrink_kwargs(config_class), **OVERRIDES.get(model_type, {}), **extra})
    if not getattr(config, "is_encoder_decoder", False):
        text = config.get_text_config(decoder=True)
        for part in {id(config): config, id(text): text}.values():
            if hasattr(part, "is_decoder") and not getattr(part, "is_encoder_decoder", False):
                part.is_decoder = True
    return config


def tiny_model(model_type: str, seed: int = 0, perturb: float = 0.05, attn: str | None = "eager", **extra: Any) -> PreTrainedModel:
    """A tiny model of ``model_type`` on the CPU, float32, eval.

    Args:
        model_type: one of ``model_types()``.
        seed: seeds the global generator for the weights, and the noise.
        perturb: standard deviation of the noise added to every weight, so that no identity hides a bug.
        attn: attention implementation, or None for the default of transformers; a type that refuses it gets its default.
        **extra: config fields.
    """
    torch.manual_seed(seed)
    config = tiny_config(model_type, **extra)
    model_class = _model_class(CONFIG_MAPPING[model_type])
    try:
        model = model_class._from_config(config, attn_implementation=attn) if attn else model_class._from_config(config)
    except (ValueError, ImportError):
        model = model_class._from_config(config)
    model = model.eval().float()
    if perturb:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for p in model.parameters():
                if p.is_floating_point():
                    p.add_(perturb * torch.randn(p.shape, generator=generator, dtype=torch.float32).to(p.dtype))
    return model


def shrink_kwargs(config_class: type[PreTrainedConfig], full: PreTrainedConfig | None = None) -> dict[str, Any]:
    """Arguments for a tiny instance of ``config_class``; ``full`` is its full-size default."""
    full = config_class() if full is None else full
    fields = [f for f in dataclasses.fields(config_class) if f.init]
    names = {f.name for f in fields}
    kwargs: dict[str, Any] = {}
    for f in fields:
        if f.name in _BASE_FIELDS and f.name not in ("pad_token_id", "bos_token_id", "eos_token_id"):
            continue
        value = _default(f)
        if isinstance(value, list) and f.name == "eos_token_id":
            value = 2
        new = _shrink_value(f.name, value)
        if new is None and value is None and f.name in NONE_DEFAULTS and _get(full, f.name) is None:
            new = NONE_DEFAULTS[f.name]
        if new is not None:
            kwargs[f.name] = new
    # plain multi-head attention stays plain; so does MLA, which repeats its keys for every query head
    same_heads = _get(full, "num_key_value_heads") == _get(full, "num_attention_heads", 0)
    if kwargs.get("num_key_value_heads") == KV_HEADS and (same_heads or "kv_lora_rank" in names):
        kwargs["num_key_value_heads"] = HEADS
    kwargs.update(_sub_configs(config_class, full))
    kwargs.update(_layer_kinds(full, names))
    rope = getattr(full, "rope_parameters", None)
    if isinstance(rope, dict) and "rope_parameters" in names:
        shrunk = _shrink_rope(copy.deepcopy(rope), kwargs)
        if shrunk is not None:
            kwargs["rope_parameters"] = shrunk
    return kwargs


def _default(f: dataclasses.Field) -> Any:
    """The default of a dataclass field, None if it has none."""
    if f.default is not dataclasses.MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not dataclasses.MISSING else None


def _shrink_value(name: str, value: Any) -> int | None:
    """The small value of an integer field, None where no rule applies."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    for pattern, new in RULES:
        if pattern.search(name):
            return new(value, name) if callable(new) else new
    return None


def _sub_configs(config_class: type[PreTrainedConfig], full: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """A tiny instance of every sub-config that can be built alone; the others keep the default of their parent."""
    found = {}
    for key, declared in (getattr(config_class, "sub_configs", {}) or {}).items():
        sub_full = getattr(full, key, None)
        sub_class = type(sub_full) if isinstance(sub_full, PreTrainedConfig) else declared
        if not (isinstance(sub_class, type) and issubclass(sub_class, PreTrainedConfig)) or sub_class is PreTrainedConfig:
            continue
        try:
            found[key] = sub_class(**shrink_kwargs(sub_class, sub_full if isinstance(sub_full, PreTrainedConfig) else None))
        except (ValueError, TypeError, AttributeError, KeyError, ImportError, StrictDataclassError):
            # a part that causal LMs do not use (a tower with rules of its own)
            continue
    return found


def _layer_kinds(full: PreTrainedConfig, names: set[str]) -> dict[str, Any]:
    """One layer per distinct kind, for the lists that name the kind of each layer."""
    kinds = {}
    for name in KIND_LISTS:
        value = getattr(full, name, None) if name in names else None
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            kinds[name] = _unique(value)
    depth_field = next((n for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if n in names), None)
    if not kinds or depth_field is None:
        return {}
    depth = max([LAYERS] + [len(kind) for kind in kinds.values()])
    return {depth_field: depth, **{name: (kind + [kind[-1]] * depth)[:depth] for name, kind in kinds.items()}}


def _shrink_rope(rope: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """``rope`` with sections and factor lists that match the smaller head, None where nothing had to change."""
    changed = False
    nested = bool(rope) and all(isinstance(value, dict) for value in rope.values())
    for options in rope.values() if nested else [rope]:
        if "mrope_section" in options:
            parts = len(options["mrope_section"])
            half = int(kwargs.get("head_dim", HEAD_DIM) * options.get("partial_rotary_factor", 1.0)) // 2
            each = half // parts
            options["mrope_section"] = [half - each * (parts - 1)] + [each] * (parts - 1)
            changed = True
        for key in ("short_factor", "long_factor"):
            if key in options:
                options[key] = [1.0] * (kwargs.get("head_dim", HEAD_DIM) // 2)
                changed = True
        if "original_max_position_embeddings" in options:
            options["original_max_position_embeddings"] = POSITIONS // 4
            changed = True
    return rope if changed else None


def _unique(values: Iterable[Any]) -> list[Any]:
    """The distinct values, in order."""
    return list(dict.fromkeys(values))


def _get(config: PreTrainedConfig, name: str, default: Any = None) -> Any:
    """``getattr`` for configs whose layers differ: those raise a RuntimeError for a field that has no single value."""
    try:
        return getattr(config, name, default)
    except (RuntimeError, ValueError):
        return default


def _model_class(config_class: type[PreTrainedConfig]) -> Any:
    """The causal-LM class of a config class."""
    found = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    return found[0] if isinstance(found, (list, tuple)) else found
