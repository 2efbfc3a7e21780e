"""Sampled text has the distribution of plain sampling, whatever drafts: chi-square over 50,000 texts of three tokens (the bar), or 8,000.

The exact probabilities come from plain forwards and a top-p of this file's own.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import matrix
from tiny_tokenizers import letter_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from patchkit import patched
from patchkit.patches.speculative import Speculative
from patchkit.speculation import statistics_of
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.drafters.token_recycling import TokenRecycling

VOCABULARY, PROMPT = 6, (1, 2, 3, 1, 2, 4, 1, 2)
TEXTS, FEW_TEXTS = 50_000, 8_000


def small_model(seed: int, spread: float = 0.4, size: int = VOCABULARY) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=spread,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


@functools.cache
def exact(temperature: float, top_p: float) -> dict[tuple[int, int, int], float]:
    """The probability of every text of three tokens."""
    model = small_model(0)
    prefixes = [(*PROMPT, *text) for text in itertools.product(range(VOCABULARY), repeat=2)]
    with torch.no_grad():
        logits = model(torch.tensor(prefixes)).logits[:, len(PROMPT) - 1 :].double() / temperature
    result = {}
    for prefix, rows in zip(prefixes, logits, strict=True):
        steps = [kept(row.softmax(-1).tolist(), top_p) for row in rows]
        first, second = prefix[-2:]
        for third in range(VOCABULARY):
            result[first, second, third] = steps[0][first] * steps[1][second] * steps[2][third]
    return result


def kept(probabilities: list[float], top_p: float) -> list[float]:
    """The smallest set of most likely tokens that holds at least ``top_p``, normalised."""
    order = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    total, chosen = 0.0, []
    for token in order:
        if total >= top_p:
            break
        chosen.append(token)
        total += probabilities[token]
    return [probability / total if token in chosen else 0.0 for token, probability in enumerate(probabilities)]


def chi_square_excess(counts: Counter[tuple[int, ...]], probabilities: dict[tuple[int, int, int], float]) -> float:
    """How many standard deviations chi-square is above its mean; cells that expect fewer than 10 are one cell."""
    total = sum(counts.values())
    statistic = rare_seen = rare_expected = 0.0
    cells = 0
    for text, probability in probabilities.items():
        expected, seen = probability * total, counts[text]
        if expected >= 10:
            statistic, cells = statistic + (seen - expected) ** 2 / expected, cells + 1
        else:
            rare_seen, rare_expected = rare_seen + seen, rare_expected + expected
    if rare_expected >= 1:
        statistic, cells = statistic + (rare_seen - rare_expected) ** 2 / rare_expected, cells + 1
    elif rare_seen > 20:
        return float("inf")
    freedom = cells - 1
    return (statistic - freedom) / (2 * freedom) ** 0.5


def drawn_texts(draft: Any, temperature: float, top_p: float, texts: int, **options: Any) -> tuple[Counter[tuple[int, ...]], Any]:
    model = small_model(0)
    counts: Counter[tuple[int, ...]] = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with patched(model, Speculative(draft=draft(), k=2, **options), verbose=False):
            for _ in range(texts // 1000):
                drawn = model.generate(
                    torch.tensor([PROMPT] * 1000),
                    max_new_tokens=4,
                    do_sample=True,
                    temperature=temperature,
                    top_p=top_p,
                    top_k=0,
                    eos_token_id=None,
                )
                counts.update(map(tuple, drawn[:, len(PROMPT) : len(PROMPT) + 3].tolist()))
            return counts, statistics_of(model)


def other_tokenizer(sample: bool) -> DraftModel:
    """A draft that lacks one of the target's tokens, has two others, and has the rest in another order."""
    draft = small_model(3, size=VOCABULARY + 1)
    return DraftModel(draft, sample=sample, tokenizer=letter_tokenizer("?abcde"), draft_tokenizer=letter_tokenizer("?cbadXY"))


# Functions that make a drafter, or its spec string; of every drafter that spec strings can name its example.
DRAFTERS: dict[str, Callable[[], Any]] = {
    "another model": lambda: DraftModel(small_model(1)),
    "another model, deterministic": lambda: DraftModel(small_model(1), sample=False),
    "another tokenizer": lambda: other_tokenizer(sample=True),
    "another tokenizer, deterministic": lambda: other_tokenizer(sample=False),
    **{
        name: functools.partial(str, cls.example)
        for name, cls in Drafter.available().items()
        if cls.__module__.startswith("patchkit.") and cls.any_model
    },
}


SETTINGS = [(1.0, 1.0), (0.7, 0.9), (1.5, 0.7)]
WHOLE = [
    matrix(drafter, temperature, top_p, TEXTS)
    for drafter in DRAFTERS
    for temperature, top_p in (SETTINGS if drafter in ("another model", "medusa", "eagle") else [(0.8, 0.95)])
]
# Drafts that are drawn, by a second model and by heads, and drafts that are chosen, from the text and as trees.
FAST = [
    ("another model", 0.7, 0.9, FEW_TEXTS),
    ("another tokenizer", 0.7, 0.9, FEW_TEXTS),
    ("medusa", 1.0, 1.0, FEW_TEXTS),
    ("prompt_lookup", 0.8, 0.95, FEW_TEXTS),
    ("token_recycling", 0.8, 0.95, FEW_TEXTS),
]


@pytest.mark.parametrize(("drafter", "temperature", "top_p", "texts"), FAST + WHOLE)
def test_texts_have_the_distribution_of_plain_sampling(drafter: str, temperature: float, top_p: float, texts: int) -> None:
    counts, run = drawn_texts(DRAFTERS[drafter], temperature, top_p, texts)
    assert sum(counts.values()) == texts and 0.02 < run.acceptance_rate < 0.98
    assert chi_square_excess(counts, exact(temperature, top_p)) < 4


# The excess grows with the number of texts and the square of the distortion.
@pytest.mark.parametrize(("texts", "temperature"), [(FEW_TEXTS, 0.92), matrix(TEXTS, 0.97)])
def test_a_lossy_policy_and_a_wrong_distribution_are_noticed(texts: int, temperature: float) -> None:
    counts, _ = drawn_texts(DRAFTERS["another model"], 1.0, 1.0, texts, acceptance=f"topk_agree({VOCABULARY})")
    assert chi_square_excess(counts, exact(1.0, 1.0)) > 20
    counts, _ = drawn_texts(DRAFTERS["another model"], 1.0, 1.0, texts)
    assert chi_square_excess(counts, exact(temperature, 1.0)) > 4


@pytest.mark.parametrize("batches", [150, matrix(400)])
def test_rows_that_advance_together_do_not_end_too_often(batches: int) -> None:
    """In an aligned batch a row may be cut back behind an end that it drew; keeping just the ends would make them likelier."""
    model, end = small_model(0), 4
    counts: Counter[tuple[int, ...]] = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        draft = Speculative(draft=DraftModel(small_model(1)), k=2)
        with patched(model, "streaming(sinks=1, window=60)", draft, verbose=False):
            for _ in range(batches):
                texts = model.generate(torch.tensor([PROMPT] * 16), max_new_tokens=4, do_sample=True, top_k=0, eos_token_id=end)
                counts.update(map(tuple, texts[:, len(PROMPT) : len(PROMPT) + 3].tolist()))
    wanted: dict[tuple[int, int, int], float] = {}
    for text, probability in exact(1.0, 1.0).items():
        ended = text[: text.index(end) + 1] if end in text else text
        key = (*ended, 0, 0)[:3]
        wanted[key] = wanted.get(key, 0.0) + probability
    short = {key: value for key, value in wanted.items() if key[0] != end}
    kept_counts = Counter({key: count for key, count in counts.items() if key[0] != end})
    total = sum(short.values())
    assert chi_square_excess(kept_counts, {key: value / total for key, value in short.items()}) < 4


def test_one_text_alone_has_the_distribution_too() -> None:
    """A batch is judged at once; a single text with a processor that looks at it, token by token."""
    model = small_model(0)
    first: Counter[int] = Counter()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        options = dict(do_sample=True, top_k=0, eos_token_id=None, repetition_penalty=1.0001, max_new_tokens=3)
        with patched(model, Speculative(draft=DraftModel(small_model(1)), k=1), verbose=False):
            for _ in range(20):
                texts = model.generate(torch.tensor([PROMPT] * 100), **options)
                first.update(texts[:, len(PROMPT) + 1].tolist())
    second = [sum(p for text, p in exact(1.0, 1.0).items() if text[1] == token) for token in range(VOCABULARY)]
    excess = statistics.fmean((first[token] - 2000 * p) ** 2 / (2000 * p) for token, p in enumerate(second))
    assert excess < 4


@pytest.mark.parametrize("draft", [lambda: PromptLookup(min_ngram=1), lambda: DraftModel(small_model(1), sample=False), TokenRecycling])
def test_a_seed_gives_the_same_text_with_deterministic_drafts(draft: Callable[[], Any]) -> None:
    model = small_model(0)
    options = dict(do_sample=True, temperature=0.9, top_p=0.9, max_new_tokens=60, eos_token_id=None)

    def text(seed: int) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return model.generate(torch.tensor([PROMPT]), **options)

    plain = [text(seed) for seed in range(5)]
    with patched(model, Speculative(draft=draft(), k=3), verbose=False):
        assert all(torch.equal(text(seed), plain[seed]) for seed in range(5))
        assert statistics_of(model).accepted > 0
