"""Text from tokens: whole characters only, and nothing of a stop text, wherever tokens end."""

from __future__ import annotations

import random
from typing import Any

import pytest
from served import model_and_tokenizer

from patchkit.serving.shown import Detokenizer, ShownText

TEXTS = (
    "def f(x):\n    return x\n",
    "naïve café, 東京 🙂👍🏽 e\u0301",
    "   lead and trail   ",
    "\U0001f600" * 5,
    "\ufffd is a character, too \ufffd",
)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(text: str) -> None:
    tokenizer = model_and_tokenizer()[1]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    assert "".join(pieces) + detokenizer.finish() == text == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_a_long_text_at_constant_cost() -> None:
    tokenizer = model_and_tokenizer()[1]
    text = "".join(random.Random(1).choice(TEXTS[:3]) for _ in range(60))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    longest = 0

    class Counting:
        def decode(self, tokens: list[int], **kwargs: Any) -> str:
            nonlocal longest
            longest = max(longest, len(tokens))
            return tokenizer.decode(tokens, **kwargs)

    detokenizer = Detokenizer(Counting())
    assert "".join(map(detokenizer.push, ids)) + detokenizer.finish() == text
    assert longest < 12 and len(detokenizer._tokens) < 100 < len(ids)


def test_a_character_that_never_ends() -> None:
    tokenizer = model_and_tokenizer()[1]
    (first, *_) = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(first) == "" and "\ufffd" in detokenizer.finish()
    ids = [first] * 9 + tokenizer("done", add_special_tokens=False)["input_ids"]
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == tokenizer.decode(ids) and text.endswith("done")


@pytest.mark.parametrize("stray", [1, 2, 3, 4, 5])
def test_a_character_after_bytes_that_complete_nothing(stray: int) -> None:
    tokenizer = model_and_tokenizer()[1]
    whole = tokenizer("🙂€ done", add_special_tokens=False)["input_ids"]
    ids = [whole[0]] * stray + whole
    detokenizer = Detokenizer(tokenizer)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.finish()
    assert text == tokenizer.decode(ids) and text.endswith("🙂€ done")


def test_stop_texts_at_every_border() -> None:
    chance, text = random.Random(2), "one two three four"
    for stops in (["three"], ["ee f", "ree"], ["two three fou", "o th"], ["never"], ["r"]):
        first = min(
            (stop for stop in stops if stop in text), key=lambda stop: text.find(stop) + len(stop), default=None
        )  # that is complete
        expected = text if first is None else text[: text.find(first)]
        for _ in range(30):
            shown, out, rest = ShownText(stops), "", text
            while rest:
                size = chance.randint(1, 5)
                out += shown.push(rest[:size])
                rest = rest[size:]
                assert expected.startswith(out) and shown.length == len(out)
            assert out + shown.finish() == expected or (shown.stopped and out == expected)
            assert shown.stopped == (expected != text) and (not shown.stopped or shown.push("more") == "")
