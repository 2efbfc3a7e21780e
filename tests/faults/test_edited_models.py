"""Models that their user edits, compiles, shares between threads, or loads under other weights."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoConfig, Gemma3ForConditionalGeneration

from patchkit import available_patches, patch_model, report, unpatch_model
from patchkit import patch as patch_module
from patchkit.attention import swap_mask_builder
from patchkit.attention_function import attention_patch
from patchkit.errors import PatchError, StreamError
from patchkit.speculation.heads import MedusaHeads
from patchkit.testing import tiny_model
from patchkit.trained_for import TrainedFor

IDS = torch.arange(12)[None] % 5 * 7 + 5
EVERY = ["speculative(k=4)", "streaming(sinks=2, window=60)", "linear(window=60)", "compile(backend=eager)", "mlp_int8(mode=weight_only)"]


def generate(model: Any, ids: torch.Tensor = IDS, new: int = 20) -> torch.Tensor:
    return model.generate(input_ids=ids, max_new_tokens=new, do_sample=False)


def _steer(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return output + torch.linspace(-2, 2, output.shape[-1])


@pytest.mark.parametrize("scope", ["model", "layers"])
def test_hooks_that_come_and_go_reach_compiled_steps(scope):
    plain, model = tiny_model("llama"), patch_model(tiny_model("llama"), f"compile(backend=eager, scope={scope})", verbose=False)
    without = generate(plain)
    assert torch.equal(generate(model), without)
    hooks = [each.model.layers[0].mlp.down_proj.register_forward_hook(_steer) for each in (plain, model)]
    steered = generate(plain)
    assert not torch.equal(steered, without) and torch.equal(generate(model), steered)
    for hook in hooks:
        hook.remove()
    assert torch.equal(generate(model), without)


def test_a_layer_taken_out_after_the_patch():
    plain, model = tiny_model("llama"), patch_model(tiny_model("llama"), "compile(backend=eager)", verbose=False)
    generate(model)
    for each in (plain, model):
        del each.model.layers[-1]
    assert torch.equal(generate(model), generate(plain))


@pytest.mark.parametrize("spec", ["mlp_int8(mode=weight_only)", "streaming(sinks=2, window=60)", "linear(window=60)"])
def test_a_users_own_compilation_makes_one_graph(spec):
    torch._dynamo.reset()
    model = patch_model(tiny_model("llama"), spec, verbose=False)
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        wanted = model(IDS, use_cache=False).logits
        found = compiled(IDS, use_cache=False).logits
        first = len(graphs)
        for _ in range(11):
            compiled(IDS, use_cache=False)
    assert torch.allclose(found, wanted, atol=1e-5) and len(graphs) == first


@pytest.fixture(scope="module")
def gemma() -> Iterator[Any]:
    config = AutoConfig.for_model(
        "gemma3",
        text_config=dict(vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        vision_config=dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14),
        image_token_id=127,
    )  # fmt: skip
    torch.manual_seed(0)
    yield Gemma3ForConditionalGeneration(config).eval()


@pytest.mark.parametrize("spec", ["streaming(window=256)", "linear(window=256)"])
@torch.no_grad()
def test_the_span_of_an_image_is_not_read_one_way_in_silence(gemma, spec):
    ids, spans = torch.arange(40)[None] + 5, torch.zeros(1, 40, dtype=torch.int64)
    text, spans[:, 10:18] = gemma(ids, token_type_ids=spans.clone()).logits, 1
    image = gemma(ids, token_type_ids=spans).logits
    assert (image - text).abs().max() > 1e-3  # the span matters
    model = patch_model(copy.deepcopy(gemma), spec, verbose=False)
    assert (model(ids, token_type_ids=torch.zeros_like(spans)).logits - text).abs().max() < 1e-4
    with pytest.raises(StreamError, match="token_type_ids"):
        model(ids, token_type_ids=spans)
    assert (model(ids).logits - text).abs().max() < 1e-4


@pytest.mark.parametrize("change", ["mlp", "attention", "head", "nothing"])
def test_heads_of_another_model_are_refused(change, tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama")
    heads = MedusaHeads.start(model)
    heads.trained_for = TrainedFor.of(model)
    with torch.no_grad():
        if change == "mlp":
            for layer in other.model.layers:
                for weight in layer.mlp.parameters():
                    weight.mul_(1.05)
        elif change == "attention":
            for layer in other.model.layers:
                layer.self_attn.v_proj.weight.add_(0.01)
        elif change == "head":
            other.get_output_embeddings().weight.mul_(1.05)
    if change == "nothing":
        for dtype in (torch.float32, torch.bfloat16):
            heads.check_fits(other.to(dtype))
    else:
        with pytest.raises(PatchError, match="another"):
            heads.check_fits(other)


class _Threads:
    """Runs functions at once; the results, or the errors, in their order."""

    def __init__(self, *functions: Any) -> None:
        self.found: list[Any] = [None] * len(functions)
        self.barrier = threading.Barrier(len(functions))
        threads = [threading.Thread(target=self._run, args=each) for each in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _run(self, index: int, function: Any) -> None:
        self.barrier.wait()
        try:
            self.found[index] = function()
        except Exception as error:
            self.found[index] = error


TEXTS = 20  # by each of two threads, for each patch: 200 in all


def _many(model: Any, wanted: list[torch.Tensor], prompts: list[torch.Tensor]) -> tuple[int, int, set[str]]:
    """Right texts, wrong ones, and the messages of calls that were refused."""
    right = wrong = 0
    refused = set()
    for _ in range(TEXTS // len(prompts)):
        for ids, text in zip(prompts, wanted, strict=True):
            try:
                same = torch.equal(generate(model, ids, 16), text)
            except StreamError as error:
                refused.add(str(error))
                continue
            right, wrong = right + same, wrong + (not same)
    return right, wrong, refused


@pytest.mark.parametrize("spec", EVERY)
@pytest.mark.parametrize("shared", ["model", "config", "config, one of them unpatched"])
def test_two_threads(spec, shared):
    """On one patched model a call is right, or refused by name; two models never disturb each other."""
    prompts = [(torch.arange(8 + i)[None] * (3 + i)) % 90 + 5 for i in range(4)]
    first = tiny_model("llama")
    second = type(first)(first.config).eval()
    second.load_state_dict(tiny_model("llama", seed=4).state_dict())
    models = [first, first] if shared == "model" else [first, second]
    wanted = [[generate(model, ids, 16) for ids in prompts] for model in models]
    patch_model(first, spec, verbose=False)
    if shared == "config":
        patch_model(second, spec, verbose=False)
    wanted = [[generate(model, ids, 16) for ids in prompts] for model in models] if "int8" in spec else wanted
    found = _Threads(*[lambda model=m, w=w: _many(model, w, prompts) for m, w in zip(models, wanted, strict=True)]).found
    assert not [each for each in found if isinstance(each, Exception)], found
    assert [wrong for _, wrong, _ in found] == [0, 0]
    if shared == "model":
        assert all("another thread" in text and "lock" in text for _, _, refused in found for text in refused)
        assert sum(right for right, _, _ in found) > 0
    else:
        assert [right for right, _, _ in found] == [TEXTS, TEXTS]
    assert torch.equal(generate(first, prompts[0], 16), wanted[0][0])  # and nothing is left in disorder


def test_a_model_that_was_refused_in_one_thread_runs_in_the_other():
    model = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)
    with torch.no_grad():
        wanted = model(IDS).logits
        inside, go_on = threading.Event(), threading.Event()

        def wait(module: Any, args: Any) -> None:
            inside.set()
            go_on.wait(30)

        hook = model.model.layers[0].register_forward_pre_hook(wait)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(torch.no_grad()(model)(IDS).logits))
        thread.start()
        inside.wait(30)
        hook.remove()
        with pytest.raises(StreamError, match="another thread"):
            model(IDS)
        go_on.set()
        thread.join()
        assert torch.equal(found[0], wanted) and torch.equal(model(IDS).logits, wanted)


def test_an_interrupted_forward_holds_up_no_other_thread():
    model = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        hook = model.model.layers[0].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(IDS)
        hook.remove()

    def fine() -> int:
        return model(IDS).logits.shape[1]

    _Threads(interrupted)
    assert _Threads(fine).found == [12]  # the thread that was interrupted has ended
    interrupted()
    assert fine() == 12 and _Threads(fine).found == [12]  # this one has run another forward since


@pytest.mark.parametrize("family", ["bloom", "gemma3_text", "llama"])
def test_an_interrupted_forward_leaves_other_models_their_masks(family):
    """Eager attention, or a window of its own, needs the mask that a streaming model does without."""
    plain, other = tiny_model(family), tiny_model(family)
    ids = torch.arange(30)[None] * 7 % 100 + 4
    wanted = generate(plain, ids)
    streaming = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    hook = streaming.model.layers[0].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            streaming(IDS)
    hook.remove()
    patch_model(other, "speculative(k=4)", verbose=False)  # probes it, and runs it under an alias
    assert torch.equal(generate(other, ids), wanted)
    fresh = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)
    assert torch.equal(generate(streaming), generate(fresh))
    assert swap_mask_builder(None) is None


def test_a_weight_of_more_elements_than_float32_counts_is_sampled():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(
        torch.zeros(2**13 + 1, 2**12).half(), requires_grad=False
    )  # 2^25 and more
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[-1, -1] = 7
    found = [values for name, values in TrainedFor.of(model).samples.items() if name.endswith("layers.0.mlp.up_proj.weight")]
    assert found == [[0.0] * 15 + [7.0]]


def last_eight(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **kwargs: Any) -> Any:
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling + attention_mask
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("with_it", ["speculative(k=4)", "streaming(sinks=2, window=60, layers=[0])"])
def test_an_attention_patch_keeps_its_masks_beside_others(with_it, monkeypatch):
    monkeypatch.setattr(patch_module, "_registry", dict(available_patches()))  # for this test only
    attention_patch("t_last_eight", mask=lambda batch, head, query, key: key > query - 8)(last_eight)
    ids = torch.arange(30)[None] % 7 * 9 + 5
    alone, both = (patch_model(tiny_model("llama"), spec, verbose=False) for spec in ("t_last_eight", f"t_last_eight + {with_it}"))
    if "layers" in with_it:  # the layers that streaming leaves alone must have the rule still
        plain = patch_model(tiny_model("llama"), with_it, verbose=False)
        assert not torch.equal(both(ids).logits, plain(ids).logits)
    else:
        assert torch.equal(generate(both, ids), generate(alone, ids))
        assert report(both).patches[-1].hits["rounds"] > 0


@torch.inference_mode()
def test_a_model_moved_in_inference_mode_streams():
    model = patch_model(tiny_model("llama").double().float(), "streaming(sinks=2, window=12)", verbose=False)
    assert model.to(torch.float64)(IDS).logits.isfinite().all()


def test_an_interrupted_model_trains_and_is_unpatched_with_masks():
    ids = torch.arange(20)[None] * 7 % 100 + 4
    plain, model = tiny_model("bloom"), patch_model(tiny_model("bloom"), "streaming(sinks=2, window=60)", verbose=False)

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    def interrupted() -> None:
        hook = model.transformer.h[1].register_forward_pre_hook(interrupt)
        with torch.no_grad(), pytest.raises(KeyboardInterrupt):
            model(ids[:, :1])
        hook.remove()

    interrupted()
    assert torch.equal(model.train()(ids).logits, plain.train()(ids).logits)
    model.eval(), plain.eval()
    interrupted()
    unpatch_model(model)
    assert torch.equal(model(ids).logits, plain(ids).logits) and swap_mask_builder(None) is None


def test_the_thread_that_was_interrupted_need_not_run_again():
    model = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)

    def interrupt(module: Any, args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(IDS)
    hook.remove()
    assert _Threads(lambda: model(IDS).logits.shape[1]).found == [12]


def test_the_config_of_a_copy_of_a_patched_model():
    model = patch_model(tiny_model("llama"), "streaming(sinks=2, window=12)", verbose=False)
    copied = copy.deepcopy(model)
    other = type(copied)(copied.config).eval()
    patch_model(other, "streaming(sinks=2, window=12)", verbose=False)
    unpatch_model(copied)
    generate(other)
    unpatch_model(other)
    assert other.config._attn_implementation == "sdpa"
    unpatch_model(model)
