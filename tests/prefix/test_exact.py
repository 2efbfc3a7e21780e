"""A hit gives the bits of a miss, and the text of the model without a prefix cache.

The oracle of bits is the same model with an empty store; that of texts shares no code with the patch: plain `generate`.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from support import fast_first, matrix

from patchkit import PrefixCache, Speculative, parse_spec, patch_model
from patchkit.models import load_model
from patchkit.prefix import clear_prefix_cache, prefix_statistics
from patchkit.speculation import DraftModel, statistics_of
from patchkit.testing import tiny_model
from patchkit.views import twin

BLOCK = 8
STREAMING, LINEAR = "streaming(sinks=2, window=6)", "linear(window=6)"
CASES = [
    ("llama", "none"),
    ("llama", STREAMING),
    ("llama", LINEAR),
    ("llama", "mlp_int8(mode=weight_only)"),
    ("llama", "compile(backend=eager)"),
    ("llama", "speculative(k=3)"),
    ("llama", "speculative(k=3, draft=suffix)"),
    ("llama", "draft model"),
    ("llama", f"{STREAMING} + speculative(k=3)"),
    ("llama", f"{STREAMING} + mlp_int8(mode=weight_only)"),
    ("gemma3_text", "none"),
    ("qwen3_next", "none"),
    ("qwen3_next", "speculative(k=3)"),
    ("falcon_h1", "none"),
    ("lfm2", "none"),
    ("gpt2", "none"),
    ("bloom", "none"),
    ("deepseek_v3", "none"),
]
# The others are in the fast layer elsewhere: drafts below, recurrent states under drafts in test_scheduled.py, int8 in test_disk.py.
SLOW = [
    ("llama", "mlp_int8(mode=weight_only)"),
    ("llama", "speculative(k=3, draft=suffix)"),
    ("llama", "draft model"),
    ("llama", f"{STREAMING} + mlp_int8(mode=weight_only)"),
    ("qwen3_next", "speculative(k=3)"),
    ("falcon_h1", "none"),
    ("lfm2", "none"),
]
FAST = [case for case in CASES if case not in SLOW]


def prompt(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: torch.Tensor, new: int = 4, **options: Any) -> Any:
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, output_logits=True, **options)


def patches_of(spec: str) -> list[Any]:
    return [Speculative(draft=DraftModel(tiny_model("qwen2")), k=3)] if spec == "draft model" else parse_spec(spec)


def pair(family: str, spec: str, block: int = BLOCK) -> tuple[Any, Any]:
    """A model with a prefix cache, and the model without it, and without speculation and compiled steps."""
    patches = patches_of(spec)
    model = patch_model(tiny_model(family), *patches, PrefixCache(block=block), verbose=False)
    plain, others = tiny_model(family), [each for each in patches if each.name not in ("speculative", "compile")]
    return model, patch_model(plain, *others, verbose=False) if others else plain


def texts() -> dict[str, list[torch.Tensor]]:
    """Prompts [1, L] by what happens to them from call to call."""
    first, head = prompt(37), prompt(30, 1)
    edited = first.clone()
    edited[0, 20] = (edited[0, 20] + 1) % 120 + 3
    return {
        "again": [first] * 2,
        "grows": [prompt(44, 2)[:, :end] for end in (9, 21, 44)],
        "shared head": [torch.cat([head, prompt(12, 10 + seed)], 1) for seed in range(3)],
        "edited": [first, edited],
        "at a border": [first[:, :end] for end in (16, 17, 15, 16)],
    }


@pytest.mark.parametrize(("family", "spec"), fast_first(CASES, FAST))
def test_a_hit_gives_the_bits_of_a_miss(family: str, spec: str) -> None:
    model, plain = pair(family, spec)
    misses: dict[tuple[int, ...], Any] = {}
    for ids in (ids for prompts in texts().values() for ids in prompts):
        key = tuple(ids[0].tolist())
        if key not in misses:
            clear_prefix_cache(model)
            misses[key] = generated(model, ids)
            assert torch.equal(misses[key].sequences, generated(plain, ids).sequences)
    for name, prompts in texts().items():
        clear_prefix_cache(model)
        before = prefix_statistics(model)
        for number, ids in enumerate(prompts):
            hit, miss = generated(model, ids), misses[tuple(ids[0].tolist())]
            assert torch.equal(hit.logits[0], miss.logits[0]), (name, number)
            assert torch.equal(hit.sequences, miss.sequences), (name, number)
        now = prefix_statistics(model)
        assert now.lookups - before.lookups == len(prompts)
        assert now.hits - before.hits >= len(prompts) - (2 if name == "at a border" else 1)
        assert now.left_alone == now.evictions == 0


def test_only_whole_blocks_are_reused_and_one_token_is_left() -> None:
    model, _ = pair("llama", "none")
    fed: list[int] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    for tokens, expected in ((37, [8, 8, 8, 8, 5]), (37, [5]), (33, [1]), (32, [8]), (40, [8]), (41, [8, 1]), (8, [8]), (7, [7])):
        fed.clear()
        generated(model, prompt(41)[:, :tokens], new=1)
        assert fed == expected, tokens


@pytest.mark.parametrize(
    "spec", ["none", STREAMING, LINEAR, matrix("compile(backend=eager)"), "speculative(k=3)", f"{STREAMING} + speculative(k=3)"]
)
def test_rows_of_a_batch_are_fed_alone_and_put_together(spec: str) -> None:
    model, plain = pair("llama", spec)
    first, other = prompt(37), torch.cat([prompt(37)[:, :19], prompt(18, 5)], 1)
    rows = torch.cat([first, other, first, prompt(37, 6)])
    miss, hit, expected = generated(model, rows), generated(model, rows), generated(plain, rows)
    assert torch.equal(miss.logits[0], hit.logits[0])
    assert torch.equal(miss.sequences, expected.sequences) and torch.equal(hit.sequences, expected.sequences)
    found = prefix_statistics(model)
    assert found.lookups == 6 and found.repeated_rows == 2
    assert found.reused_tokens == 16 + 3 * 32  # the second row begins as the first one does


def test_each_different_prompt_of_a_group_is_fed_once() -> None:
    model, plain = pair("llama", "none")
    fed: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    rows = torch.cat([prompt(37, seed) for seed in range(4)]).repeat_interleave(8, 0)
    output = generated(model, rows, new=8)
    assert fed == [(1, 8)] * 16 + [(4, 5)] + [(32, 1)] * 7
    assert torch.equal(output.sequences, generated(plain, rows, new=8).sequences)
    fed.clear()
    torch.manual_seed(0)
    output = generated(model, rows[::8], do_sample=True, num_return_sequences=3)
    assert fed[0] == (4, 5)
    torch.manual_seed(0)
    assert torch.equal(output.sequences, generated(plain, rows[::8], do_sample=True, num_return_sequences=3).sequences)


def test_beams_and_chunks_are_those_of_plain_generate() -> None:
    model, plain = pair("llama", "none")
    for options in (dict(num_beams=3), dict(prefill_chunk_size=8), dict(prefill_chunk_size=16), dict(num_beams=2, num_return_sequences=2)):
        for _ in range(2):
            assert torch.equal(generated(model, prompt(37), **options).sequences, generated(plain, prompt(37), **options).sequences)
    assert prefix_statistics(model).left_alone == 0 and prefix_statistics(model).hits == 7


@functools.cache
def stdlib() -> tuple[Any, Any]:
    """A pretrained model, unpatched, and its tokenizer."""
    return load_model("stdlib-7m")


FAST_DRAFTS = ("eagle(heads=bundled)", "draft_model('stdlib-1m-draft')", "suffix", "prompt_lookup")
DRAFTS = (*FAST_DRAFTS, "medusa", "self_draft(patches='streaming(sinks=4, window=28)')")


@pytest.mark.parametrize("draft", fast_first(DRAFTS, FAST_DRAFTS))
def test_as_many_drafts_are_accepted_after_a_hit_as_after_a_miss(draft: str) -> None:
    """What a drafter wants to know of the prompt is kept too: hidden states beside keys. Some learn from calls, so both have two."""
    counts, sequences = [], []
    plain, tokenizer = stdlib()
    ids = tokenizer("".join(f"def f{n}(x):\n    return x + {n}\n\n\n" for n in range(7)), return_tensors="pt").input_ids
    for hits in (0, 1):
        model = patch_model(twin(plain), f"speculative(draft={draft}, k=3)", PrefixCache(block=16), verbose=False)
        generated(model, ids, new=14)
        if not hits:
            clear_prefix_cache(model)
        before = statistics_of(model)
        sequences.append(generated(model, ids, new=14).sequences)
        now = statistics_of(model)
        counts.append((now.accepted - before.accepted, now.proposed - before.proposed))
        assert prefix_statistics(model).hits == hits
    assert counts[0] == counts[1] and 0 < counts[0][0] <= counts[0][1]
    assert torch.equal(*sequences)


def test_another_kind_of_session_does_not_find_what_has_no_hidden_states() -> None:
    model = patch_model(twin(stdlib()[0]), "speculative(draft=eagle, k=3)", PrefixCache(block=8), verbose=False)
    ids = prompt(37)
    generated(model, ids)
    model.generate(ids, attention_mask=torch.ones_like(ids), num_beams=2, max_new_tokens=2, do_sample=False)  # the stock method
    assert prefix_statistics(model).hits == 0 and prefix_statistics(model).lookups == 2


def test_rows_of_a_batch_get_the_hidden_states_of_their_prompts() -> None:
    plain, _ = stdlib()
    first, other = prompt(37), prompt(37, 1)
    expected = [generated(plain, ids, new=8).sequences for ids in (first, other)]
    model = patch_model(twin(plain), "speculative(draft=eagle(heads=bundled, tree=chain), k=3)", PrefixCache(block=16), verbose=False)
    rows = torch.cat([first, other, first])
    counts = []
    for _ in range(2):
        before = statistics_of(model)
        assert torch.equal(generated(model, rows, new=8).sequences, torch.cat([expected[0], expected[1], expected[0]]))
        now = statistics_of(model)
        counts.append((now.accepted - before.accepted, now.proposed - before.proposed))
    assert counts[0] == counts[1] and counts[0][1] > 0
    assert prefix_statistics(model).repeated_rows == 2 and prefix_statistics(model).hits == 2


@pytest.mark.parametrize("spec", ["none", STREAMING, "speculative(k=3)"])
@pytest.mark.parametrize("tokens", [64, 65])
def test_samples_of_one_prompt_cost_its_tokens_once(spec: str, tokens: int) -> None:
    """Four prompts, eight copies of each, as long as a block or a token longer: an eighth of the tokens that are fed without the patch."""
    model, plain = pair("llama", spec, block=64)
    rows = torch.cat([prompt(tokens, seed) for seed in range(4)]).repeat_interleave(8, 0)
    fed = Counter[str]()
    for name, each in (("with", model), ("without", plain)):
        each.register_forward_pre_hook(functools.partial(count_tokens, fed, name), with_kwargs=True)
        generated(each, rows, new=1)
    assert fed == {"with": 4 * tokens, "without": 32 * tokens}
    assert prefix_statistics(model).repeated_rows == 28
    assert torch.equal(generated(model, rows, new=8).sequences, generated(plain, rows, new=8).sequences)


def count_tokens(fed: Counter[str], name: str, module: Any, args: Any, kwargs: Any) -> None:
    fed[name] += kwargs["input_ids"].numel()
