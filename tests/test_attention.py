"""attention_patch, and the alias under which patchkit's attention functions run."""

from __future__ import annotations

import pytest
import torch
from support import cache_of, cached
from transformers import LlamaConfig, LlamaForCausalLM

from patchkit import _compat, attention_patch, patch, patch_model, patched, report, unpatch_model
from patchkit.attention import masks_from
from patchkit.errors import UnsupportedModel
from patchkit.testing import TOLERANCES, assert_restored, logit_error, snapshot, tiny_model

CLOSE = TOLERANCES[torch.float32].logits


@pytest.fixture
def registry(monkeypatch):
    """Patches that a test registers are forgotten after it."""
    monkeypatch.setattr(patch, "_registry", dict(patch.available_patches()))


def softmax_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    weights = (query @ key.transpose(2, 3) * scaling + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def tokens(rows: int = 1) -> torch.Tensor:
    return torch.randint(4, 100, (rows, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_moe", "deepseek_v3", "gemma3_text", "opt", "qwen3_next"])
def test_the_same_function_is_the_same_model(family, registry):
    own = attention_patch("own")(softmax_attention)
    model = tiny_model(family)
    before = snapshot(model)
    mask = torch.ones(2, 20)
    mask[0, :3] = 0
    with torch.no_grad():
        plain = model(input_ids=tokens(2), attention_mask=mask).logits[:, 3:]
        with patched(model, own()):
            assert logit_error(model(input_ids=tokens(2), attention_mask=mask).logits[:, 3:], plain) <= CLOSE
            assert report(model).patches[0].hits["attention calls"] == report(model).patches[0].changed["attention modules"]
    assert_restored(before, model)


def test_its_mask_rule_limits_what_is_visible(registry):
    attention_patch("nearest", mask=lambda batch, head, query, key: key > query - 5)(softmax_attention)
    model, ids = tiny_model("llama"), tokens()
    i, j = torch.arange(20)[:, None], torch.arange(20)[None]
    allowed = torch.where((j <= i) & (j > i - 5), 0.0, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        expected = model(input_ids=ids, attention_mask=allowed).logits
        patch_model(model, "nearest")
        assert logit_error(model(input_ids=ids).logits, expected) <= CLOSE
        assert logit_error(plain, expected) > TOLERANCES[torch.float32].differs
        out = model(input_ids=ids[:, :12], use_cache=True)
        steps = [out.logits]
        for t in range(12, 20):
            out = model(input_ids=ids[:, t : t + 1], **cached(cache_of(out)))
            steps.append(out.logits)
        assert logit_error(torch.cat(steps, 1), expected) <= CLOSE


def test_models_that_compute_attention_themselves_are_refused(registry):
    own = attention_patch("own")(softmax_attention)
    with pytest.raises(UnsupportedModel, match="attention interface"):
        patch_model(tiny_model("falcon"), own())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_that_shares_the_config_runs_on_unpatched(implementation):
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
    )
    config._attn_implementation = implementation
    torch.manual_seed(0)
    one, other = LlamaForCausalLM(config).eval(), LlamaForCausalLM(config).eval()
    other.model.config = other.config = one.config
    for layer in other.model.layers:
        layer.self_attn.config = one.config
    with torch.no_grad():
        expected = other(input_ids=tokens(), attention_mask=torch.ones(1, 20)).logits
        patch_model(one, "streaming(sinks=1, window=4)")
        assert one.config._attn_implementation != implementation and other.config is one.config
        assert torch.equal(other(input_ids=tokens(), attention_mask=torch.ones(1, 20)).logits, expected)
        unpatch_model(one)
    assert one.config._attn_implementation == implementation


@torch.no_grad()
def test_masked_attention_of_groups_reads_keys_once_and_only_within_the_context(monkeypatch):
    model = tiny_model("llama")
    heads, groups = model.config.num_attention_heads, model.config.num_key_value_heads
    assert heads > groups
    keys = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def seen(query, key, *args, **kwargs):
        keys.append(key.shape[1])
        return sdpa(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", seen)
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :3] = 0
    logits, read = [], []
    for inside in (False, True, False):
        keys.clear()
        if inside:
            with masks_from(_compat.attention_configs(model), None):
                logits.append(model(input_ids=tokens(2), attention_mask=mask).logits[:, 3:])
        else:
            logits.append(model(input_ids=tokens(2), attention_mask=mask).logits[:, 3:])
        read.append(set(keys))
    assert read == [{heads}, {groups}, {heads}]
    assert torch.equal(logits[0], logits[2]) and logit_error(logits[1], logits[0]) <= CLOSE
