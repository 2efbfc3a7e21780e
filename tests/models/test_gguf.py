"""GGUF files become dense models whose weights are what the file says, and models that users load from them take every patch."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from patchkit import _compat, available_patches, patch_model, unpatch_model
from patchkit.cli import app
from patchkit.errors import PatchError
from patchkit.export import ExportError, export
from patchkit.models import ModelUnavailable, find, load_model, loading
from patchkit.testing import TOLERANCES

IDS = torch.arange(3, 43)[None]
MARKS = ("hf_quantizer", "quantization_method", "is_quantized")
# Of every patch, options under which it acts on a tiny model.
SPECS = {
    "streaming": "streaming(sinks=2, window=8)",
    "linear": "linear(window=8)",
    "speculative": "speculative(k=3)",
    # Two models are compared, which "auto" would time each for itself.
    "mlp_int8": "mlp_int8(mode=weight_only)",
    "int8": "int8(mode=weight_only)",
    "int4": "int4(mode=weight_only)",
    "compile": "compile(backend=eager)",
}


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_gguf.tiny_llama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, original: Any) -> Path:
    """A directory that holds one GGUF file and nothing else. Tests must not write into it."""
    path = tmp_path_factory.mktemp("gguf")
    tiny_gguf.write(path / "tiny.gguf", original)
    return path


@pytest.fixture
def loaded(folder: Path) -> Any:
    """As users load it, with transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def test_weights_are_what_the_file_says_and_run_as_the_original_does(folder: Path, original: Any, tmp_path: Path) -> None:
    model, _ = load_model(folder)
    stored = tiny_gguf.write(tmp_path / "again.gguf", original)
    for name, values in model.state_dict().items():
        if not name.endswith(("q_proj.weight", "k_proj.weight", "lm_head.weight")):
            assert torch.equal(values, stored[name]), name
    # Without blocks nothing is rounded, so that a wrong order of heads or dimensions, rope base or epsilon could not hide.
    tiny_gguf.write(tmp_path / "full.gguf", original, quantized=False)
    full, _ = load_model(tmp_path / "full.gguf")
    tolerance = TOLERANCES[torch.float32]
    assert (logits(full) - logits(original)).abs().max() <= tolerance.logits
    assert (logits(model) - logits(original)).abs().max() > tolerance.differs


def test_directory_and_file_are_the_same_model(folder: Path) -> None:
    model, tokenizer = load_model(folder)
    same, _ = load_model(folder / "tiny.gguf")
    assert torch.equal(logits(model), logits(same))
    assert model.config.max_position_embeddings == tokenizer.model_max_length == 512
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_nothing_calls_the_model_quantised(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder)
    assert not [mark for mark in MARKS if hasattr(model, mark)] and "quant" not in str(model.config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(parameter.requires_grad and type(parameter) is torch.nn.Parameter for parameter in model.parameters())
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, its_tokenizer = load_model(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model)) and again.lm_head.weight is again.model.embed_tokens.weight
    assert its_tokenizer.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert its_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    assert its_tokenizer.chat_template == tokenizer.chat_template == tiny_gguf.TEMPLATE
    model.half()


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto"])
def test_dtypes(folder: Path, dtype: Any) -> None:
    model, _ = load_model(folder, dtype)
    wanted = {"float16": torch.float16, "auto": torch.float32}.get(dtype, dtype)
    exact, _ = load_model(folder)
    assert model.dtype == wanted
    for name, values in model.state_dict().items():
        assert torch.equal(values, exact.state_dict()[name].to(wanted)), name


def test_unknown_dtype(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype='int3'"):
        load_model(folder, "int3")


def test_tokenizer_does_what_the_file_says(folder: Path) -> None:
    _, tokenizer = load_model(folder)
    assert tokenizer.special_tokens_map == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
    }
    # Digits stand apart before anything else is split: else the last of several line breaks would go with the digit.
    assert tokenizer.tokenize("\n\n12") == ["ĊĊ", "1", "2"] and tokenizer.tokenize("  7") == ["ĠĠ", "7"]
    assert tokenizer.tokenize("hello<|im_end|>\n") == ["hello", "<|im_end|>", "Ċ"]
    text = "<|im_start|>user\nhello ▁ 日本  12\n\n3 . n't <|im_end|>"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("pre, apart, warns", [("gpt-2", False, False), ("starcoder", True, False), ("no-such-split", False, True)])
def test_how_text_is_split(pre: str, apart: bool, warns: bool, original: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", original, pre=pre)
    _, tokenizer = load_model(tmp_path)
    assert tokenizer.tokenize("\n\n1") == (["ĊĊ", "1"] if apart else ["Ċ", "Ċ", "1"])
    assert any(pre in record.getMessage() for record in caplog.records) is warns


@pytest.mark.parametrize("which", ["", "tiny.gguf"])
def test_commands_take_it(which: str, folder: Path) -> None:
    for arguments in (["inspect", str(folder / which), "--json"], ["generate", str(folder / which), "--prompt", "hello", "--json"]):
        result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", "4"] if arguments[0] == "generate" else arguments)
        assert result.exit_code == 0, result.stderr
        found = json.loads(result.stdout)
        assert found["class"] == "LlamaForCausalLM" if arguments[0] == "inspect" else found["chat"] is True and found["new_tokens"] <= 4


def test_several_files_are_listed(folder: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes((folder / "tiny.gguf").read_bytes())
    with pytest.raises(ModelUnavailable, match=r"2 GGUF files.*a\.gguf, b\.gguf"):
        load_model(tmp_path)
    assert load_model(tmp_path / "b.gguf")[0].config.hidden_size == 64
    # What save_pretrained wrote wins over a GGUF file beside it.
    load_model(folder)[0].save_pretrained(tmp_path)
    assert find(tmp_path).gguf is None


def test_files_that_cannot_be_used(folder: Path, original: Any, tmp_path: Path) -> None:
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    with pytest.raises(ModelUnavailable, match="cannot be read as a GGUF file"):
        load_model(tmp_path / "noise.gguf")
    cut = (folder / "tiny.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(cut[: len(cut) // 2])
    with pytest.raises(ModelUnavailable, match=r"cut\.gguf"):
        load_model(tmp_path / "cut.gguf")
    tiny_gguf.write(tmp_path / "fewer.gguf", original, without="layers.1.mlp.up_proj")
    with pytest.raises(ModelUnavailable, match=r"incomplete.*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path / "fewer.gguf")
    tiny_gguf.write(tmp_path / "scaled.gguf", original, scaled=True)
    with pytest.raises(ModelUnavailable, match=r"rope_freqs\.weight"):
        load_model(tmp_path / "scaled.gguf")


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_missing_packages_are_named(package: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else real(name, *rest))
    with pytest.raises(ModelUnavailable, match=f"pip install {package}"):
        load_model(folder)


# -- models that users load with transformers alone --------------------------------------------------------------------------------


def state(model: Any) -> dict[str, Any]:
    """Everything that hangs on the model and its config, hooks and weights included; to be compared by identity."""
    found = {f"model.{name}": value for name, value in vars(model).items()} | {f"config.{k}": v for k, v in vars(model.config).items()}
    found |= dict(model.named_parameters())
    return found | {f"{name}.hooks": len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()}


@pytest.mark.parametrize("name", available_patches())
def test_every_patch_serves_a_loaded_gguf_model(name: str, loaded: Any, tmp_path: Path) -> None:
    """What it computes is what the same weights compute in a model that nothing calls quantised; and it saves, and comes off."""
    dense = copy.deepcopy(loaded)
    _compat.forget_quantizer(dense)
    before, unpatched = state(loaded), logits(loaded)
    spec = SPECS.get(name, available_patches()[name].example)
    patch_model(loaded, spec, verbose=False)
    patch_model(dense, spec, verbose=False)
    assert torch.equal(logits(loaded), logits(dense))
    tokens = [model.generate(input_ids=IDS, max_new_tokens=8, do_sample=False) for model in (loaded, dense)]
    assert torch.equal(*tokens)

    loaded.save_pretrained(tmp_path / "patched")
    assert (getattr(loaded.config, "quantization_config", None) is not None) is (name in ("mlp_int8", "int8"))
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32).eval()
    patch_model(saved, spec, verbose=False)
    assert torch.equal(logits(saved), logits(loaded))

    unpatch_model(loaded)
    after = state(loaded)
    # These two transformers sets itself while it saves, on any model.
    for key in ("config.dtype", "config.architectures"):
        before.pop(key), after.pop(key)
    assert before.keys() == after.keys()
    assert not [key for key in before if before[key] is not after[key] and not isinstance(before[key], int | dict)]
    assert torch.equal(logits(loaded), unpatched)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_gets_its_own_marks_back(how: str, loaded: Any) -> None:
    marks = {mark for mark in MARKS if mark in vars(loaded)}
    patch_model(loaded, "streaming(window=8) + mlp_int8", verbose=False)
    twin = copy.deepcopy(loaded) if how == "deepcopy" else pickle.loads(pickle.dumps(loaded))
    unpatch_model(twin)
    assert {mark for mark in MARKS if mark in vars(twin)} == marks
    if marks:  # 5.24 and later
        assert type(twin.hf_quantizer).__name__ == "GgufHfQuantizer" and type(loaded.hf_quantizer).__name__ == "TorchAoHfQuantizer"
    unpatch_model(loaded)
    assert {mark for mark in MARKS if mark in vars(loaded)} == marks
    assert torch.equal(logits(twin), logits(loaded))


def test_lossless(loaded: Any) -> None:
    plain = loaded.generate(input_ids=IDS, max_new_tokens=12, do_sample=False)
    patch_model(loaded, SPECS["streaming"], lossless=True, verbose=False)
    assert torch.equal(loaded.generate(input_ids=IDS, max_new_tokens=12, do_sample=False), plain)


@pytest.mark.parametrize("spec", [SPECS["streaming"], SPECS["mlp_int8"]])
def test_export(spec: str, folder: Path, loaded: Any, tmp_path: Path) -> None:
    before, tokenizer = state(loaded), AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf")
    export(loaded, tokenizer, spec, tmp_path / "out")
    after = state(loaded)
    assert before.keys() == after.keys() and after.get("model.hf_quantizer") is before.get("model.hf_quantizer")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    patch_model(loaded, spec, verbose=False)
    assert torch.equal(logits(exported), logits(loaded))


# -- models whose weights stay packed, which transformers does on a GPU --------------------------------------------------------------


@pytest.fixture
def packed(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The loaded model with its feed-forward weights in blocks of 8 bits, and a plain stand-in for the kernel that multiplies them."""
    if not hasattr(loaded, "hf_quantizer"):
        pytest.skip("this transformers always unpacks GGUF weights")

    from transformers.integrations.gguf import kernels, utils
    from transformers.integrations.gguf.dequant import dequantize

    class Kernel:
        @staticmethod
        def mul_mat_vec(weight: torch.Tensor, x: torch.Tensor, kind: int, rows: int) -> torch.Tensor:
            return x @ dequantize(weight, kind, torch.float32).reshape(rows, -1).T

    monkeypatch.setattr(kernels, "_gguf_kernel", Kernel)
    kind = tiny_gguf.gguf.GGMLQuantizationType.Q8_0
    for name, module in list(loaded.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".mlp." in name:
            layer = utils.GgufLinear(module.in_features, module.out_features, int(kind))
            layer.weight.data = torch.from_numpy(tiny_gguf.gguf.quantize(module.weight.detach().numpy(), kind))
            loaded.set_submodule(name, layer)
    return loaded


def test_packed_weights_are_refused_by_name(packed: Any, tmp_path: Path) -> None:
    before = state(packed)
    for refused in (lambda: patch_model(packed, "mlp_int8", verbose=False), lambda: export(packed, None, "streaming", tmp_path / "out")):
        with pytest.raises((ExportError, PatchError), match=r"GgufConfig\(dequantize=True\)"):
            refused()
    assert all(before[key] is value for key, value in state(packed).items() if not isinstance(value, int | dict))


def test_packed_weights_under_the_other_patches(packed: Any) -> None:
    unpatched = logits(packed)
    patch_model(packed, "streaming(window=64)", verbose=False)
    assert (logits(packed) - unpatched).abs().max() <= TOLERANCES[torch.float32].logits
    assert packed.hf_quantizer is not None
    unpatch_model(packed)
    assert torch.equal(logits(packed), unpatched)


def test_first_line_is_short() -> None:
    assert loading.first_line(ValueError("one\ntwo")) == "ValueError: one" and loading.first_line(KeyError()) == "KeyError"
