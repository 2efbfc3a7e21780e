"""A grammar constrains any transformers model: texts follow it, whoever calls the processor and in whatever order."""

from __future__ import annotations

import copy
import json
import random
import re
import threading
from typing import Any

import numpy as np
import pytest
import torch
from grammar_cases import PROMPTS, SCHEMAS, bundled, complaint, grammar_of, tiny_decoded, tiny_vocabulary, written
from support import matrix
from transformers import LogitsProcessorList

from patchkit import Grammar, GrammarError
from patchkit.grammar.masks import allows, apply, mask_of, only_token
from patchkit.grammar.matcher import Matcher
from patchkit.grammar.vocabulary import vocabulary_of_bytes
from patchkit.speculation.constraint import Constraint
from patchkit.testing import tiny_model


def generated(name: str, prompts: list[str], **options: Any) -> tuple[torch.Tensor, int]:
    """Texts under the schema of this name, and the length of the padded prompts."""
    model, tokenizer = bundled()
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    given: dict[str, Any] = dict(max_new_tokens=160, do_sample=False, pad_token_id=0, logits_processor=[grammar_of(name)])
    return model.generate(**inputs, **given | options), inputs.input_ids.shape[1]


FAST = ("user", "call", "emoji", "quoted")


@pytest.mark.parametrize(("name", "prompts"), [(name, PROMPTS[:1]) for name in FAST] + [matrix(name, PROMPTS) for name in SCHEMAS])
def test_texts_parse_and_validate(name: str, prompts: tuple[str, ...]) -> None:
    for prompt in prompts:
        ids, start = generated(name, [prompt])
        value = json.loads(written(ids[0], start))
        assert complaint(value, SCHEMAS[name]) is None
        assert json.dumps(value, ensure_ascii=False) == written(ids[0], start)


@pytest.mark.parametrize("name", ["user", matrix("call"), matrix("any of")])
def test_sampled_texts_parse_and_validate(name: str) -> None:
    torch.manual_seed(0)
    ids, start = generated(name, [PROMPTS[0]] * 6, do_sample=True, temperature=1.5)
    for row in ids:
        assert complaint(json.loads(written(row, start)), SCHEMAS[name]) is None


def test_rows_of_a_batch_are_as_alone() -> None:
    ids, start = generated("user", list(PROMPTS))
    for row, prompt in enumerate(PROMPTS):
        alone, begin = generated("user", [prompt])
        assert written(ids[row], start) == written(alone[0], begin)


def test_one_grammar_per_row() -> None:
    names = ["user", "call", "colours", "string alone"]
    model, tokenizer = bundled()
    inputs = tokenizer([PROMPTS[0]] * 4, return_tensors="pt")
    grammar = Grammar.batch([grammar_of(name) for name in names])
    options: dict[str, Any] = dict(max_new_tokens=160, do_sample=False, pad_token_id=0, logits_processor=[grammar])
    ids = model.generate(**inputs, **options)
    for row, name in enumerate(names):
        alone, start = generated(name, [PROMPTS[0]])
        assert written(ids[row], start) == written(alone[0], start)
    with pytest.raises(GrammarError, match="4 grammars do not fit 3 rows"):
        model.generate(inputs.input_ids[:3], **options)


def test_beams_follow_the_grammar() -> None:
    for options in (dict(num_beams=3), dict(num_beams=4, num_return_sequences=4)):
        ids, start = generated("levels", list(PROMPTS[:2]), **options)
        for row in ids:
            assert complaint(json.loads(written(row, start)), SCHEMAS["levels"]) is None


@pytest.mark.parametrize("name", ["user", "call"])
def test_transformers_own_assisted_generation_gives_the_same_text(name: str) -> None:
    from patchkit.models import load_model

    wanted, _ = generated(name, [PROMPTS[0]])
    assert torch.equal(generated(name, [PROMPTS[0]], prompt_lookup_num_tokens=4)[0], wanted)
    assert torch.equal(generated(name, [PROMPTS[0]], assistant_model=load_model("stdlib-1m-draft")[0])[0], wanted)


def test_an_object_serves_many_calls_in_any_order() -> None:
    wanted = [generated("user", [prompt]) for prompt in PROMPTS[:2]]
    for prompt, (ids, _) in zip(PROMPTS[:2], wanted, strict=True):
        assert torch.equal(generated("user", [prompt])[0], ids)
    # A prompt that is the beginning of the last text, or all of it, is still a prompt.
    model, _tokenizer = bundled()
    ids, start = wanted[1]
    for length in (start + 5, ids.shape[1] - 1):
        prompt = ids[:, :length]
        longer = model.generate(prompt, max_new_tokens=160, do_sample=False, pad_token_id=0, logits_processor=[grammar_of("user")])
        assert complaint(json.loads(written(longer[0], length)), SCHEMAS["user"]) is None


def test_an_object_serves_two_models() -> None:
    from patchkit.models import load_model

    other, tokenizer = load_model("stdlib-1m-draft")
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    options: dict[str, Any] = dict(max_new_tokens=160, do_sample=False, pad_token_id=0)
    fresh = other.generate(**inputs, **options, logits_processor=[Grammar.json_schema(SCHEMAS["user"], tokenizer)])
    generated("user", [PROMPTS[0]])
    assert torch.equal(other.generate(**inputs, **options, logits_processor=[grammar_of("user")]), fresh)


def test_threads_do_not_mix() -> None:
    grammar = Grammar.regex(r"[a-e]{3,30}-[0-9]{4}", tiny_vocabulary())
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=0, logits_processor=[grammar])
    models = [tiny_model("llama", seed=seed) for seed in range(2)]
    wanted = [model.generate(ids, **options) for model in models]
    found: list[list[torch.Tensor]] = [[], []]

    def work(number: int) -> None:
        for _ in range(5):
            found[number].append(models[number].generate(ids, **options))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for texts, expected in zip(found, wanted, strict=True):
        assert len(texts) == 5 and all(torch.equal(each, expected) for each in texts)
    assert not grammar._runs._by_list, "a call of generate left its state behind"


def test_called_without_a_list_it_follows_the_tokens() -> None:
    grammar = Grammar.regex("ab?c", tiny_vocabulary())
    a, b, c = (tiny_vocabulary().tokens.tokenize_str(letter)[0] for letter in "abc")

    def allowed(*tokens: int) -> set[str]:
        scores = grammar(torch.tensor([[7, 9, *tokens]]), torch.zeros(1, 130))
        return {tiny_decoded([token]) for token in scores[0].isfinite().nonzero().flatten().tolist()}

    assert allowed() == {"a", "ab", "ac"} and allowed(a) == {"b", "c", "bc"}
    assert allowed(a, b) == {"c"} and allowed(a, b, c) == allowed(a, c) == {""}
    assert allowed() == {"a", "ab", "ac"}, "the prompt again begins again"


def test_a_matcher_that_is_moved_anywhere_is_as_a_new_one() -> None:
    """A random walk over prefixes of texts, end tokens and illegal tokens among them."""
    grammar = grammar_of("user")
    _model, _tokenizer = bundled()
    texts = [generated("user", [prompt]) for prompt in PROMPTS]
    walks = [ids[0, start:].tolist() for ids, start in texts]
    walks += [[*walks[0][:9], 0, 0, 5], [*walks[0][:20], 7, 7, 7], [0], [*walks[1], 0, 0]]
    moved, draws = Matcher(grammar.texts[0], grammar.vocabulary), random.Random(0)
    masks = np.zeros((2, grammar.vocabulary.words), dtype=np.int32)
    for _ in range(150):
        walk = draws.choice(walks)
        prefix = walk[: draws.randint(0, len(walk))]
        fresh = Matcher(grammar.texts[0], grammar.vocabulary)
        for matcher, mask in zip((moved, fresh), masks, strict=True):
            matcher.bring(prefix)
            matcher.fill(mask)
            matcher.forced(draws.randint(0, 4))
        assert np.array_equal(*masks) and moved.over == fresh.over


def test_forced_tokens_are_those_of_masks_with_one_bit() -> None:
    for name in ("call", "quoted", "unicode values"):
        matcher = Matcher(grammar_of(name).texts[0], grammar_of(name).vocabulary)
        mask = np.zeros(matcher.vocabulary.words, dtype=np.int32)
        run = matcher.forced(50)
        assert run
        for i, token in enumerate(run):
            matcher.bring(run[:i])
            matcher.fill(mask)
            assert only_token(mask) == token


def test_padding_ids_and_missing_ids() -> None:
    grammar = Grammar.regex(".*", tiny_vocabulary())
    scores = grammar(torch.tensor([[1, 2]]), torch.zeros(1, 200))
    assert scores[0, :128].isfinite().any() and not scores[0, 128:].isfinite().any()
    with pytest.raises(GrammarError, match="logits for 100 tokens and the tokenizer has 128"):
        grammar(torch.tensor([[1, 2]]), torch.zeros(1, 100))


def test_masks() -> None:
    mask = mask_of((0, 31, 32, 127), 4)
    assert [token for token in range(140) if allows(mask, token)] == [0, 31, 32, 127]
    assert [only_token(mask_of(tokens, 4)) for tokens in ((31,), (64,), (0, 1), (0, 127), ())] == [31, 64, None, None, None]
    scores = apply(torch.zeros(1, 130), mask[None], 128)
    assert scores[0].isfinite().nonzero().flatten().tolist() == [0, 31, 32, 127]


def test_only_masks_are_believed() -> None:
    """The parser takes bytes that the mask, which wants canonical tokens, forbids: both have to be seen for the difference to be tested."""
    grammar = grammar_of("call")
    matcher, mask = Matcher(grammar.texts[0], grammar.vocabulary), np.zeros(grammar.vocabulary.words, dtype=np.int32)
    opening = [grammar.vocabulary.tokens.tokenize_str(letter)[0] for letter in '{"']
    matcher.bring(opening)
    matcher.fill(mask)
    letter = grammar.vocabulary.tokens.tokenize_str("n")[0]
    assert matcher.parser.validate_tokens([letter]) == 1 and not allows(mask, letter)


def test_special_tokens_in_strings_are_text() -> None:
    model, tokenizer = bundled()
    schema = {"type": "object", "properties": {"end": {"const": "<|endoftext|>"}}, "required": ["end"], "additionalProperties": False}
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    start = inputs.input_ids.shape[1]
    for grammar, value in (
        (Grammar.json_schema(schema, tokenizer), '{"end": "<|endoftext|>"}'),
        (Grammar.regex(r"<\|endoftext\|>!", tokenizer), "<|endoftext|>!"),
        (Grammar.lark('start: "<|endoftext|>" "a"', tokenizer), "<|endoftext|>a"),
    ):
        ids = model.generate(**inputs, max_new_tokens=60, do_sample=False, pad_token_id=0, logits_processor=[grammar])
        assert ids[0, -1] == 0 and written(ids[0], start) == value


def test_tokens_that_were_added() -> None:
    tokenizer = copy.deepcopy(bundled()[1])
    tokenizer.add_tokens(["<call>", "<done>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    assert len(tokenizer) == tokenizer.vocab_size + 3
    grammar = Grammar.lark('start: "<call>" <|think|> "x"', tokenizer)
    matcher = Matcher(grammar.texts[0], grammar.vocabulary)
    assert grammar.vocabulary.size == len(tokenizer)
    x = tokenizer("x", add_special_tokens=False).input_ids
    assert matcher.forced(9) == [*tokenizer.convert_tokens_to_ids(["<call>", "<|think|>"]), *x]
    with pytest.raises(GrammarError, match="4096 tokens and the tokenizer has 4099"):
        bundled()[0].generate(torch.tensor([[5]]), max_new_tokens=3, pad_token_id=0, logits_processor=[grammar])


def test_other_forms() -> None:
    model, tokenizer = bundled()
    inputs = tokenizer("x = ", return_tensors="pt")
    start = inputs.input_ids.shape[1]
    ebnf = 'root ::= item (" or " item)?\nitem ::= [a-c] | "(" root ")"'
    for grammar, pattern in (
        (Grammar.regex("(yes|no), [a-z]{3,8}", tokenizer), "(yes|no), [a-z]{3,8}"),
        (Grammar.lark('start: WORD ("," WORD)~2\nWORD: /[a-z]{2,4}/', tokenizer), "[a-z]{2,4}(,[a-z]{2,4}){2}"),
        (Grammar.ebnf(ebnf, tokenizer), r"[a-c() or]+"),
        (Grammar.json_schema('{"enum": [1, 2]}', tokenizer), "[12]"),
    ):
        ids = model.generate(**inputs, max_new_tokens=80, do_sample=False, pad_token_id=0, logits_processor=[grammar])
        assert re.fullmatch(pattern, written(ids[0], start))


def test_any_json() -> None:
    model, tokenizer = bundled()
    inputs = tokenizer("x = [1, 2]\ny = ", return_tensors="pt")
    start, ended = inputs.input_ids.shape[1], 0
    torch.manual_seed(2)
    ids = model.generate(
        inputs.input_ids.expand(8, -1), max_new_tokens=60, do_sample=True, pad_token_id=0, logits_processor=[Grammar.json(tokenizer)]
    )
    for row in ids:
        if 0 in row[start:]:
            assert json.dumps(json.loads(written(row, start)))
            ended += 1
    assert ended


def test_copies_share_a_parser_until_they_are_many_or_one_fails() -> None:
    grammar = Grammar.regex("[ab]{2,9}", bundled()[1])

    def source() -> Matcher:
        return grammar.matchers(1)[0]._source

    first = source()
    assert all(source() is first for _ in range(9)) and copy.deepcopy(grammar).matchers(1)[0]._source is first
    assert Grammar.batch([grammar] * 2).matchers(2)[1]._source is first
    failing = grammar.matchers(1)[0]
    failing.parser.consume_token(bundled()[1]("z")["input_ids"][0])  # an error of the library
    with pytest.raises(GrammarError, match="llguidance stopped"):
        failing.check()
    second = source()
    assert second is not first and not second.failed
    assert {id(source()) for _ in range(200)} - {id(second)}


# Nearly each letter makes a new state for words of the library, which counts them for all parsers that share.
MANY_STATES = "[ab]*a[ab]{40}c"


def letters(length: int, seed: int) -> list[int]:
    chance = random.Random(seed)
    return [chance.choice([0, 1]) for _ in range(length)]


def test_what_other_copies_have_used_up_takes_nothing_from_a_text() -> None:
    grammar = Grammar.regex(MANY_STATES, vocabulary_of_bytes([b"a", b"b", b"c", b""], [3]))
    matchers = [grammar.matchers(1)[0] for _ in range(66)]
    first = matchers[0]._source
    mask = np.zeros(1, dtype=np.int32)
    for seed, matcher in enumerate(matchers):
        matcher.bring(letters(4000, seed))
        matcher.fill(mask)
        assert len(matcher.tokens) == 4000 and mask[0] & 3 == 3
    assert first.failed and grammar.matchers(1)[0]._source is not first  # a limit was met


def test_drafts_are_judged_though_other_copies_have_used_up_a_limit() -> None:
    vocabulary = vocabulary_of_bytes([b"a", b"b", b"c", b""], [3])
    made = Grammar.regex(MANY_STATES, vocabulary).matchers(100)
    source = made[0]._source

    def masks(matchers: list[Matcher], drafts: list[list[int]]) -> np.ndarray:
        constraint = Constraint(vocabulary, matchers, [0] * 4)
        assert constraint.fill(drafts) == [4000] * 4
        return constraint.masks

    for first in range(0, 100, 4):
        drafts = [letters(4000, first + row) for row in range(4)]
        found = masks(made[first : first + 4], drafts)
        if source.failed:  # a limit was met
            break
    assert source.failed and (found == masks([Matcher(source.grammar, vocabulary) for _ in drafts], drafts)).all()


def test_copies_and_lists() -> None:
    grammar = grammar_of("colours")
    again = copy.deepcopy(LogitsProcessorList([grammar]))
    wanted, _ = generated("colours", [PROMPTS[0]])
    assert torch.equal(generated("colours", [PROMPTS[0]], logits_processor=again)[0], wanted)
    assert "json_schema" in repr(grammar)
