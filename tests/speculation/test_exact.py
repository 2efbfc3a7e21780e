"""Speculative text is the text of plain decoding, token by token, whatever drafts.

The bar is every family with every drafter over 200 new tokens, and 50 prompts x 256 tokens: the matrix. The fast layer has every
family and every drafter once, over 52.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from speculation import FEW, NEW, Bush, Silent, always, plain_text, text_of, told
from support import matrix

from patchkit import patched
from patchkit.patches.speculative import Speculative
from patchkit.speculation import statistics_of
from patchkit.speculation.drafter import Drafter
from patchkit.speculation.drafters.chain import Chain
from patchkit.speculation.drafters.draft_model import DraftModel
from patchkit.speculation.drafters.eagle import Eagle
from patchkit.speculation.drafters.medusa import Medusa
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.drafters.self_draft import SelfDraft
from patchkit.testing import tiny_model

# Rotary, partial rotary, windows in some and in all layers, experts, latent attention, ALiBi, learned positions, recurrent states.
FAMILIES = ("llama", "gpt_neox", "gemma3_text", "mistral", "mixtral", "deepseek_v3", "bloom", "opt", "qwen3_next", "falcon")
STREAMED = ("llama", "gpt_neox", "gemma3_text", "mixtral", "deepseek_v3", "glm", "cohere2", "gpt_oss")

# The example of every drafter that spec strings can name, and other options; a drafter, its spec string, or a function that makes one.
DRAFTERS: dict[str, Any] = {
    "another model": lambda: DraftModel(tiny_model("llama", seed=7)),
    **{name: cls.example for name, cls in Drafter.available().items() if cls.__module__.startswith("patchkit.") and cls.any_model},
    "window": SelfDraft("streaming(sinks=1, window=6)"),
    "int8": SelfDraft("mlp_int8(mode=weight_only)"),
    "medusa tree": Medusa(n_heads=2, init="tie", tree=((0,), (1,), (0, 0), (0, 1), (1, 0))),
    "chain": Chain((PromptLookup(), Eagle())),
}


def in_turns(families: Sequence[str], drafters: Sequence[str]) -> Iterator[Any]:
    """Every family with every drafter, alone or as four rows by turns, so that each family and each drafter meets both.

    And the fast ones: as many pairs as there are families or drafters, alone or as four rows by turns.
    """
    for i in range(max(len(families), len(drafters))):
        yield families[i % len(families)], drafters[i % len(drafters)], (1, 4)[i % 2], FEW
    for row, family in enumerate(families):
        for column, drafter in enumerate(drafters):
            yield matrix(family, drafter, (1, 4)[(row + column) % 2], NEW)


def speculate_like_plain(family: str, draft: Any, batch: int, new: int, streaming: bool = False) -> Any:
    """Generate with ``draft``, compare with plain text, and return the statistics."""
    model = tiny_model(family)
    patches = [Speculative(draft=draft() if callable(draft) else draft, k=4), *(["streaming(sinks=2, window=10)"] if streaming else [])]
    with patched(model, *patches, verbose=False):
        text = text_of(model, batch, new)
        statistics = statistics_of(model)
    assert torch.equal(text, plain_text(family, batch, streaming, new))
    assert statistics.proposed > 0
    assert sum(step.emitted for step in statistics.steps) == batch * (new - 1)
    return statistics


@pytest.mark.parametrize(("family", "drafter", "batch", "new"), list(in_turns(FAMILIES, [name for name in DRAFTERS if name != "window"])))
def test_greedy_text_is_the_same(family: str, drafter: str, batch: int, new: int) -> None:
    speculate_like_plain(family, DRAFTERS[drafter], batch, new)


@pytest.mark.parametrize(
    ("family", "drafter", "batch", "new"),
    list(in_turns(STREAMED, ("another model", "prompt_lookup", "window", "medusa", "eagle", "token_recycling"))),
)
def test_greedy_text_of_a_stream_is_the_same(family: str, drafter: str, batch: int, new: int) -> None:
    speculate_like_plain(family, DRAFTERS[drafter], batch, new, streaming=True)


@pytest.mark.parametrize(
    ("family", "batch", "new"),
    [("llama", 1, FEW), ("gemma3_text", 4, FEW), ("deepseek_v3", 4, FEW), ("qwen3_next", 1, FEW)]
    + [matrix(family, batch, NEW) for family in FAMILIES for batch in (1, 4)],
)
def test_the_same_model_is_always_accepted(family: str, batch: int, new: int) -> None:
    statistics = speculate_like_plain(family, lambda: DraftModel(tiny_model(family)), batch, new)
    assert statistics.acceptance_rate >= (0.97 if batch == 1 or family not in ("qwen3_next", "falcon", "lfm2") else 0.9)


@pytest.mark.parametrize("streaming", (False, True))
@pytest.mark.parametrize(("batch", "new"), [(1, FEW), (4, FEW), matrix(1, NEW), matrix(4, NEW)])
def test_drafts_with_a_known_answer(batch: int, new: int, streaming: bool) -> None:
    text = plain_text("llama", batch, streaming, new)
    right = speculate_like_plain("llama", told(text), batch, new, streaming)
    assert right.acceptance_rate == 1 and right.tokens_per_target_step > 4.5
    wrong = speculate_like_plain("llama", told(text, shift=1), batch, new, streaming)
    assert wrong.acceptance_rate == 0 and wrong.tokens_per_target_step == 1


def test_a_silent_drafter_gives_plain_steps() -> None:
    model = tiny_model("llama")
    with patched(model, Speculative(draft=Silent(), k=4), verbose=False):
        assert torch.equal(text_of(model, 2, FEW), plain_text("llama", 2, new=FEW))
        assert statistics_of(model).proposed == 0 and statistics_of(model).tokens_per_target_step == 1


@pytest.mark.parametrize(
    ("family", "batch", "new"),
    [("llama", 4, FEW), ("gemma3_text", 1, FEW), ("deepseek_v3", 1, FEW), ("bloom", 4, FEW)]
    + [matrix(family, batch, NEW) for family in ("llama", "gemma3_text", "mistral", "bloom", "gpt2", "deepseek_v3") for batch in (1, 4)],
)
def test_a_tree_is_walked_to_its_right_leaf(family: str, batch: int, new: int) -> None:
    text = plain_text(family, batch, new=new)
    model = tiny_model(family)
    with patched(model, Speculative(draft=Bush(text), k=8), verbose=False):
        assert torch.equal(text_of(model, batch, new), text)
        # 4 right nodes under 4 wrong ones, and the token after them; at the end of a text there is room for fewer.
        assert statistics_of(model).tokens_per_target_step > (4.5 if new == NEW else 4)


@pytest.mark.parametrize("batch", (1, 4))
def test_rows_that_end_inside_a_draft(batch: int) -> None:
    model = tiny_model("llama")
    plain = plain_text("llama", batch, new=FEW)
    ends = sorted({int(row[20 + 3 * i]) for i, row in enumerate(plain)})
    wanted = text_of(model, batch, FEW, eos_token_id=ends)
    assert wanted.shape[1] < plain.shape[1]
    for draft in (told(plain), always(ends[0]), DraftModel(tiny_model("llama", seed=7)), PromptLookup(min_ngram=1)):
        with patched(model, Speculative(draft=draft, k=5), verbose=False):
            assert torch.equal(text_of(model, batch, FEW, eos_token_id=ends), wanted)


def test_finished_rows_leave_the_batch() -> None:
    model = tiny_model("llama")
    ends = [int(plain_text("llama", 4, new=FEW)[0, 20])]
    with patched(model, Speculative(draft=PromptLookup(min_ngram=1), k=2), verbose=False):
        text_of(model, 4, FEW, eos_token_id=ends)
        rows = [step.rows for step in statistics_of(model).steps]
    assert rows[0] == 4 and rows[-1] < 4 and rows == sorted(rows, reverse=True)


@pytest.mark.parametrize(("draft", "least"), [("stdlib-1m-draft", 1.5), ("eagle", 2.5), ("eagle(tree=chain, heads=bundled)", 2.2)])
@pytest.mark.parametrize(("count", "new"), [(3, 64), matrix(50, 256)])
def test_prompts_of_the_bundled_models(count: int, new: int, draft: str, least: float) -> None:
    from patchkit.measure.stdlib_text import read_texts, stdlib_files
    from patchkit.models import load_model

    target, tokenizer = load_model("stdlib-7m")
    texts = [ids for text in read_texts(stdlib_files("heldout")) if len(ids := tokenizer(text).input_ids) >= 96][:count]
    assert len(texts) == count
    prompts = torch.tensor([ids[:64] for ids in texts])
    options = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = target.generate(input_ids=prompts, **options)
    with patched(target, Speculative(draft=draft, k=3), verbose=False):
        got = target.generate(input_ids=prompts, **options)
        assert statistics_of(target).tokens_per_target_step > least
    assert torch.equal(got, wanted)
