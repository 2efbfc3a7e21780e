"""Draft models with another tokenizer than the target's: texts stay those of plain decoding, and drafts arrive where they belong."""

from __future__ import annotations

import inspect
import json
import random
from typing import Any

import pytest
import torch
from smollm2 import load_smollm2, needs_smollm2
from support import matrix
from tiny_tokenizers import byte_tokenizer

from patchkit import SpecError, parse_spec, patch_model, patched, report
from patchkit.errors import DraftError
from patchkit.patches.speculative import Speculative
from patchkit.speculation import Chain, DraftModel, PromptLookup, Scheduler, statistics_of
from patchkit.speculation.retokenized import Retokenized
from patchkit.speculation.row_caches import RowCaches
from patchkit.speculation.tokenizer_pair import TokenizerPair
from patchkit.testing import tiny_model

PLAIN = byte_tokenizer()
SHUFFLED = byte_tokenizer(seed=1, end="<done>")
WORDS = byte_tokenizer([("f", "u"), ("c", "t"), ("fu", "n"), ("i", "o"), ("io", "n"), ("ct", "ion"), ("fun", "ction"), ("Ġ", "Ġ")])
PAIRS = byte_tokenizer([("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ã", "©"), ("Ċ", "Ġ")], seed=2, end="<done>")


def model_for(tokenizer: Any, family: str = "llama", seed: int = 0, more: int = 0) -> Any:
    """A tiny model with the vocabulary of a tokenizer, and ``more`` tokens that it does not use."""
    model = tiny_model(family, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer) + more, mean_resizing=False)
        model.get_output_embeddings().weight.data.normal_()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def ascii_only(model: Any, tokenizer: Any) -> Any:
    """The model, which then writes no byte that is part of a longer character: only these are split alike by all byte tokenizers."""
    text = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    silent = [token for token, each in enumerate(text) if len(each) > 1 or not each.isascii() or not each.isprintable()]
    model.get_output_embeddings().weight.data[silent] = 0
    return model


def renamed(model: Any, tokenizer: Any, other: Any) -> Any:
    """The same model over the ids of another tokenizer with the same tokens."""
    draft = model_for(other)
    draft.load_state_dict(model.state_dict())
    ids = {token: other.get_vocab().get(token, other.eos_token_id) for token in tokenizer.get_vocab()}
    with torch.no_grad():
        for mine, theirs in ((model.get_input_embeddings(), draft.get_input_embeddings()), (model.lm_head, draft.lm_head)):
            for token, index in tokenizer.get_vocab().items():
                theirs.weight[ids[token]] = mine.weight[index]
    return draft


def prompts(rows: int) -> dict[str, torch.Tensor]:
    texts = ["def f(x):\n    return the function", "the", "a (b) the c", "x = 1 # the"][:rows]
    return dict(PLAIN(texts, return_tensors="pt", padding=True, padding_side="left")) if rows else {}


PLAIN.pad_token = PLAIN.eos_token


def text_of(model: Any, rows: int, new: int = 40, **options: Any) -> torch.Tensor:
    given = dict(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0) | options
    return model.generate(**{name: value for name, value in prompts(rows).items() if name != "token_type_ids"}, **given)


@pytest.mark.parametrize("rows", (1, 4))
@pytest.mark.parametrize("sampled", (False, True))
def test_the_same_model_under_other_ids_is_always_accepted(rows: int, sampled: bool) -> None:
    target = ascii_only(model_for(PLAIN), PLAIN)
    draft = DraftModel(renamed(target, PLAIN, SHUFFLED), tokenizer=PLAIN, draft_tokenizer=SHUFFLED)
    options: dict[str, Any] = dict(do_sample=True, temperature=0.7, suppress_tokens=_not_ascii()) if sampled else {}
    plain = text_of(target, rows)
    with patched(target, Speculative(draft=draft, k=4), verbose=False), torch.random.fork_rng():
        torch.manual_seed(0)
        text = text_of(target, rows, **options)
        assert sampled or torch.equal(text, plain)
        assert statistics_of(target).proposed > 0 and statistics_of(target).acceptance_rate > 0.99


def _not_ascii() -> list[int]:
    return [token for token in range(len(PLAIN)) if not (len(PLAIN.decode([token])) == 1 and PLAIN.decode([token]).isascii())]


# Random models write bytes that are no characters, or the beginnings of some; a draft of recurrent layers has a cache for each row.
@pytest.mark.parametrize(
    ("family", "draft_family", "rows"),
    [("llama", "gpt2", 4), ("gpt_neox", "qwen3_next", 3), ("qwen3_next", "llama", 1), ("bloom", "gemma3_text", 4)]
    + [matrix(family, other, rows) for family in ("mistral", "deepseek_v3") for other in ("bloom", "lfm2", "opt") for rows in (1, 3)],
)
def test_greedy_text_is_the_same(family: str, draft_family: str, rows: int) -> None:
    target, draft = model_for(PLAIN, family), model_for(PAIRS, draft_family, seed=3)
    wanted = text_of(target, rows)
    ends = sorted({int(row[-9]) for row in wanted})
    ended = text_of(target, rows, eos_token_id=ends)
    with patched(target, Speculative(draft=DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PAIRS), k=4), verbose=False):
        assert torch.equal(text_of(target, rows), wanted)
        assert statistics_of(target).proposed > 0
        assert torch.equal(text_of(target, rows, eos_token_id=ends), ended)


def test_a_draft_with_a_window_serves_a_batch() -> None:
    target, draft = model_for(PLAIN), patch_model(model_for(PAIRS, seed=3), "streaming(sinks=2, window=12)", verbose=False)
    wanted = text_of(target, 3)
    with patched(target, Speculative(draft=DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PAIRS, context=10), k=3), verbose=False):
        assert torch.equal(text_of(target, 3), wanted) and statistics_of(target).proposed > 0


@pytest.mark.parametrize("family", ("llama", "qwen3_next"))
def test_rows_that_join_a_batch_get_their_drafts(family: str) -> None:
    target, draft = model_for(PLAIN), model_for(PAIRS, family, seed=3)
    options: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    texts = [torch.tensor([PLAIN(text)["input_ids"]]) for text in ("def f(x):", "the", "a (b) the c", "x = 1 # the", "y")]
    lengths = (12, 30, 9, 25, 16)
    wanted = [target.generate(ids, max_new_tokens=new, **options)[0] for ids, new in zip(texts, lengths, strict=True)]
    drafter = DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PAIRS)
    with patched(target, Speculative(draft=drafter, k=3), verbose=False):
        scheduler = Scheduler(target, slots=3)
        rows = [scheduler.submit(ids, max_new_tokens=new, **options) for ids, new in zip(texts, lengths, strict=True)]
        scheduler.run()
        assert [row.new for row in rows] == [each[ids.shape[1] :].tolist() for ids, each in zip(texts, wanted, strict=True)]
        assert statistics_of(target).proposed > 0


def test_a_seed_gives_the_same_text_with_deterministic_drafts() -> None:
    target, draft = model_for(PLAIN), model_for(PAIRS, seed=3)
    drafter = DraftModel(draft, sample=False, tokenizer=PLAIN, draft_tokenizer=PAIRS)
    texts = []
    for patch in ("none", Speculative(draft=drafter, k=3)):
        with patched(target, patch, verbose=False), torch.random.fork_rng():
            torch.manual_seed(5)
            texts.append(text_of(target, 1, do_sample=True, temperature=0.9))
    assert torch.equal(*texts)


def test_stop_strings_and_processors_end_and_change_the_same_text() -> None:
    target, draft = model_for(PLAIN), model_for(PAIRS, seed=3)
    plain = text_of(target, 1)
    stop = next(text for at in range(-12, -2) if (text := PLAIN.decode(plain[0, at : at + 1])).isascii())
    for options in (dict(stop_strings=[stop], tokenizer=PLAIN), dict(repetition_penalty=1.3)):
        wanted = text_of(target, 1, **options)
        assert not torch.equal(wanted, plain)
        with patched(target, Speculative(draft=DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PAIRS), k=4), verbose=False):
            assert torch.equal(text_of(target, 1, **options), wanted)


def test_a_processor_that_allows_only_a_token_which_the_draft_lacks() -> None:
    target, draft = model_for(WORDS), model_for(PAIRS, seed=3)
    only = WORDS.get_vocab()["function"]
    drafter = DraftModel(draft, tokenizer=WORDS, draft_tokenizer=PAIRS)
    with patched(target, Speculative(draft=drafter, k=3), verbose=False):
        ids = torch.tensor([WORDS("the f")["input_ids"]])
        text = target.generate(ids, max_new_tokens=6, do_sample=True, prefix_allowed_tokens_fn=lambda row, seen: [only])
        assert text[0, ids.shape[1] :].tolist() == [only] * 6


def test_one_tokenizer_with_padded_vocabularies_needs_no_translation() -> None:
    for more, drafts_more in ((0, 60), (60, 0)):
        target, draft = model_for(PLAIN, more=more), model_for(PLAIN, more=drafts_more)
        draft.load_state_dict({name: value for name, value in target.state_dict().items() if value.shape == draft.state_dict()[name].shape},
                              strict=False)  # fmt: skip
        size = len(PLAIN)
        for mine, theirs in ((target.model.embed_tokens, draft.model.embed_tokens), (target.lm_head, draft.lm_head)):
            theirs.weight.data[:size] = mine.weight.data[:size]
            for each in (mine, theirs):
                each.weight.data[size:] = 0
        wanted = text_of(target, 2)
        drafter = DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PLAIN)
        with patched(target, Speculative(draft=drafter, k=3), verbose=False):
            assert torch.equal(text_of(target, 2), wanted) and statistics_of(target).acceptance_rate == 1
            text_of(target, 2, do_sample=True)
            assert "re-tokenized" not in str(report(target))


# -- tokens ----------------------------------------------------------------------------------------------------------------


def pair_of(target: Any = WORDS, draft: Any = PAIRS) -> TokenizerPair:
    return TokenizerPair(target, draft, model_for(target), model_for(draft))


@pytest.mark.parametrize(
    ("known", "drafted", "wanted"),
    [
        ("the ", "function the", ["function", "Ġ", "t", "h", "e"]),
        ("the fun", "ction", ["ction"]),  # "function" would span the place
        ("x ", " y", ["Ġ", "y"]),  # so would two spaces
        ("caf", "é", ["Ã", "©"]),
        ("the", "", []),
    ],
)
def test_drafts_are_split_as_the_target_would(known: str, drafted: str, wanted: list[str]) -> None:
    found = pair_of().continuation(WORDS(known)["input_ids"], PAIRS(known)["input_ids"], PAIRS(drafted)["input_ids"] if drafted else [])
    assert WORDS.convert_ids_to_tokens(found) == wanted


def test_drafts_end_with_the_end_of_a_text_and_before_half_a_character() -> None:
    pair, known = pair_of(PLAIN, PAIRS), "the"
    before = PLAIN(known)["input_ids"], PAIRS(known)["input_ids"]
    done, letters = PAIRS.eos_token_id, PAIRS("ab")["input_ids"]
    assert pair.ends(done) and not pair.ends(letters[0])
    assert PLAIN.convert_ids_to_tokens(pair.continuation(*before, [*letters, done, *letters])) == ["a", "b", "<end>"]
    half = PAIRS("日")["input_ids"][:2]
    assert PLAIN.convert_ids_to_tokens(pair.continuation(*before, [*letters, *half])) == ["a", "b"]
    assert pair.continuation(*before, half) == []
    assert PLAIN.convert_ids_to_tokens(pair.continuation(*before, [*half, *letters])) == []


def test_shared_tokens_have_the_same_text() -> None:
    pair = pair_of()
    shared = [(token, int(other)) for token, other in enumerate(pair.shared) if other >= 0]
    assert len(shared) == 257  # all bytes; "<end>" and "<done>" both end a text; two spaces and words are not shared
    assert all(WORDS.decode([token]) == PAIRS.decode([other]) for token, other in shared if token != WORDS.eos_token_id)
    assert (WORDS.eos_token_id, PAIRS.eos_token_id) in shared
    assert "<end>" not in pair.text([WORDS.eos_token_id, *WORDS("a")["input_ids"]])


def test_a_growing_text_is_tokenized_as_a_whole() -> None:
    text = inspect.getsource(json.JSONDecoder) + "é日🙂 the function" * 20
    tokens, rng = WORDS(text)["input_ids"], random.Random(0)
    grown, pair, at, read = Retokenized(pair_of()), pair_of(), 0, []
    pair.read = lambda text, read=pair.read, seen=read: seen.append(len(text)) or read(text)  # type: ignore[method-assign]
    grown.pair = pair
    while at < len(tokens):
        new = tokens[at : at + rng.randint(1, 30)]
        grown.extend(new)
        at += len(new)
        whole = WORDS.decode(tokens[:at])
        assert grown.complete == (not whole.endswith("\ufffd"))
        assert grown.ids == PAIRS(whole.rstrip("\ufffd"))["input_ids"]
    assert len(tokens) > 2000 and max(read) < 1000  # only its end is tokenized again


# -- caches ----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", ("llama", "qwen3_next", "gemma3_text"))
def test_caches_follow_texts_whose_end_changes(family: str) -> None:
    model, rng = tiny_model(family), random.Random(0)
    own_rows = family == "qwen3_next"
    caches = RowCaches(model, 3, own=False, ragged=not own_rows)
    assert len(caches.caches) == (3 if own_rows else 1)
    ids = [[rng.randrange(3, 128) for _ in range(20 + 7 * row)] for row in range(3)]
    forward = model.forward
    for step in range(14):
        for row in ids:
            back = rng.randrange(0, 12 if step == 9 else 4)  # further back than what is held
            del row[max(len(row) - back, 3) :]
            row += [rng.randrange(3, 128) for _ in range(rng.randint(1, 6))]
        if step == 5:
            caches.select_rows([0, 2])
            ids = [ids[0], ids[2]]
        if step == 7:
            other = RowCaches(model, 1, own=False, ragged=not own_rows)
            other.feed([[5, 9, 4, 7, 11]])
            caches.join(other)
            ids.append([5, 9, 4, 7, 11])
        found = caches.feed(ids)
        for row, drafted in zip(found, ids, strict=True):
            assert torch.allclose(row, forward(torch.tensor([drafted])).logits[0, -1], atol=1e-4)
        drafts = [[rng.randrange(3, 128)] for _ in ids]
        more = caches.append(drafts)
        for row, drafted, draft in zip(more, ids, drafts, strict=True):
            assert torch.allclose(row, forward(torch.tensor([drafted + draft])).logits[0, -1], atol=1e-4)


# -- options ---------------------------------------------------------------------------------------------------------------


def test_unknown_tokenizers_are_refused_with_the_remedy() -> None:
    target, draft = model_for(PLAIN), model_for(PAIRS)
    foreign = byte_tokenizer()
    foreign.get_vocab = lambda: {f"#{token}": index for token, index in PLAIN.get_vocab().items()}  # type: ignore[method-assign]
    for options, message in (
        ({}, r"give DraftModel\(\.\.\., tokenizer=\) the target's"),
        (dict(tokenizer=PLAIN), r"give DraftModel\(\.\.\., draft_tokenizer=\) the draft's"),
        (dict(tokenizer=PLAIN, draft_tokenizer=foreign), "no token in common"),
    ):
        with pytest.raises(DraftError, match=message):
            patch_model(target, Speculative(draft=DraftModel(draft, **options)))
    for options in (dict(tokenizer=3), dict(draft_tokenizer=[])):
        with pytest.raises(TypeError, match="tokenizer"):
            DraftModel(draft, **options)
    with pytest.raises(SpecError, match="model"):
        parse_spec("speculative(draft=draft_model)")


def test_the_report_says_that_drafts_are_re_tokenized() -> None:
    target, draft = model_for(PLAIN), model_for(PAIRS)
    drafter = Chain((PromptLookup(), DraftModel(draft, tokenizer=PLAIN, draft_tokenizer=PAIRS)))
    with patched(target, Speculative(draft=drafter), verbose=False):
        assert "re-tokenized in every round" in str(report(target)) and "slower" in str(report(target))


@needs_smollm2
def test_the_bundled_model_drafts_for_smollm2() -> None:
    model, tokenizer = load_smollm2()
    ids = tokenizer("class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n", return_tensors="pt")
    wanted = model.generate(**ids, max_new_tokens=24, do_sample=False)
    with patched(model, "speculative(draft=draft_model('stdlib-7m'), k=4)", verbose=False):
        assert torch.equal(model.generate(**ids, max_new_tokens=24, do_sample=False), wanted)
        assert statistics_of(model).accepted >= 6
