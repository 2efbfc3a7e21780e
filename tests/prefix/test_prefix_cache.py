"""What makes a hit a miss, what is left alone, and what is gone when it should be."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CACHE, matrix
from transformers import DynamicCache

from patchkit import PrefixCache, patch_model, report, unpatch_model
from patchkit._compat import PREFILL
from patchkit.errors import PatchConflict, UnsupportedModel
from patchkit.prefix import clear_prefix_cache, pin, prefix_statistics, salted
from patchkit.prefix.radix import RadixTree
from patchkit.testing import assert_restored, snapshot, tiny_model

STREAMING = "streaming(sinks=2, window=6)"


def prompt(tokens: int = 37, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: torch.Tensor, new: int = 4, **options: Any) -> torch.Tensor:
    given = dict(attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(ids, **given)


def with_cache(spec: str, **options: Any) -> Any:
    """A tiny Llama with a patch, or "none", and a prefix cache of small blocks."""
    cache = PrefixCache(**{"block": 8, **options})
    return patch_model(tiny_model("llama"), *([] if spec == "none" else [spec]), cache, verbose=False)


def patched(spec: str = "prefix_cache(block=8)", family: str = "llama") -> Any:
    return patch_model(tiny_model(family), spec, verbose=False)


def step_of(optimizer: Callable[..., Any]) -> Callable[[Any], None]:
    def step(model: Any) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer(model.parameters()).step()
        model.zero_grad()

    return step


def scale(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "fused AdamW": step_of(lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True)),
    "AdamW": step_of(lambda parameters: torch.optim.AdamW(parameters, lr=0.05)),
    "edit through .data": scale,
    "cast": lambda model: model.to(torch.bfloat16),
    "attention implementation": lambda model: model.set_attn_implementation("eager"),
}


@pytest.mark.parametrize(
    ("change", "spec"),
    [
        *((change, "prefix_cache(block=8)") for change in CHANGES),
        *((change, "speculative(k=2) + prefix_cache(block=8)") for change in ("fused AdamW", "edit through .data", "cast")),
    ],
)
def test_another_model_is_a_miss(change: str, spec: str) -> None:
    model = patched(spec)
    generated(model, prompt())
    pin(model, prompt(20, 3))
    CHANGES[change](model)
    again = generated(model, prompt())
    found = prefix_statistics(model)
    assert found.lookups == 3 and found.hits == 0
    clear_prefix_cache(model)
    assert torch.equal(generated(model, prompt()), again)
    assert not any(node.pins for node in model._patchkit_prefix.store.tree.nodes())


def test_another_adapter_is_a_miss() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny_model("llama"), config, adapter_name="a")
    model.add_adapter("b", config)
    patch_model(model.eval(), "prefix_cache(block=8)", verbose=False)
    texts = {}
    for number, name in enumerate("abab"):
        model.set_adapter(name)
        text = generated(model, prompt())
        assert torch.equal(texts.setdefault(name, text), text)
        assert prefix_statistics(model).hits == max(0, number - 1)
    with model.disable_adapter():
        generated(model, prompt())
    assert prefix_statistics(model).hits == 2


def test_autocast_and_inference_mode_are_kept_apart() -> None:
    model = patched()
    generated(model, prompt())
    with torch.autocast("cpu", torch.bfloat16):
        generated(model, prompt())
    with torch.inference_mode():
        generated(model, prompt())
        generated(model, prompt())
    generated(model, prompt())
    assert prefix_statistics(model).hits == 2


@pytest.mark.parametrize("spec", [STREAMING, "linear(window=6)", "none", "speculative(k=2)"])
def test_inference_mode(spec: str) -> None:
    model, plain = with_cache(spec), tiny_model("llama")
    if spec not in ("none", "speculative(k=2)"):
        patch_model(plain, spec, verbose=False)
    with torch.inference_mode():
        first, second = generated(model, prompt()), generated(model, prompt())
        assert torch.equal(first, second) and torch.equal(first, generated(plain, prompt()))
    assert prefix_statistics(model).hits == 1


def test_salts_are_kept_apart() -> None:
    model = patched()
    generated(model, prompt())
    with salted(model, "somebody else"):
        generated(model, prompt())
        assert prefix_statistics(model).hits == 0
        generated(model, prompt())
    generated(model, prompt())
    assert prefix_statistics(model).hits == 2


def left_pad(ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return mask


IDLE: dict[str, tuple[str, Callable[[Any, torch.Tensor], dict[str, Any]]]] = {
    "padding": ("a batch with padding", lambda model, ids: dict(attention_mask=left_pad(ids))),
    "no cache": ("generation without a cache", lambda model, ids: dict(use_cache=False)),
    "static cache": ("a StaticCache", lambda model, ids: dict(cache_implementation="static")),
    "chunks": ("prefill_chunk_size=3, less than a block", lambda model, ids: dict(prefill_chunk_size=3)),
    "hidden states": ("output_hidden_states", lambda model, ids: dict(return_dict_in_generate=True, output_hidden_states=True)),
}


@pytest.mark.parametrize("case", IDLE)
def test_what_is_not_served_is_left_alone_and_said_once(case: str) -> None:
    words, options = IDLE[case]
    model, plain = patched(), tiny_model("llama")
    for number in range(1, 3):
        given = options(model, prompt())
        got, expected = generated(model, prompt(), **given), generated(plain, prompt(), **given)
        if not torch.is_tensor(got):
            got, expected = got.sequences, expected.sequences
        assert torch.equal(got, expected)
        (facts,) = report(model).patches
        assert facts.hits["left alone"] == number and facts.hits.get("lookups", 0) == 0
    assert [text for text in facts.warnings if words in text] == list(facts.warnings) and list(facts.warnings.values()) == [2]


def test_chunks_of_less_than_a_block_are_left_alone_under_drafts_too() -> None:
    """What they compute of a block has other bits than a miss without them."""
    model, ids = patched("speculative(k=2) + prefix_cache(block=8)"), prompt()
    for size, left_alone in ((3, 1), (8, 1), (None, 1)):
        assert torch.equal(generated(model, ids, prefill_chunk_size=size), generated(tiny_model("llama"), ids))
        assert prefix_statistics(model).left_alone == left_alone
    assert prefix_statistics(model).lookups == 2 and prefix_statistics(model).hits == 1


def test_embeddings_and_a_given_cache_are_left_alone() -> None:
    model, plain = patched(), tiny_model("llama")
    embedded = model.get_input_embeddings()(prompt()).detach()
    options = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(model.generate(inputs_embeds=embedded, **options), plain.generate(inputs_embeds=embedded, **options))
    given = DynamicCache(config=model.config)
    first = generated(model, prompt(20), **{CACHE: given})  # an empty one is filled, and goes on
    assert given.get_seq_length() == 23 and prefix_statistics(model).lookups == 1
    more = torch.cat([first, prompt(9, 4)], 1)
    assert torch.equal(generated(model, more, **{CACHE: given}), generated(plain, more))
    assert prefix_statistics(model).left_alone == 2 and prefix_statistics(model).lookups == 1


def test_training_mode_is_served_without_dropout_only() -> None:
    model, plain = patched().train(), tiny_model("llama").train()
    for _ in range(2):
        assert torch.equal(generated(model, prompt()), generated(plain, prompt()))
    assert prefix_statistics(model).hits == 1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    generated(model, prompt())
    assert prefix_statistics(model).left_alone == 1


def test_long_texts_of_switching_frequencies_are_left_alone() -> None:
    for family in ("llama_dynamic", "phi3_longrope"):
        model, plain = patched(family=family), tiny_model(family)
        for tokens in (40, 70, 40):
            assert torch.equal(generated(model, prompt(tokens)), generated(plain, prompt(tokens)))
        assert prefix_statistics(model).left_alone == 1 and prefix_statistics(model).hits == 1


def test_the_bound_holds_at_every_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    bound, seen, add, filled = 40_000, list[int](), RadixTree.add, RadixTree.fill

    def watched(self: RadixTree, *args: Any) -> Any:
        seen.append(self.bytes + args[-1])  # before it is in
        return add(self, *args)

    def watched_fill(self: RadixTree, node: Any, value: Any, size: int) -> None:
        filled(self, node, value, size)
        seen.append(self.bytes)

    monkeypatch.setattr(RadixTree, "add", watched)
    monkeypatch.setattr(RadixTree, "fill", watched_fill)
    for spec in ("none", STREAMING):
        model = with_cache(spec, max_bytes=bound)
        for seed in range(8):
            generated(model, prompt(60, seed), new=1)
        found = prefix_statistics(model)
        assert found.evictions > 0 and found.skipped == 0 and found.bytes <= bound
        assert report(model).patches[-1].hits["bytes"] == found.bytes
    assert bound // 2 < max(seen) <= bound
    model = with_cache(STREAMING, max_bytes=1000)  # less than one state
    texts = [generated(model, prompt(60)) for _ in range(2)]
    assert torch.equal(*texts) and prefix_statistics(model).skipped > 0 and prefix_statistics(model).hits == 0


@pytest.mark.parametrize("longest", [8_192, matrix(65_536)])
def test_a_stream_of_any_length_is_kept_in_the_same_bytes(longest: int) -> None:
    sizes = {}
    for tokens in (1_024, longest):
        model = patched(f"streaming(sinks=4, window=60) + prefix_cache(block={tokens // 8})")
        generated(model, prompt(tokens + 1), new=1)
        states = [node.size - len(node.block) for node in model._patchkit_prefix.store.tree.nodes() if node.value.state is not None]
        assert len(states) == 4 and len(set(states)) == 1  # behind blocks 1, 2, 4 and 8, which is the last
        sizes[tokens] = states[0]
    assert sizes[1_024] == sizes[longest]


def test_states_are_kept_where_prompts_branch_off() -> None:
    model = with_cache(STREAMING)
    head = prompt(8 * 7 + 3)
    for seed in range(3):
        generated(model, torch.cat([head, prompt(20, 5 + seed)], 1))
    # Behind block 4; then behind block 7, to which the second prompt has made the border known.
    assert prefix_statistics(model).reused_tokens == 8 * 4 + 8 * 7


def test_a_pinned_prompt_stays() -> None:
    model = patched("prefix_cache(block=8, max_bytes=40000)")
    assert pin(model, prompt(37)[0]) == 32 and pin(model, prompt(5)) == 0
    assert pin(model, prompt(37)) == 32 and pin(model, prompt(37)[:, :20]) == 16  # what is pinned already
    generated(model, prompt(30, 99))
    assert pin(model, prompt(30, 99)) == 24  # what is kept already
    for seed in range(1, 10):
        generated(model, prompt(60, seed), new=1)
    before = prefix_statistics(model)
    generated(model, prompt(37))
    assert before.evictions > 0 and prefix_statistics(model).reused_tokens - before.reused_tokens == 32
    clear_prefix_cache(model)
    assert prefix_statistics(model).bytes == 0


@pytest.mark.parametrize("spec", ["none", STREAMING, "speculative(k=2)"])
def test_copies_begin_empty_and_are_undone_alone(spec: str) -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    patch_model(model, *([] if spec == "none" else [spec]), PrefixCache(block=8), verbose=False)
    text = generated(model, prompt())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert prefix_statistics(again).bytes == 0 == prefix_statistics(again).entries < prefix_statistics(model).bytes
        hits = prefix_statistics(again).hits
        assert torch.equal(generated(again, prompt()), text) and prefix_statistics(again).hits == hits
        assert torch.equal(generated(again, prompt()), text) and prefix_statistics(again).hits == hits + 1
        unpatch_model(again)
        assert not {PREFILL, "_patchkit_prefix", "generate"} & vars(again).keys()
    assert prefix_statistics(model).lookups == 1
    store = model._patchkit_prefix.store
    unpatch_model(model)
    assert_restored(before, model)
    assert store.kept == 0
    with pytest.raises(PatchConflict, match="not patched with prefix_cache"):
        prefix_statistics(model)


def test_threads_share_what_is_kept() -> None:
    model, plain = patched(), tiny_model("llama")
    prompts = [torch.cat([prompt(30), prompt(9, 1 + seed)], 1) for seed in range(4)]
    expected, failed = [generated(plain, ids) for ids in prompts], list[Any]()

    def work(number: int) -> None:
        try:
            for turn in range(6):
                chosen = (number + turn) % 4
                assert torch.equal(generated(model, prompts[chosen]), expected[chosen])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and prefix_statistics(model).hits > 10


@pytest.mark.parametrize(("given", "expected"), [("2GiB", 2**31), ("512 MiB", 2**29), ("1.5KiB", 1536), (7, 7), ("1TiB", 2**40)])
def test_bytes_are_read(given: Any, expected: int) -> None:
    assert PrefixCache(max_bytes=given).max_bytes == expected


@pytest.mark.parametrize("given", [0, -1, True, 1.5, None, "2 GB", "2gib", "GiB", "0MiB", "", "-1GiB"])
def test_other_bytes_are_refused_by_name(given: Any) -> None:
    with pytest.raises(ValueError, match=r"max_bytes=.*KiB, MiB, GiB, TiB"):
        PrefixCache(max_bytes=given)


@pytest.mark.parametrize("given", [0, 1, -5, True, 8.0, "8", None])
def test_bad_blocks_are_refused_by_name(given: Any) -> None:
    with pytest.raises(ValueError, match=r"block=.*at least 2"):
        PrefixCache(block=given)


def test_models_that_cannot_be_fed_in_blocks_are_refused() -> None:
    for family, words in (("jamba", "other logits"), ("mamba", "recurrent states only")):
        with pytest.raises(UnsupportedModel, match=words):
            patched(family=family)
