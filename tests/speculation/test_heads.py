from __future__ import annotations

import copy
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from patchkit.cli import app
from patchkit.errors import PatchError, UnsupportedModel
from patchkit.models import load_model
from patchkit.speculation.heads import EagleHead, Heads, MedusaHeads, TrainedFor, load_heads
from patchkit.testing import tiny_model
from patchkit.training.heads import accepted_by_position, hidden_states, loss_of, three_layers, train_heads


def _model(**changes: Any) -> LlamaForCausalLM:
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**(sizes | dict(initializer_range=0.3) | changes))).eval()


def _texts(n: int = 64) -> torch.Tensor:
    """Texts that count upwards from anywhere."""
    return (torch.randint(61, (n, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(24)) % 61 + 3


@pytest.mark.parametrize("init", ["tie", "copy"])
def test_untrained_medusa_heads_predict_like_the_lm_head(init: Any) -> None:
    model = tiny_model("llama")
    hidden = torch.randn(2, 5, model.config.hidden_size)
    logits = MedusaHeads.start(model, 3, init).logits(hidden, model.lm_head)
    assert logits.shape == (2, 5, 3, model.config.vocab_size)
    torch.testing.assert_close(logits, model.lm_head(hidden)[:, :, None].expand_as(logits))


def test_random_medusa_heads_differ_and_are_seeded() -> None:
    model = tiny_model("llama")
    hidden = torch.randn(1, model.config.hidden_size)
    one, two, other = (MedusaHeads.start(model, 2, "random", seed)(hidden) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.allclose(one, other) and not torch.allclose(one[:, 0], one[:, 1])


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_come_back_from_a_file(kind: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    model = _model()
    heads = train_heads(model, _texts(), kind, steps=2, depth=2, batch=2, length=16, progress=False)
    heads.save(tmp_path / "heads.safetensors", dtype)
    loaded = load_heads(tmp_path / "heads.safetensors")
    assert type(loaded) is type(heads) and loaded.trained_for == TrainedFor.of(model) and loaded.options == heads.options
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.to(dtype).float())
    loaded.check_fits(model)
    loaded.check_fits(copy.deepcopy(model).to(torch.bfloat16))  # the same model in another precision
    held = kind.removesuffix("3")
    with pytest.raises(PatchError, match=f"holds {held} heads"):
        load_heads(tmp_path / "heads.safetensors", "eagle" if kind == "medusa" else "medusa")


@pytest.mark.parametrize(
    "other, says",
    [
        (dict(hidden_size=64), "hidden size of 32"),
        (dict(vocab_size=80), "vocabulary of 64"),
        (dict(initializer_range=0.2), "another LM head"),
    ],
)
@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
def test_heads_are_refused_for_another_model(kind: Any, other: dict[str, Any], says: str) -> None:
    heads = train_heads(_model(), _texts(), kind, steps=1, depth=1, batch=2, length=16, progress=False)
    with pytest.raises(UnsupportedModel, match=says + ".*train-heads"):
        heads.check_fits(_model(**other))


def test_files_that_are_no_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="no file of draft heads"):
        load_heads(tmp_path / "nowhere.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"{}")
    with pytest.raises(PatchError, match="cannot be read"):
        load_heads(tmp_path / "broken.safetensors")
    _model().save_pretrained(tmp_path)
    with pytest.raises(PatchError, match="holds no draft heads"):
        load_heads(tmp_path / "model.safetensors")


def test_untrained_heads_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(PatchError, match="not trained"):
        EagleHead(32, 32).save(tmp_path / "heads.safetensors")


@pytest.mark.parametrize("kind", ["medusa", "eagle", "eagle3"])
def test_training_teaches(kind: Any) -> None:
    """A model whose greedy choice is a function of its last token is soon foreseen, and comes out as it went in."""
    model, texts = _model(), _texts()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = three_layers(model) if kind == "eagle3" else ()
    hidden, positions = hidden_states(model, texts[:16], layers), torch.arange(20)

    def measured(steps: int) -> tuple[float, torch.Tensor]:
        heads = train_heads(model, texts, kind, steps, depth=2, batch=16, length=24, progress=False)
        with torch.no_grad():
            loss, agrees = loss_of(heads, model, texts[:16], hidden, 2, positions)
        return loss.item(), accepted_by_position(agrees)

    (first, guessed), (last, accepted) = measured(1), measured(60)
    assert last < 0.9 * first
    assert accepted[0] > 1.5 * guessed[0] and accepted[1] <= accepted[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_training_is_seeded_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    model, options = _model(), dict(depth=2, batch=2, length=16, progress=False)
    whole = train_heads(model, _texts(), "eagle", 53, **options)  # type: ignore[arg-type]
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 52:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = model.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match=r"after 52 steps.*run\.pt"):
        train_heads(model, _texts(), "eagle", 53, checkpoint=tmp_path / "run.pt", **options)  # type: ignore[arg-type]
    hook.remove()
    resumed = train_heads(model, _texts(), "eagle", 53, checkpoint=tmp_path / "run.pt", **options)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    with pytest.raises(PatchError, match="another run"):
        train_heads(model, _texts(), "medusa", 53, checkpoint=tmp_path / "run.pt", **options)  # type: ignore[arg-type]


def test_training_for_a_time_finds_its_number_of_steps(tmp_path: Path) -> None:
    model, options = _model(), dict(depth=2, batch=2, length=16, progress=False, minutes=1 / 30)
    heads = train_heads(model, _texts(), "eagle", checkpoint=tmp_path / "run.pt", **options)  # type: ignore[arg-type]
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    assert saved["done"] == saved["steps"] >= 8 and heads.trained_for is not None
    again = train_heads(model, _texts(), "eagle", checkpoint=tmp_path / "run.pt", **options)  # type: ignore[arg-type]
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in heads.state_dict().items())
    with pytest.raises(PatchError, match="minutes"):
        train_heads(model, _texts(), "eagle", **options | {"minutes": 0})  # type: ignore[arg-type]


def test_training_on_the_models_own_text() -> None:
    heads = train_heads(_model(), _texts().flatten(), "medusa", 2, depth=2, batch=2, length=16, on_policy=1.0, progress=False)
    assert heads.trained_for is not None


def test_the_command_trains_heads(model_dir: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "text.py", tmp_path / "heads.safetensors"
    text.write_text("import os\n\n\ndef join(*parts):\n    return os.sep.join(parts)\n" * 40)
    call = ["train-heads", str(model_dir), "--text", str(text), "--out", str(out), "--kind", "medusa", "--steps", "2", "--length", "16"]
    result = CliRunner().invoke(app, [*call, "--depth", "2", "--batch", "2", "--json"])
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["bytes"] == out.stat().st_size and len(report["accepted_by_position"]) == 2
    load_heads(out, "medusa").check_fits(load_model(model_dir)[0])
    refused = CliRunner().invoke(app, [*call, "--out", str(tmp_path / "none" / "heads")])
    assert refused.exit_code == 1 and "does not exist" in refused.stderr


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(kind="hydra"), "no 'hydra' heads"),
        (dict(steps=0), "at least 1"),
        (dict(on_policy=1.5), "between 0 and 1"),
        (dict(length=4096), "fewer than one piece"),
    ],
)
def test_bad_training_options_are_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(PatchError, match=says):
        train_heads(_model(), _texts(), **arguments)


@pytest.mark.parametrize("kind, least", [("medusa", 0.1), ("eagle", 0.6)])
def test_bundled_heads_belong_to_the_bundled_model(kind: str, least: float) -> None:
    model, tokenizer = load_model("bundled")
    heads: Heads = load_heads("bundled", kind)
    heads.check_fits(model)
    text = "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n\n\ndef write(path, text):\n"
    prompt = tokenizer(text, return_tensors="pt")["input_ids"]
    written = model.generate(input_ids=prompt, max_new_tokens=64, do_sample=False)
    positions = torch.arange(prompt.shape[1] - 1, written.shape[1] - 3)
    with torch.no_grad():
        _, agrees = loss_of(heads, model, written, hidden_states(model, written), 2, positions)
    assert accepted_by_position(agrees)[0] > least
