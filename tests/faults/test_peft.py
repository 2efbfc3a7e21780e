"""Models in PEFT's wrappers: prompts, prefixes, an adapter for each row, directories of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from patchkit import patch_model, report
from patchkit.errors import StreamError
from patchkit.models import ModelUnavailable, load_model
from patchkit.testing import tiny_model

IDS = torch.arange(12)[None] % 5 * 7 + 5
# PEFT on transformers 5.24 feeds its prompt again at every step: 20 steps are 200 tokens.
EVERY = ["speculative(k=4)", "streaming(sinks=2, window=400)", "linear(window=400)", "compile(backend=eager)", "mlp_int8(mode=weight_only)"]


def tuned(kind: str, family: str = "llama") -> Any:
    """A tuned model whose tuning changes its text."""
    torch.manual_seed(0)
    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    model = peft.get_peft_model(tiny_model(family), configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=8)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "prompt_encoder" in name:
                weight.normal_(0, 3)
    return model


def generate(model: Any, ids: torch.Tensor = IDS, **options: Any) -> torch.Tensor:
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False, **options)


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_a_tuned_prompt_is_not_lost(spec, kind):
    plain, base = tuned(kind), tiny_model("llama")
    wanted = generate(plain)
    # PEFT 0.21 puts its prefix where transformers 5.24 no longer looks; then it is without effect, on an unpatched model too.
    matters = not torch.equal(wanted, generate(base))
    assert matters or kind == "prefix"
    model = patch_model(tuned(kind), spec, verbose=False)
    if kind == "prefix" and matters and spec.startswith(("streaming", "linear")):
        with pytest.raises(StreamError, match="prefix"):
            generate(model)
        return
    found = generate(model)
    if "int8" in spec:
        assert torch.equal(found[:, :14], wanted[:, :14])
    else:
        assert torch.equal(found, wanted)


def test_an_adapter_for_each_row_is_for_the_stock_method():
    def make() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
        model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="a")
        model.add_adapter("b", config)
        return model.eval()

    plain, model = make(), patch_model(make(), "speculative(k=4)", verbose=False)
    ids, names = torch.cat([IDS, IDS + 2, IDS + 4]), ["a", "b", "__base__"]
    assert torch.equal(generate(model, ids, adapter_names=names), generate(plain, ids, adapter_names=names))
    assert report(model).patches[0].hits["stock calls"] == 1
    assert torch.equal(generate(model), generate(plain))  # and it is speculative again
    assert report(model).patches[0].hits["rounds"] > 0


def test_a_directory_of_an_adapter_is_loaded_on_its_base(tmp_path: Path):
    base, tokenizer = load_model("stdlib-1m-draft")
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    ).eval()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded, _ = load_model(tmp_path / "adapter")
    assert not hasattr(loaded, "peft_config") and type(loaded) is type(tiny_model("llama"))
    with torch.no_grad():
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-3)
        plain, _ = load_model(tmp_path / "base")
        assert not torch.allclose(loaded(IDS).logits, plain(IDS).logits, atol=1e-2)


def test_an_adapter_that_cannot_be_merged_or_found_says_so(tmp_path: Path):
    model = tuned("prompt")
    model.peft_config["default"].base_model_name_or_path = "stdlib-7m"
    model.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ModelUnavailable, match="cannot be merged"):
        load_model(tmp_path / "prompt")
    lora = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    lora.peft_config["default"].base_model_name_or_path = str(tmp_path / "gone")
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelUnavailable, match="gone"):
        load_model(tmp_path / "lora")
