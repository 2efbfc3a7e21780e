"""int8: attention and the head beside the feed-forward blocks; embeddings that share the head's weight stay exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import cache_of, cached
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from patchkit import StaleWeights, patch_model, patched, refresh, report, unpatch_model
from patchkit.int8.weight import Int8Weight
from patchkit.patches.int8 import Int8
from patchkit.testing import assert_restored, snapshot, tiny_model

IDS = torch.randint(4, 100, (2, 30), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def converted(model: Any) -> set[str]:
    return {
        name for name, module in model.named_modules() if isinstance(dict(module.named_parameters(recurse=False)).get("weight"), Int8Weight)
    }


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """A weight [N, K] on 255 levels per row, by definition."""
    step = weight.abs().amax(1, keepdim=True) / 127
    return (weight / step).round() * step


def small(tied: bool) -> Any:
    """A random Llama whose head is, or is not, its embedding."""
    sizes: dict[str, Any] = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)).eval()


def leaves(names: set[str]) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("gpt_neox", {"query_key_value", "dense"}),
        ("gpt2", {"c_attn"}),  # its c_proj has the name of the feed-forward block's
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ],
)
def test_scopes(family: str, attention: set[str]) -> None:
    found = {}
    for scope in ("mlp", "all", "all+head"):
        model = tiny_model(family)
        before = snapshot(model)
        patch_model(model, Int8(scope=scope), verbose=False)
        found[scope] = converted(model)
        logits(model)
        unpatch_model(model)
        assert_restored(before, model)
    assert leaves(found["all"] - found["mlp"]) >= attention
    assert not leaves(found["mlp"]) & attention
    assert len(found["all+head"] - found["all"]) == 1 and found["all"] > found["mlp"]


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_rounded_and_embeddings_are_not(tied: bool) -> None:
    model = small(tied)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    assert (head.weight is embedding) == tied
    kept = embedding.detach().clone()
    plain = small(tied)
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(rounded(module.weight.detach()))
    wanted = logits(plain)
    with patched(model, Int8(scope="all+head", mode="weight_only"), verbose=False):
        assert torch.equal(model.get_input_embeddings().weight, kept)
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-4)
        assert "another likeliest token at" in str(report(model))
        # The wrong variant, embeddings that are rounded too, would be seen.
        model.get_input_embeddings().weight.data.copy_(rounded(kept))
        assert not torch.allclose(logits(model), wanted, rtol=1e-3, atol=1e-4)
        model.get_input_embeddings().weight.data.copy_(kept)
    assert head.weight is (embedding if tied else head.weight)
    assert not isinstance(head.weight, Int8Weight)


@pytest.mark.parametrize("keep_original", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_has_the_head_in_floating_point(tied: bool, keep_original: bool, tmp_path: Any) -> None:
    pytest.importorskip("torchao")
    model = small(tied)
    head = model.get_output_embeddings().weight.detach().clone()
    patch_model(model, Int8(scope="all+head", mode="weight_only", keep_original=keep_original), verbose=False)
    names = converted(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    exact = head if keep_original or tied else rounded(head)
    torch.testing.assert_close(loaded.get_output_embeddings().weight.detach(), exact, rtol=1e-6, atol=1e-7)
    for name in names - {"lm_head"}:
        weight: Any = loaded.get_submodule(name).weight
        torch.testing.assert_close(weight.dequantize(), model.get_submodule(name).weight.dequantize(), rtol=1e-6, atol=1e-7)
    # The loaded model is patched again: its int8 values are taken over, and the head is rounded again.
    patch_model(loaded, Int8(scope="all+head", mode="weight_only"), verbose=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_weights_that_change_are_rounded_again() -> None:
    model = small(tied=True)
    patch_model(model, Int8(scope="all+head"), verbose=False)
    before = logits(model)
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        embedding.mul_(1.5)
    refresh(model)
    torch.testing.assert_close(model.get_output_embeddings().weight.dequantize(), rounded(embedding.detach()), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), before)


def test_a_module_that_cannot_run_over_int8_undoes_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some code reads a weight itself instead of calling its layer; that is found when patching, not in the user's forward."""
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    own = attention.forward
    attention.forward = lambda hidden_states, **kwargs: own(hidden_states + 0 * attention.q_proj.weight.sum(), **kwargs)
    before = snapshot(model)
    with pytest.raises(Exception, match="int8 weight"):
        patch_model(model, Int8(), verbose=False)
    assert_restored(before, model)
    logits(model)


@pytest.mark.parametrize("patches", ["int8 + speculative", "int8(scope='all+head') + streaming(sinks=2, window=10)", "mlp_int8 + int8"])
def test_with_other_patches(patches: str) -> None:
    model = tiny_model("llama")
    alone = [part for part in patches.split(" + ") if "speculative" not in part]
    with patched(model, " + ".join(alone), verbose=False):
        wanted = model.generate(IDS[:1], max_new_tokens=20, do_sample=False, pad_token_id=0)
    with patched(model, patches, verbose=False):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=20, do_sample=False, pad_token_id=0), wanted)


def test_wrong_scopes_are_refused() -> None:
    with pytest.raises(ValueError, match="'mlp', 'all', 'all\\+head'"):
        Int8(scope="head")  # type: ignore[arg-type]


def test_a_weight_of_another_shape_is_stale() -> None:
    model = tiny_model("llama")
    original = model.model.layers[0].self_attn.q_proj.weight
    patch_model(model, Int8(), verbose=False)
    original.data = torch.zeros(3, 3)
    with pytest.raises(StaleWeights, match="int8 cannot quantise it again"):
        refresh(model)


def test_layers_that_share_compiled_code_keep_their_kinds_of_activation() -> None:
    """As of a model of which torchao has quantised some layers weight-only, and some dynamically."""
    ids = torch.randint(4, 100, (1, 8), generator=torch.Generator().manual_seed(3))
    found = []
    for spec in ("", " + compile(scope=layers, backend=aot_eager)"):
        torch.manual_seed(0)
        model = tiny_model("llama")
        patch_model(model, f"mlp_int8(mode=weight_only){spec}", verbose=False)
        for weight in model.model.layers[0].mlp.parameters():
            weight.activation = "int8"
        with torch.no_grad():
            cache = cache_of(model(ids, use_cache=True))
            found.append(model(ids[:, :1], **cached(cache)).logits)
    torch.testing.assert_close(found[1], found[0])
