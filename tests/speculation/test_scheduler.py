"""Sequences that join a running batch and leave it have the tokens that they have alone; the oracle is the unpatched model's generate."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from speculation import Silent
from support import BEGINNINGS, feed

from patchkit import Speculative, patch_model, patched, unpatch_model
from patchkit.errors import PatchConflict, PatchError
from patchkit.models import load_model
from patchkit.speculation import Chain, DraftModel, PromptLookup, Row, Scheduler, SelfDraft, statistics_of
from patchkit.speculation.cached_model import CachedModel, make_cache
from patchkit.speculation.drafters.suffix import Suffix
from patchkit.speculation.drafters.token_recycling import TokenRecycling
from patchkit.speculation.ragged_cache import RaggedCache
from patchkit.speculation.rows import Rows, order_after
from patchkit.testing import tiny_model
from patchkit.views import cache_bytes


def prompts_of(count: int, vocabulary: int = 128, seed: int = 0) -> list[torch.Tensor]:
    """Prompts [1, 3 to 30], some of which repeat themselves, so that lookup has drafts."""
    generator = torch.Generator().manual_seed(seed)
    prompts = []
    for index in range(count):
        length = 3 + int(torch.randint(28, (), generator=generator))
        ids = torch.randint(3, vocabulary, (1, length), generator=generator)
        prompts.append(ids.repeat(1, 2) if index % 3 == 0 else ids)
    return prompts


def alone(model: Any, ids: torch.Tensor, **options: Any) -> list[int]:
    """New tokens of the unpatched model."""
    out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
    return out[0, ids.shape[1] :].tolist()


def served(scheduler: Scheduler, requests: list[tuple[torch.Tensor, dict[str, Any]]], seed: int) -> list[Row]:
    """Submit at random times while the scheduler is at work."""
    chance, rows = random.Random(seed), []
    waiting = list(requests)
    while True:
        while waiting and chance.random() < 0.4:
            ids, options = waiting.pop(0)
            rows.append(scheduler.submit(ids, pad_token_id=0, **options))
        if not scheduler.step() and not waiting:
            return rows


def draft_model() -> DraftModel:
    return DraftModel(tiny_model("qwen2"))


DRAFTS = {
    "lookup": lambda: PromptLookup(min_ngram=1),
    "suffix": lambda: Suffix(scope="call"),
    "chain": lambda: Chain((PromptLookup(min_ngram=1), draft_model())),
    "draft model": draft_model,
    "self draft": lambda: SelfDraft(skip_layers=(1,)),
    "token recycling": TokenRecycling,
    "silent": Silent,
}


@functools.cache
def forty() -> list[tuple[torch.Tensor, dict[str, Any], list[int]]]:
    """Prompts, options and the greedy tokens of the unpatched model."""
    chance, plain = random.Random(1), tiny_model("llama")
    requests = [(ids, {"max_new_tokens": chance.randint(5, 80), "eos_token_id": 7}) for ids in prompts_of(40)]
    return [(ids, options, alone(plain, ids, do_sample=False, **options)) for ids, options in requests]


@pytest.mark.parametrize(("draft", "k"), [*((draft, 3) for draft in DRAFTS), ("suffix", "cost_model")])
def test_forty_sequences_through_six_slots(draft: str, k: Any) -> None:
    model = tiny_model("llama")
    requests = [(ids, options) for ids, options, _ in forty()]
    rows_fed: list[int] = []
    with patched(model, Speculative(draft=DRAFTS[draft](), k=k), verbose=False):
        scheduler = Scheduler(model, slots=6, prefill=24)
        bytes_seen = []

        def watch(module: Any, args: Any, kwargs: Any) -> None:
            batches = scheduler._all()
            count = len(kwargs["input_ids"])
            rows_fed.append(count)
            assert any(len(batch.rows) == count for batch in batches)
            assert all(row.finish is None for batch in batches for row in batch.rows.rows)
            bytes_seen.append(cache_bytes([batch.cache for batch in batches]))

        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        rows = served(scheduler, requests, seed=2)
        hook.remove()
        statistics = statistics_of(model)
    for row, (ids, _, expected) in zip(rows, forty(), strict=True):
        assert row.error is None
        assert row.new == expected
        assert row.finish == ("stop" if row.new[-1] == 7 else "length")
        assert row.tokens.tolist() == ids[0].tolist() + row.new
    assert max(rows_fed) == 6
    longest = max(ids.shape[1] + options["max_new_tokens"] for ids, options in requests)
    config = model.config
    of_token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    offsets = 6 * 8
    assert max(bytes_seen) <= 6 * (-(-longest // 64) * 64) * of_token + offsets
    assert statistics.emitted + 40 == sum(len(row.new) for row in rows)
    assert sum(row.accepted for row in rows) == statistics.accepted
    if k == 3:  # how often the other drafts depends on the clock
        assert (statistics.accepted > 0) == (draft != "silent")


@pytest.mark.parametrize("heads", ["eagle", "medusa"])
def test_heads_draft_for_rows_that_join(heads: str) -> None:
    model, tokenizer = load_model("stdlib-7m")
    requests = [(tokenizer(text, return_tensors="pt").input_ids, {"max_new_tokens": 6 + 5 * i}) for i, text in enumerate(BEGINNINGS)]
    expected = [alone(model, ids, do_sample=False, **options) for ids, options in requests]
    with patched(model, f"speculative(draft={heads}, k=3)", verbose=False):
        scheduler = Scheduler(model, slots=3)
        rows = served(scheduler, requests, seed=0)
        together = [scheduler.submit(ids, pad_token_id=0, **options) for ids, options in requests]
        scheduler.run()
        assert statistics_of(model).accepted > 0
    assert [row.new for row in rows] == [row.new for row in together] == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma2", "bloom"])
def test_prompts_that_wait_are_fed_in_one_forward(name: str) -> None:
    model, plain = tiny_model(name), tiny_model(name)
    generator = torch.Generator().manual_seed(4)
    # The fourth is too long to go with the others, and one forward has room for 40 tokens.
    lengths = (8, 6, 9, 30, 7, 9, 9, 8, 9)
    prompts = [torch.randint(3, 128, (1, length), generator=generator) for length in lengths]
    options: dict[str, Any] = {"max_new_tokens": 7, "eos_token_id": None, "do_sample": False}
    expected = [alone(plain, ids, **options) for ids in prompts]
    shapes = []
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=9, prefill=40)
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
        rows = [scheduler.submit(ids, pad_token_id=0, **options) for ids in prompts]
        scheduler.step()
        scheduler.step()
        assert shapes[0] == (3, 9)
        scheduler.run()
        hook.remove()
    assert [row.new for row in rows] == expected
    assert sum(rows * tokens for rows, tokens in shapes if tokens > 5) <= 40 + sum(lengths)


def test_one_of_prompts_that_are_fed_together_may_end_at_once() -> None:
    """By its length, by its end token, or because another's first token has it cancelled."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    prompts = prompts_of(12, seed=9)[1:12:3]
    first = alone(plain, prompts[2], max_new_tokens=1, do_sample=False)[0]
    limits, rows = (9, 1, 9, 9), list[Row]()
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=4)
        for number, (ids, most) in enumerate(zip(prompts, limits, strict=True)):
            sink = (lambda new: scheduler.cancel(rows[3])) if number == 0 else None
            ends = first if number == 2 else None
            rows.append(scheduler.submit(ids, max_new_tokens=most, eos_token_id=ends, pad_token_id=0, do_sample=False, on_tokens=sink))
        scheduler.run()
    assert [row.finish for row in rows] == ["length", "length", "stop", "cancelled"]
    assert [len(row.new) for row in rows[1:]] == [1, 1, 1]
    for row, ids in zip(rows, prompts, strict=True):
        assert row.new == alone(plain, ids, max_new_tokens=len(row.new), eos_token_id=None, do_sample=False)


def test_an_error_where_prompts_come_together_ends_these_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    prompts = [torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    take, failures = Rows.join, [MemoryError("no room")]

    def fails_once(self: Rows, other: Rows) -> None:
        if failures:
            raise failures.pop()
        take(self, other)

    with patched(model, "speculative(k=2)", verbose=False):
        monkeypatch.setattr(Rows, "join", fails_once)
        scheduler = Scheduler(model, slots=4)
        rows = [scheduler.submit(ids, max_new_tokens=6, eos_token_id=None, pad_token_id=0) for ids in prompts]
        scheduler.run()
    assert [row.finish for row in rows] == ["error", "error", "length", "length"]
    assert all(isinstance(row.error, MemoryError) for row in rows[:2])
    for row, ids in zip(rows[2:], prompts[2:], strict=True):
        assert row.new == alone(plain, ids, max_new_tokens=6, eos_token_id=None, do_sample=False)


def test_rows_of_every_kind_share_a_batch() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    kinds: list[dict[str, Any]] = [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "seed": 3},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "top_k": 5, "seed": 4, "repetition_penalty": 1.2},
        {"do_sample": False, "return_dict_in_generate": True, "output_scores": True, "output_logits": True},
        {"do_sample": False, "min_new_tokens": 9, "eos_token_id": [7, 9, 11]},
    ]
    requests = [(ids, {"max_new_tokens": 12 + 3 * (i % 4), **kinds[i % len(kinds)]}) for i, ids in enumerate(prompts_of(24, seed=5))]
    with patched(model, Speculative(draft=PromptLookup(min_ngram=1), k=4), verbose=False):
        scheduler = Scheduler(model, slots=5)
        rows = served(scheduler, requests, seed=1)
    for row, (ids, options) in zip(rows, requests, strict=True):
        options = dict(options)
        if (seed := options.pop("seed", None)) is not None:
            torch.manual_seed(seed)
        wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)
        if options.get("return_dict_in_generate"):
            torch.testing.assert_close(torch.stack(row.scores), torch.cat(wanted.scores), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(torch.stack(row.logits), torch.cat(wanted.logits), rtol=1e-4, atol=1e-4)
            wanted = wanted.sequences
        assert row.new == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("draft", ["lookup", "draft model"])
def test_a_seed_gives_the_text_of_the_unpatched_model_whatever_drafts(draft: str) -> None:
    """A drawn draft would use up random numbers, and the rejection rule would choose other tokens."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    options: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "max_new_tokens": 20, "eos_token_id": None}
    with patched(model, Speculative(draft=DRAFTS[draft](), k=3), verbose=False):
        scheduler = Scheduler(model, slots=3)
        rows = [scheduler.submit(ids, seed=seed, pad_token_id=0, **options) for seed, ids in enumerate(prompts_of(6))]
        scheduler.run()
        assert statistics_of(model).accepted > 0
    for seed, (row, ids) in enumerate(zip(rows, prompts_of(6), strict=True)):
        torch.manual_seed(seed)
        assert row.new == alone(plain, ids, **options)


def test_rows_without_a_seed_are_drawn_from_the_target() -> None:
    """Of 400 sequences of one token each, drawn in shared batches, the shares are those of the model's own distribution."""
    model = tiny_model("llama")
    ids = torch.tensor([[5, 9, 5, 9, 5]])
    with torch.no_grad():
        wanted = model(ids).logits[0, -1].float().mul(3).softmax(-1)
    torch.manual_seed(0)
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=16)
        rows = [scheduler.submit(ids, max_new_tokens=2, do_sample=True, temperature=1 / 3, top_k=0, pad_token_id=0) for _ in range(400)]
        scheduler.run()
    counts = torch.bincount(torch.tensor([row.new[0] for row in rows]), minlength=128)
    likely = wanted > 0.01
    error = (counts[likely] / 400 - wanted[likely]).abs()
    assert bool((error < 4 * (wanted[likely] * (1 - wanted[likely]) / 400).sqrt()).all())


@pytest.mark.parametrize("patches", ["streaming(sinks=2, window=10)", "linear"])
def test_caches_that_cannot_be_joined_take_turns(patches: str) -> None:
    model = patch_model(tiny_model("llama"), patches, verbose=False)
    requests = [(ids, {"max_new_tokens": 10 + i}) for i, ids in enumerate(prompts_of(7))]
    expected = [alone(model, ids, do_sample=False, **options) for ids, options in requests]
    unpatch_model(model)
    patch_model(model, f"{patches} + speculative(k=3)", verbose=False)
    scheduler = Scheduler(model, slots=3)
    most = 0
    rows = [scheduler.submit(ids, pad_token_id=0, **options) for ids, options in requests]
    while scheduler.step():
        most = max(most, scheduler.running)
    assert most == 3
    assert [row.new for row in rows] == expected
    unpatch_model(model)


def test_a_row_that_is_much_longer_keeps_a_batch_of_its_own() -> None:
    """Three short rows and two long ones: the short share a batch, and so do the long."""
    model, plain = tiny_model("llama"), tiny_model("llama")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (1, length), generator=generator) for length in (9, 12, 60, 10, 66)]
    options: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": None, "do_sample": False}
    config = model.config
    of_token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=5)
        scheduler._most_padding = 100 * of_token  # three short rows and a long one have 150 of padding
        rows = [scheduler.submit(ids, pad_token_id=0, **options) for ids in prompts]
        seen = set()
        while scheduler.step():
            seen.add(tuple(sorted(len(batch.rows) for batch in scheduler._batches)))
        assert (2, 3) in seen and max(map(sum, seen)) == 5
        scheduler._most_padding = 1 << 40
        again = [scheduler.submit(ids, pad_token_id=0, **options) for ids in prompts]
        while scheduler.step():
            assert len(scheduler._batches) <= 1
    expected = [alone(plain, ids, **options) for ids in prompts]
    assert [row.new for row in rows] == [row.new for row in again] == expected


def test_later_chunks_of_a_prompt_copy_no_keys_and_have_the_bits_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    ids = torch.randint(3, 128, (1, 50), generator=torch.Generator().manual_seed(1))
    wanted, _ = feed(model, ids, [20, 16, 14])
    with patched(model, "speculative(k=2)", verbose=False), torch.no_grad():

        def copies(*args: Any) -> None:
            raise AssertionError("keys were copied")

        monkeypatch.setattr("transformers.integrations.sdpa_attention.repeat_kv", copies)
        cached, found = CachedModel(model, make_cache(model, 64), [0], ragged=True), []
        for start, end in ((0, 20), (20, 36), (36, 50)):
            found.append(cached.forward(ids[:, start:end]))
            cached.keep([end - start])
    assert torch.equal(torch.cat(found, 1), wanted)


def test_a_cancelled_row_leaves_within_a_round_and_the_others_do_not_notice() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    requests = prompts_of(4)
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=3)
        got: list[list[int]] = []
        rows = [scheduler.submit(ids, max_new_tokens=40, eos_token_id=None, pad_token_id=0, on_tokens=got.append) for ids in requests]
        for _ in range(3):
            scheduler.step()
        scheduler.cancel(rows[1])
        assert (rows[1].finish, scheduler.running, scheduler.waiting) == ("cancelled", 2, 1)
        held = len(rows[1].new)
        scheduler.cancel(rows[1])  # again: nothing happens
        scheduler.step()
        assert (scheduler.running, scheduler.waiting) == (3, 0)
        scheduler.run()
        late = scheduler.submit(requests[0], max_new_tokens=40, pad_token_id=0)
        scheduler.cancel(late)
        assert not scheduler.step() and late.new == []
    assert held == len(rows[1].new) > 0
    for index in (0, 2, 3):
        assert rows[index].new == alone(plain, requests[index], max_new_tokens=40, eos_token_id=None, do_sample=False)
    assert rows[1].new == alone(plain, requests[1], max_new_tokens=held, eos_token_id=None, do_sample=False)
    assert sum(map(len, got)) == sum(len(row.new) for row in rows)


class Failing:
    """A logits processor that raises after three tokens."""

    by_row = True

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls > 3:
            raise ZeroDivisionError("by the processor")
        return scores


def test_an_error_ends_its_batch_and_not_what_comes_after() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    first, second, third = prompts_of(3)
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=1)
        bad = scheduler.submit(first, max_new_tokens=20, pad_token_id=0, logits_processor=[Failing()])
        good = [scheduler.submit(ids, max_new_tokens=20, pad_token_id=0) for ids in (second, third)]
        scheduler.run()
        assert (bad.finish, type(bad.error)) == ("error", ZeroDivisionError) and len(bad.new) == 3
        assert [row.new for row in good] == [alone(plain, ids, max_new_tokens=20, do_sample=False) for ids in (second, third)]
        # The model is free again, for generate too.
        assert alone(model, first, max_new_tokens=5) == alone(plain, first, max_new_tokens=5, do_sample=False)


def test_a_sink_may_cancel_rows_of_the_same_round() -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    prompts = prompts_of(3)
    with patched(model, "speculative(k=2)", verbose=False):
        scheduler, rows = Scheduler(model, slots=3), list[Row]()

        def cancels(tokens: list[int]) -> None:
            if len(rows) == 3 and len(rows[0].new) > 6:
                scheduler.cancel(rows[0])
                scheduler.cancel(rows[2])

        for number, ids in enumerate(prompts):
            sink = cancels if number == 0 else None
            rows.append(scheduler.submit(ids, max_new_tokens=30, eos_token_id=None, pad_token_id=0, on_tokens=sink))
        scheduler.run()
    assert [row.finish for row in rows] == ["cancelled", "length", "cancelled"]
    for row, ids in zip(rows, prompts, strict=True):
        assert row.new == alone(plain, ids, max_new_tokens=len(row.new), eos_token_id=None, do_sample=False)
        assert row.tokens.tolist() == ids[0].tolist() + row.new


def test_an_error_of_a_join_ends_both_batches_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = tiny_model("llama"), tiny_model("llama")
    prompts = prompts_of(3)
    adopt = RaggedCache.adopt

    def fails_once(self: RaggedCache, other: RaggedCache) -> None:
        monkeypatch.setattr(RaggedCache, "adopt", adopt)
        raise MemoryError("no room")

    with patched(model, "speculative(k=2)", verbose=False):
        scheduler = Scheduler(model, slots=2)
        first = scheduler.submit(prompts[0], max_new_tokens=30, eos_token_id=None, pad_token_id=0)
        scheduler.step()
        monkeypatch.setattr(RaggedCache, "adopt", fails_once)
        others = [scheduler.submit(ids, max_new_tokens=9, eos_token_id=None, pad_token_id=0) for ids in prompts[1:]]
        scheduler.run()
    assert [row.finish for row in (first, *others)] == ["error", "error", "length"]
    assert first.tokens.tolist() == prompts[0][0].tolist() + first.new and len(first.new) > 0
    assert others[1].new == alone(plain, prompts[2], max_new_tokens=9, eos_token_id=None, do_sample=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_beams": 2}, "beam"), ({"streamer": object()}, "streamer"), ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens")],
)
def test_what_only_generate_serves_is_refused_at_once(options: dict[str, Any], words: str) -> None:
    model = tiny_model("llama")
    with patched(model, "speculative", verbose=False):
        scheduler = Scheduler(model)
        with pytest.raises(PatchError, match=words):
            scheduler.submit(torch.tensor([3, 4, 5]), **options)
        with pytest.raises(PatchError, match="one by one"):
            scheduler.submit(torch.tensor([[3], [4]]))
        assert not scheduler.step()
    with pytest.raises(PatchConflict, match="not patched with speculative"):
        Scheduler(model)
    with pytest.raises(ValueError, match="slots=0"), patched(model, "speculative", verbose=False):
        Scheduler(model, slots=0)


@pytest.mark.parametrize("seed", range(30))
def test_the_last_rows_fill_the_holes(seed: int) -> None:
    chance = random.Random(seed)
    rows = chance.randint(1, 9)
    ended = chance.sample(range(rows), chance.randint(0, rows - 1))
    order = order_after(ended, rows)
    assert sorted(order) == [row for row in range(rows) if row not in ended]
    moved = [row for place, row in enumerate(order) if place != row]
    assert all(row >= len(order) for row in moved)  # so that no row is written over before it has moved
