"""Rows with grammars of their own and rows without one share a batch."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from grammar_cases import PROMPTS, bundled, grammar_of

from patchkit import Grammar, patched
from patchkit.speculation import Scheduler, statistics_of


def test_each_row_follows_its_own_grammar() -> None:
    model, tokenizer = bundled()
    grammars: list[Grammar | None] = [grammar_of("user"), None, Grammar.regex("[a-f]{3,9}(, [0-9]{2,4}){2}", tokenizer), grammar_of("call")]
    requests: list[tuple[torch.Tensor, dict[str, Any]]] = []
    for index in range(8):
        ids = tokenizer(PROMPTS[index % len(PROMPTS)], return_tensors="pt").input_ids
        grammar = grammars[index % len(grammars)]
        options = {"max_new_tokens": 120 if grammar else 10 + 4 * index, "do_sample": False}
        requests.append((ids, options | ({"logits_processor": [grammar]} if grammar else {})))
    requests[6][1].update(do_sample=True, temperature=1.3)
    expected = []
    for index, (ids, options) in enumerate(requests):
        torch.manual_seed(index)
        expected.append(model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **options)[0, ids.shape[1] :].tolist())
    with patched(model, "speculative(draft=suffix(scope=call), k=4)", verbose=False):
        scheduler = Scheduler(model, slots=5)
        rows = [scheduler.submit(ids, seed=index, pad_token_id=0, **options) for index, (ids, options) in enumerate(requests)]
        widths = set()
        while scheduler.step():
            widths.add(len(scheduler._batches) and len(scheduler._batches[0].rows))
            assert len(scheduler._batches) <= 1  # all share one
        forced = statistics_of(model).forced
    assert max(widths) == 5
    assert [row.new for row in rows] == expected
    assert forced == sum(row.forced for row in rows) > 50
    assert all(row.forced == 0 for row in rows[1::4])
    assert isinstance(json.loads(tokenizer.decode(rows[0].new, skip_special_tokens=True)), dict)


def test_a_batch_that_cannot_join_gives_its_row_back() -> None:
    """Grammars of two tokenizers share no batch; what lives in a spare row of another batch must move out of it."""
    model, tokenizer = bundled()
    first, second = Grammar.regex("[a-f]{60,90}", tokenizer), Grammar.regex("[g-m]{60,90}", copy.deepcopy(tokenizer))
    assert first.vocabulary is not second.vocabulary
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS[:3]]
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}
    requests = [(0, 70, first), (1, 12, first), (2, 6, first), (0, 40, second), (1, 40, first), (2, 40, second)]
    expected = []
    for index, new, grammar in requests:
        given = dict(attention_mask=torch.ones_like(ids[index]), logits_processor=[grammar], max_new_tokens=new, **options)
        expected.append(model.generate(ids[index], **given)[0, ids[index].shape[1] :].tolist())
    with patched(model, "speculative(draft=prompt_lookup(min_ngram=1), k=3)", verbose=False):
        scheduler = Scheduler(model, slots=8)
        rows = []
        for number, (index, new, grammar) in enumerate(requests):
            if number == 3:  # two rows have left, and their room is lent to those that come
                while rows[1].finish is None or rows[2].finish is None:
                    scheduler.step()
            rows.append(scheduler.submit(ids[index], logits_processor=[grammar], max_new_tokens=new, **options))
            if number >= 3:
                scheduler.step()
        scheduler.run()
    assert [row.error for row in rows] == [None] * 6
    assert [row.new for row in rows] == expected
