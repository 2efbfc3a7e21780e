"""A patch on a model in training mode: in force in `generate`, and not in forwards with gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import cache_of, cached, fast_first

from patchkit import patch_model, report
from patchkit.errors import PatchError, StreamError
from patchkit.speculation import Scheduler
from patchkit.testing import TOLERANCES, logit_error, tiny_model
from patchkit.training_mode import drops_values

IDS = torch.arange(24).view(2, 12) % 7 * 11 + 5
LOSSY = [
    "streaming(sinks=2, window=6)", "streaming(sinks=2, window=6, refresh=reencode(every=4))", "linear(window=6)",
    "memory(sinks=2, window=4, slots=4, block=4)", "mlp_int8(mode=weight_only, view=True)", "int4(view=True)",
]  # fmt: skip
EXACT = ["speculative(k=4)", "compile(backend=eager)", "gemv", "prefix_cache(block=4)"]


def generate(model: Any, **options: Any) -> torch.Tensor:
    return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=16, do_sample=False, eos_token_id=None, **options)


def trained(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits and gradients of a training forward."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("spec", fast_first(LOSSY + EXACT, (LOSSY[0], LOSSY[1], LOSSY[4], EXACT[0])))
def test_generate_runs_the_patch_and_training_does_not(spec: str) -> None:
    plain = tiny_model("llama").train()
    wanted = generate(patch_model(tiny_model("llama"), spec, verbose=False))
    model = patch_model(tiny_model("llama"), spec, verbose=False).train()
    assert torch.equal(generate(model), wanted)
    hits, warnings = dict(report(model).patches[0].hits), " ".join(report(model).patches[0].warnings)
    assert ("off-policy" in warnings) == (spec in LOSSY) and ("lossless=True" in warnings) == (spec in LOSSY)
    found, right = trained(model), trained(plain)
    assert torch.equal(found[0], right[0])
    assert len(found[1]) == len(right[1]) > 0 and all(map(torch.equal, found[1], right[1]))
    with torch.no_grad():  # as a trainer scores texts
        assert torch.equal(model(input_ids=IDS, use_cache=False).logits, plain(input_ids=IDS, use_cache=False).logits)
    assert any(hits.values())
    assert torch.equal(generate(model), wanted) and torch.equal(generate(model.eval()), wanted)


@pytest.mark.parametrize("spec", fast_first(LOSSY, LOSSY[:1]))
def test_lossy_patches_differ_and_lossless_ones_do_not(spec: str) -> None:
    """Else the test above would show nothing."""
    plain = generate(tiny_model("llama").train())
    assert not torch.equal(generate(patch_model(tiny_model("llama"), spec, verbose=False).train()), plain) or "int" in spec
    model = patch_model(tiny_model("llama").train(), spec, lossless=True, verbose=False)
    assert torch.equal(generate(model), plain)
    assert not any("off-policy" in warning for patch in report(model).patches for warning in patch.warnings)


@pytest.mark.matrix
def test_compiled_steps_run_in_training_mode() -> None:
    model = patch_model(tiny_model("llama").train(), "compile(backend=eager)", verbose=False)
    generate(model)
    hits = report(model).patches[0].hits
    assert hits["compiled steps"] == 15
    graphs = hits["graphs compiled"]
    trained(model)
    generate(model)
    assert report(model).patches[0].hits["graphs compiled"] == graphs


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_gradient_checkpointing() -> None:
    """Without gradients transformers keeps the cache."""
    for spec in ("streaming(sinks=2, window=6)", "speculative(k=4)"):
        model, plain = patch_model(tiny_model("llama"), spec, verbose=False), tiny_model("llama").train()
        wanted = generate(model)
        for each in (model.train(), plain):
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        assert torch.equal(generate(model), wanted)
        assert all(map(torch.equal, trained(model)[1], trained(plain)[1]))


def dropping() -> Any:
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def test_speculative_refuses_dropout() -> None:
    plain, model = dropping(), dropping()
    patch_model(model, "speculative(k=4)", verbose=False)
    assert not drops_values(model) and torch.equal(generate(model), generate(plain))
    assert report(model).patches[0].hits.get("stock calls", 0) == 0
    for each in (plain, model):
        each.train()
    texts = []
    for each in (plain, model):
        torch.manual_seed(0)
        texts.append(generate(each))
    assert drops_values(model) and torch.equal(*texts)
    assert report(model).patches[0].hits["stock calls"] == 1
    assert any("verification of a draft is another draw" in warning for warning in report(model).patches[0].warnings)
    with pytest.raises(PatchError, match="another draw"):
        Scheduler(model).submit(IDS[0], max_new_tokens=4)


def test_a_lossy_acceptance_is_off_policy() -> None:
    model = patch_model(tiny_model("llama").train(), "speculative(k=4, acceptance=topk_agree(2))", verbose=False)
    generate(model)
    assert any("off-policy: under acceptance=topk_agree" in warning for warning in report(model).patches[0].warnings)


def test_streaming_serves_dropout() -> None:
    model = patch_model(dropping(), "streaming(sinks=2, window=6)", verbose=False).train()
    torch.manual_seed(0)
    first = generate(model)
    torch.manual_seed(0)
    assert torch.equal(generate(model), first)
    assert report(model).patches[0].hits["tokens evicted"] > 0


def test_a_cache_is_for_forwards_without_gradients() -> None:
    model, plain = patch_model(tiny_model("llama"), "streaming(sinks=2, window=6)", verbose=False), tiny_model("llama")
    with torch.no_grad():
        cache = cache_of(model(input_ids=IDS))
        wanted = model(input_ids=IDS[:, :3], **cached(cache)).logits
        cache = cache_of(model(input_ids=IDS))
        found = model.train()(input_ids=IDS[:, :3], **cached(cache)).logits
        assert torch.equal(found, wanted)
        stock = plain(input_ids=torch.cat([IDS, IDS[:, :3]], 1)).logits[:, -3:]
        assert logit_error(found, stock) > TOLERANCES[torch.float32].logits
    with pytest.raises(StreamError, match="with gradients in training mode"):
        model(input_ids=IDS[:, :3], **cached(cache))
