"""Tiny GGUF files, written with the gguf package as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

# Without it, whoever imports this is skipped.
gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install gguf")

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "Ċ Ċ", "h e", "l l", "he ll", "hell o", "Ġ a"]


def alphabet() -> list[str]:
    """The 256 characters that byte-level BPE writes bytes with (GPT-2's encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + index) for index in range(len(others))]


def tokens() -> list[str]:
    return [*SPECIAL, *alphabet(), *("".join(merge.split()) for merge in MERGES)]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of 2 layers with grouped queries and tied embeddings, whose weights stand in for an original checkpoint's."""
    config = LlamaConfig(
        vocab_size=len(tokens()),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def write(
    path: Path, model: LlamaForCausalLM, without: str | None = None, pre: str = "smollm", scaled: bool = False, quantized: bool = True
) -> dict[str, Any]:
    """Write ``model`` to a GGUF file, its matrices in blocks of 8 bits.

    Args:
        without: leave out the tensors in whose name this is.
        pre: tokenizer.ggml.pre.
        scaled: add llama.cpp's factors of scaled rotary frequencies.
        quantized: False for 32 bits.

    Returns:
        What each matrix is once it is unpacked, by its name in the model.
    """
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    unpacked = {}
    for name, parameter in model.state_dict().items():
        theirs = _gguf_name(name)
        if theirs is None or (without is not None and without in name):
            continue
        values = parameter.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            values = _interleaved(values, config.head_dim)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantized and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quantize(values, kind)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
        unpacked[name] = torch.from_numpy(gguf.dequantize(packed, kind).copy())
    if scaled:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, config.head_dim // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return unpacked


def _gguf_name(name: str) -> str | None:
    if name == "lm_head.weight":  # tied
        return None
    if name in (outer := {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}):
        return outer[name]
    _, _, layer, part = name.split(".", 3)
    theirs = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }[part.removesuffix(".weight")]
    return f"blk.{layer}.{theirs}.weight"


def _interleaved(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp turns neighbouring dimensions by one angle, transformers those that are half a head apart: [H * K, D] reordered."""
    heads = weight.reshape(-1, 2, head_dim // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)
