from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline
from typer.testing import CliRunner

from patchkit import patch_model, report
from patchkit.cli import app
from patchkit.errors import PatchConflict, SpecError, UnsupportedModel
from patchkit.export import ExportError, export
from patchkit.models import load_model
from patchkit.patches.speculative import Speculative
from patchkit.patches.streaming import StreamingLLM
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.testing import TOLERANCES, logit_error, tiny_model

SPEC = "streaming(sinks=2, window=30)"


@pytest.fixture(autouse=True)
def modules_of_checkpoints(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a checkpoint's modules to a folder of its own, which is not to be the user's."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


@pytest.fixture
def exported(model_dir: Path, tmp_path: Path) -> Path:
    return export(*load_model(model_dir), SPEC, tmp_path / "exported")


def tokens() -> torch.Tensor:
    return torch.randint(4, 4000, (1, 90), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=tokens()).logits


def test_it_loads_patched_and_without_trust_unpatched(model_dir: Path, exported: Path) -> None:
    plain, _ = load_model(model_dir)
    stock = AutoModelForCausalLM.from_pretrained(exported)
    assert torch.equal(logits(stock), logits(plain))
    found = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    assert torch.equal(logits(found), logits(patch_model(plain, SPEC)))
    assert (logits(found) - logits(stock)).abs().max() > TOLERANCES[torch.float32].differs
    assert report(found).patches[0].spec == SPEC and report(found).patches[0].hits["tokens evicted"] > 0
    assert type(found) is type(stock)


def test_it_loads_with_what_lm_eval_and_users_pass(exported: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(
        exported,
        trust_remote_code=True,
        output_loading_info=True,
        dtype=torch.bfloat16,
        revision="main",
        device_map={"": "cpu"},
        max_memory=None,
        quantization_config=None,
        gguf_file=None,
        subfolder="",
    )
    assert model.dtype == torch.bfloat16 and report(model).patches and not info["missing_keys"] and not info["unexpected_keys"]


def test_a_pipeline_runs_it_patched(exported: Path) -> None:
    pipe = pipeline("text-generation", model=str(exported), trust_remote_code=True, device="cpu")
    pipe("import os\n" * 30, max_new_tokens=4, do_sample=False)
    assert report(pipe.model).patches[0].hits["tokens evicted"] > 0


def test_saved_again_it_is_a_stock_checkpoint(exported: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).save_pretrained(tmp_path / "again")
    assert not {"auto_map", "patchkit"} & set(json.loads((tmp_path / "again" / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again), logits(AutoModelForCausalLM.from_pretrained(exported)))


def test_int8_is_exported_as_the_weights_it_is_made_from(model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir)
    path = export(model, tokenizer, "mlp_int8(keep_original=False, mode=weight_only) + " + SPEC, tmp_path / "int8")
    assert "_patchkit" not in vars(model)
    found = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    expected = logits(patch_model(model, "mlp_int8(mode=weight_only) + " + SPEC))
    assert logit_error(logits(found), expected) <= TOLERANCES[torch.float32].logits


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(model_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(model_dir)
    draft = Speculative(draft=DraftModel(load_model(model_dir)[0]))
    with pytest.raises(SpecError, match="object in memory"):
        export(model, tokenizer, [draft], tmp_path / "new")
    with pytest.raises(UnsupportedModel, match="window"):
        export(model, tokenizer, [StreamingLLM(window=5000)], tmp_path / "new")
    with pytest.raises(UnsupportedModel):
        export(tiny_model("gpt2"), None, SPEC, tmp_path / "new")
    with pytest.raises(UnsupportedModel):
        export(tiny_model("gpt2"), None, SPEC + " + mlp_int8(keep_original=False)", tmp_path / "new")
    with pytest.raises(ExportError, match="does not exist"):
        export(model, tokenizer, SPEC, tmp_path / "no" / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty"):
        export(model, tokenizer, SPEC, tmp_path / "full")
    patch_model(model, SPEC, verbose=False)
    with pytest.raises(PatchConflict, match="unpatch_model"):
        export(model, tokenizer, SPEC, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"] and [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_a_failure_while_writing_leaves_nothing(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(model_dir)

    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(ExportError, match="No space left"):
        export(model, tokenizer, SPEC, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = CliRunner().invoke(app, ["export", str(model_dir), "--patches", SPEC, str(tmp_path / "empty")])
    assert done.exit_code == 0 and "without trust_remote_code it loads unpatched" in " ".join(done.stderr.split())
    assert report(AutoModelForCausalLM.from_pretrained(tmp_path / "empty", trust_remote_code=True)).patches
    for arguments, word in (
        ([str(model_dir), "--patches", SPEC, str(tmp_path / "empty")], "not empty"),
        ([str(model_dir), "--patches", " ", str(tmp_path / "new")], "no patch"),
        ([str(model_dir), "--patches", "streamin", str(tmp_path / "new")], "did you mean"),
        ([str(tmp_path / "nowhere"), "--patches", SPEC, str(tmp_path / "new")], "no such model"),
    ):
        failed = CliRunner().invoke(app, ["export", *arguments])
        assert failed.exit_code == 1 and word in " ".join(failed.stderr.split())
    assert not (tmp_path / "new").exists()
