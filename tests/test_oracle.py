"""The oracle against the plain forward, against a second definition written by hand, and against wrong rules."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import OracleUnsupported, oracle_logits
from tiny_configs import tiny_model as tiny_config_model
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit.testing import TOLERANCES, logit_error, tiny_model

SINKS, WINDOW, LENGTH = 2, 6, 24
FP32 = TOLERANCES[torch.float32]


def text(length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    """Seeded ids ``[1, length]`` without special tokens."""
    return torch.randint(3, 100, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A llama whose weights leave no layer near the identity."""
    return tiny_model("llama")


def rotated(x: torch.Tensor, position: int, frequencies: torch.Tensor) -> torch.Tensor:
    """One head ``[K]`` rotated to ``position``, the two halves of a llama head being the two coordinates of each plane."""
    plane = torch.complex(x[: len(x) // 2], x[len(x) // 2 :]) * torch.polar(torch.ones_like(frequencies), position * frequencies)
    return torch.cat([plane.real, plane.imag])


def norm(x: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    """RMS norm of one row."""
    return x / torch.sqrt((x * x).mean() + module.variance_epsilon) * module.weight.double()


def llama_by_hand(model: LlamaForCausalLM, ids: torch.Tensor, sinks: int, window: int) -> torch.Tensor:
    """StreamingLLM on llama, pair by pair in float64: ``ids`` ``[1, T]`` to logits ``[1, T, V]``."""
    config = model.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    theta = config.rope_parameters["rope_theta"]
    frequencies = torch.tensor([theta ** (-2 * i / width) for i in range(width // 2)], dtype=torch.float64)
    rows = [model.model.embed_tokens.weight.double()[token] for token in ids[0].tolist()]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        normed = [norm(x, layer.input_layernorm) for x in rows]
        q, k, v = (
            [(linear.weight.double() @ x).view(-1, width) for x in normed]
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        after = []
        for i, x in enumerate(rows):
            heard = []
            for h in range(heads):
                g = h * groups // heads
                scores, values = [], []
                for j in range(i + 1):
                    if i - j < window:
                        distance = i - j
                    elif j < sinks:
                        distance = min(i, sinks + window - 1) - j
                    else:
                        continue
                    scores.append(rotated(q[i][h], distance, frequencies) @ k[j][g] / math.sqrt(width))
                    values.append(v[j][g])
                heard.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
            x = x + attention.o_proj.weight.double() @ torch.cat(heard)
            y = norm(x, layer.post_attention_layernorm)
            gate, up = mlp.gate_proj.weight.double() @ y, mlp.up_proj.weight.double() @ y
            after.append(x + mlp.down_proj.weight.double() @ (gate * torch.sigmoid(gate) * up))
        rows = after
    return torch.stack([model.lm_head.weight.double() @ norm(x, model.model.norm) for x in rows])[None]


@pytest.mark.parametrize(("sinks", "window"), [(SINKS, WINDOW), (0, 5), (4, 1), (1, 9)])
def test_agrees_with_the_definition_by_hand(llama: LlamaForCausalLM, sinks: int, window: int) -> None:
    ids = text()
    assert logit_error(oracle_logits(llama, ids, sinks, window), llama_by_hand(llama, ids, sinks, window)) < 1e-5


ANATOMIES = [
    "llama",
    "bloom",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "falcon",
    "gemma2",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "jamba",
    "lfm2",
    "mamba",
    "mistral",
    "mixtral",
    "mpt",
    "opt",
    "qwen3_next",
]


@pytest.mark.parametrize("family", ANATOMIES)
def test_short_text_is_the_plain_forward(family: str) -> None:
    model = tiny_model(family)
    ids = text(SINKS + WINDOW)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
    assert logit_error(oracle_logits(model, ids, SINKS, WINDOW), plain) < FP32.logits


@pytest.mark.parametrize(
    "wrong", [dict(window=WINDOW + 1), dict(window=WINDOW - 1), dict(sinks=SINKS + 1), dict(sinks=SINKS - 1), dict(positions="true")]
)
def test_a_wrong_rule_is_seen(llama: LlamaForCausalLM, wrong: dict) -> None:
    ids = text(3 * (SINKS + WINDOW))
    right = oracle_logits(llama, ids, SINKS, WINDOW)
    assert logit_error(oracle_logits(llama, ids, **{"sinks": SINKS, "window": WINDOW, **wrong}), right) > FP32.differs


def test_true_positions_are_the_masked_forward(llama: LlamaForCausalLM) -> None:
    ids = text()
    query, key = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    visible = (key <= query) & ((key < SINKS) | (key > query - WINDOW))
    mask = torch.where(visible, 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        masked = llama(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logit_error(oracle_logits(llama, ids, SINKS, WINDOW, positions="true"), masked) < FP32.logits


def test_only_the_named_layers_stream(llama: LlamaForCausalLM) -> None:
    ids = text()
    with torch.no_grad():
        plain = llama(input_ids=ids, use_cache=False).logits
    assert logit_error(oracle_logits(llama, ids, SINKS, WINDOW, layers=[]), plain) < FP32.logits
    every = oracle_logits(llama, ids, SINKS, WINDOW)
    assert torch.equal(oracle_logits(llama, ids, SINKS, WINDOW, layers=[0, 1]), every)
    first = oracle_logits(llama, ids, SINKS, WINDOW, layers=[0])
    assert logit_error(first, every) > FP32.differs
    assert logit_error(first, plain) > FP32.differs


def test_layers_with_a_window_of_their_own_keep_it() -> None:
    """Mistral has nothing but such layers: streaming changes nothing. Gemma 2 has both kinds."""
    ids = text(40)
    mistral, gemma = tiny_model("mistral"), tiny_model("gemma2")
    with torch.no_grad():
        assert logit_error(oracle_logits(mistral, ids, SINKS, WINDOW), mistral(input_ids=ids, use_cache=False).logits) < FP32.logits
    full = [i for i, kind in enumerate(gemma.config.layer_types) if kind == "full_attention"]
    default = oracle_logits(gemma, ids, SINKS, WINDOW)
    assert torch.equal(oracle_logits(gemma, ids, SINKS, WINDOW, layers=full), default)
    # the order of the two kinds must not matter: an own window is found above a full layer too
    other = tiny_config_model("gemma2", layer_types=["full_attention", "sliding_attention"])
    assert torch.equal(oracle_logits(other, ids, SINKS, WINDOW, layers=[0]), oracle_logits(other, ids, SINKS, WINDOW))
    # the window of the model (8) is longer than the streaming one (4): still its own
    with torch.no_grad():
        assert logit_error(oracle_logits(gemma, ids, 1, 4), gemma(input_ids=ids, use_cache=False).logits) > FP32.differs


def test_a_recurrent_model_is_left_as_it_is() -> None:
    ids = text()
    model = tiny_model("mamba")
    with torch.no_grad():
        assert logit_error(oracle_logits(model, ids, SINKS, WINDOW), model(input_ids=ids, use_cache=False).logits) < FP32.logits


def test_the_model_is_left_without_hooks(llama: LlamaForCausalLM) -> None:
    oracle_logits(llama, text(10), SINKS, WINDOW)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in llama.modules())


def test_unsupported_and_bad_arguments_say_why(llama: LlamaForCausalLM) -> None:
    with pytest.raises(OracleUnsupported, match="position_ids"):
        oracle_logits(tiny_model("bloom"), text(10), SINKS, WINDOW, positions="true")
    with pytest.raises(OracleUnsupported, match="are no attention layers"):
        oracle_logits(llama, text(10), SINKS, WINDOW, layers=[7])
    with pytest.raises(ValueError, match="window=0"):
        oracle_logits(llama, text(10), SINKS, 0)
    with pytest.raises(ValueError, match="sidewise"):
        oracle_logits(llama, text(10), SINKS, WINDOW, positions="sidewise")
    with pytest.raises(ValueError, match=r"\[2, 5\]"):
        oracle_logits(llama, torch.zeros(2, 5, dtype=torch.int64), SINKS, WINDOW)


def test_a_model_that_is_not_causal_is_refused() -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    model = LlamaForCausalLM(config).eval()
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, rows: rows + rows.sum(1, keepdim=True))
    try:
        with pytest.raises(OracleUnsupported, match="not causal"):
            oracle_logits(model, text(10), SINKS, WINDOW)
    finally:
        handle.remove()


def test_tokens_that_are_mixed_elsewhere_are_seen() -> None:
    """A sum over the past is causal; done by an embedding it is a mixer of its own, done by the decoder nothing can follow it."""
    config = LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=128)
    model = LlamaForCausalLM(config).eval()
    ids = text(10)
    handle = model.model.embed_tokens.register_forward_hook(lambda module, args, rows: rows + rows.cumsum(1))
    with torch.no_grad():
        assert logit_error(oracle_logits(model, ids, 4, 6), model(input_ids=ids, use_cache=False).logits) < FP32.logits
    handle.remove()

    def mix(module: torch.nn.Module, args: tuple, output: dict) -> dict:
        output["last_hidden_state"] = output["last_hidden_state"].cumsum(1)
        return output

    model.model.register_forward_hook(mix)
    with pytest.raises(OracleUnsupported, match="outside the attention"):
        oracle_logits(model, ids, SINKS, WINDOW)
