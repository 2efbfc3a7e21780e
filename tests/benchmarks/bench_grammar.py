"""Constrained generation with forced drafts against plain constrained decoding, and what a grammar costs where it forces nothing."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grammar_cases import CALL, USER, bundled
from smollm2 import load_smollm2

from patchkit import Grammar, patch_model
from patchkit.grammar.vocabulary import vocabulary_of_bytes
from patchkit.speculation.constraint import Constraint
from patchkit.speculation.drafter import State
from patchkit.views import twin

REQUESTS = {"user": (USER, "A user of the system as JSON: "), "call": (CALL, "A call of a tool as JSON: ")}


def answer(model: Any, ids: torch.Tensor, grammar: Grammar | None, new: int) -> list[int]:
    processors = [] if grammar is None else [grammar]
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, logits_processor=processors)
    return out[0, ids.shape[1] :].tolist()


def ratios(
    ways: dict[str, Callable[[], list[int]]], first: str, second: str, rounds: int, same: bool = True
) -> tuple[list[float], dict[str, float]]:
    """Seconds of the first way over those of the second, alternated; and the median of each in milliseconds."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, rounds):
        found = {}
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            started = time.perf_counter()
            found[name] = ways[name]()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started)
        assert not same or found[first] == found[second]
    return (
        [a / b for a, b in zip(seconds[first], seconds[second], strict=True)],
        {f"{name}_ms": 1000 * statistics.median(times) for name, times in seconds.items()},
    )


@pytest.mark.parametrize(
    ("name", "spec", "bar"),
    [
        ("stdlib-7m", "speculative(k=0)", 1.6),
        ("stdlib-7m", "speculative(draft=eagle)", 2.0),
        ("smollm2", "speculative(k=0)", 1.5),
        ("smollm2", "gemv + speculative(draft=suffix(scope=call))", 1.5),
    ],
)
def test_forced_drafts(benchmark: Any, record: Callable[..., None], name: str, spec: str, bar: float) -> None:
    model, tokenizer = bundled() if name == "stdlib-7m" else load_smollm2()
    ours = patch_model(twin(model), spec, verbose=False)
    found: list[float] = []
    details: dict[str, Any] = {}
    for request, (schema, prompt) in REQUESTS.items():
        grammar, ids = Grammar.json_schema(schema, tokenizer), tokenizer(prompt, return_tensors="pt").input_ids
        ways = {
            "plain": lambda ids=ids, grammar=grammar: answer(model, ids, grammar, 160),
            "ours": lambda ids=ids, grammar=grammar: answer(ours, ids, grammar, 160),
        }
        each, times = ratios(ways, "plain", "ours", rounds=9)
        found.append(statistics.median(each))
        details |= {f"{request}_{what}": value for what, value in times.items()}
    benchmark.pedantic(lambda: None, rounds=1)
    figure = min(found)
    label = {"speculative(k=0)": "forced", "speculative(draft=eagle)": "eagle"}.get(spec, "gemv_suffix")
    record(
        f"grammar_{name}_{label}",
        figure,
        f">= {bar}",
        what=f"seconds of constrained answers, plain transformers / {spec}, {name}, fp32; the lower of two JSON schemas",
        ratios=found,
        **details,
    )
    assert figure >= bar


def test_a_grammar_of_any_text_costs_next_to_nothing(benchmark: Any, record: Callable[..., None]) -> None:
    model, tokenizer = bundled()
    ours = patch_model(twin(model), "speculative(k=0)", verbose=False)
    grammar, ids = Grammar.regex("(?s:.*)", tokenizer), tokenizer("import os\n\n\ndef read(path):\n", return_tensors="pt").input_ids
    ways = {"free": lambda: answer(ours, ids, None, 96), "any text": lambda: answer(ours, ids, grammar, 96)}
    found, times = ratios(ways, "any text", "free", rounds=15, same=False)
    benchmark.pedantic(lambda: None, rounds=1)
    figure = statistics.median(found)
    what = "seconds of 96 tokens, under a grammar of any text / without one, stdlib-7m, speculative(k=0)"
    record("grammar_any_text", figure, "<= 1.05", what=what, **times)
    assert figure <= 1.05


def test_overhead_at_a_large_vocabulary(benchmark: Any, record: Callable[..., None]) -> None:
    """Microseconds per token of following the text, making the mask and testing the likeliest token."""
    chosen = random.Random(0)
    letters = b"abcdefghijklmnopqrstuvwxyz"
    words = {bytes([byte]) for byte in range(256)}
    while len(words) < 131_071:
        words.add((b" " if chosen.random() < 0.5 else b"") + bytes(chosen.choice(letters) for _ in range(chosen.randint(2, 9))))
    tokens = [*sorted(words), b""]
    end = len(tokens) - 1
    vocabulary = vocabulary_of_bytes(tokens, [end])
    by_bytes = {token: index for index, token in enumerate(tokens)}
    text = [by_bytes[word] for word in chosen.sample([w for w in tokens if w.isalpha() and w.islower() and len(w) > 2], 200)]
    constraint = Constraint(vocabulary, Grammar.lark("start: /[a-z]+( [a-z]+)*/", vocabulary).matchers(1), [0])
    state = State(torch.tensor([text]), [0], [0])
    spent = []
    for count in range(1, len(text)):
        state.lengths[0] = count
        started = time.perf_counter()
        constraint.follow(state)
        constraint.fill([[]])
        assert constraint.allows(0, 0, text[count])
        spent.append(time.perf_counter() - started)
    benchmark.pedantic(lambda: None, rounds=1)
    assert constraint.applied == 0
    figure = 1e6 * statistics.mean(spent[10:])
    record("grammar_overhead_131k", figure, "<= 150", what="microseconds per token of parser, mask and test, 131,072 tokens, one row")
    assert figure <= 150
