"""Sequences of a scheduler are looked up when they are admitted, and fed in whole blocks between rounds."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from patchkit import PrefixCache, patch_model
from patchkit.prefix import clear_prefix_cache, prefix_statistics, salted
from patchkit.prefix.shared import prefixes_of
from patchkit.speculation import Scheduler
from patchkit.testing import tiny_model

BLOCK = 8
OPTIONS: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)


def prompts() -> list[torch.Tensor]:
    """Prompts [1, 32 to 40] with a common head of 30 tokens."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randint(3, 128, (1, 30), generator=generator)
    return [torch.cat([head, torch.randint(3, 128, (1, 2 + 2 * i), generator=generator)], 1) for i in range(5)]


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("llama", "speculative(k=3)"),
        ("llama", "speculative(k=3, draft=suffix)"),
        ("llama", "streaming(sinks=2, window=6) + speculative(k=3)"),
        ("qwen3_next", "speculative(k=3)"),
        ("gemma3_text", "speculative(k=3)"),
    ],
)
def test_sequences_that_join_have_the_tokens_that_they_have_alone(family: str, spec: str) -> None:
    plain = tiny_model(family)
    if "streaming" in spec:
        patch_model(plain, "streaming(sinks=2, window=6)", verbose=False)
    expected = [plain.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, ids.shape[1] :].tolist() for ids in prompts()]
    model = patch_model(tiny_model(family), spec, PrefixCache(block=BLOCK), verbose=False)
    fed: list[int] = []
    rounds = []
    for _ in range(2):
        fed.clear()
        hook = model.register_forward_pre_hook(lambda module, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        scheduler = Scheduler(model, slots=3, prefill=5)  # less than a block
        rows = [scheduler.submit(ids, **OPTIONS) for ids in prompts()]
        assert not fed  # submitting feeds nothing
        scheduler.run()
        hook.remove()
        assert [row.error for row in rows] == [None] * 5
        assert [row.new for row in rows] == expected
        assert max(fed) <= BLOCK
        rounds.append(sum(fed))
    found = prefix_statistics(model)
    assert found.lookups == 10 and found.hits == 9 and found.left_alone == 0 and rounds[1] < rounds[0]
    borders = sum((ids.shape[1] - 1) // BLOCK * BLOCK for ids in prompts())
    assert found.reused_tokens >= borders + 4 * 16


def test_generate_and_a_scheduler_share_what_is_kept() -> None:
    model = patch_model(tiny_model("llama"), "speculative(k=3)", PrefixCache(block=BLOCK), verbose=False)
    ids = prompts()[-1]
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **OPTIONS)[0, ids.shape[1] :].tolist()
    for expected in (32, 0):
        before = prefix_statistics(model).reused_tokens
        scheduler = Scheduler(model)
        row = scheduler.submit(ids, **OPTIONS)
        scheduler.run()
        assert row.new == text
        assert prefix_statistics(model).reused_tokens - before == expected
        clear_prefix_cache(model)


def test_a_sequence_has_the_salt_under_which_it_was_submitted() -> None:
    model = patch_model(tiny_model("llama"), "speculative(k=2)", PrefixCache(block=BLOCK), verbose=False)
    ids, scheduler = prompts()[3], Scheduler(model)
    for salt, hits in (("alice", 0), ("bob", 0), ("alice", 1), ("bob", 2)):
        with salted(model, salt):
            row = scheduler.submit(ids, **OPTIONS)
        scheduler.run()
        assert row.error is None and prefix_statistics(model).hits == hits


def test_a_salt_holds_in_its_own_thread_only() -> None:
    """Contexts of two threads that overlap: neither sees the other's salt, and none is left."""
    model = patch_model(tiny_model("llama"), PrefixCache(block=BLOCK), verbose=False)
    prefixes, seen = prefixes_of(model), dict[str, str]()
    entered, left = threading.Event(), threading.Event()

    def other() -> None:
        with salted(model, "b"):
            entered.set()
            left.wait(timeout=30)
            seen["b"] = prefixes.salt

    thread = threading.Thread(target=other)
    with salted(model, "a"):
        thread.start()
        entered.wait(timeout=30)
        seen["a"] = prefixes.salt
    left.set()
    thread.join(timeout=30)
    assert seen == {"a": "a", "b": "b"} and prefixes.salt == ""
