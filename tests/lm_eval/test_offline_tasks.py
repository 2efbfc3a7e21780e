from __future__ import annotations

import re

import pytest

pytest.importorskip("datasets")
from patchkit.lm_eval import offline_tasks
from patchkit.measure.stdlib_text import read_texts, stdlib_files
from patchkit.models import load_tokenizer

HELDOUT = list(read_texts(stdlib_files("heldout")))


def test_streamed_texts_are_held_out_and_of_one_length() -> None:
    documents = offline_tasks.perplexity(documents=5, characters=6000)["test"]["text"]
    assert len(set(documents)) == 5
    assert all(5700 < len(text) <= 6000 and any(whole.startswith(text) for whole in HELDOUT) for text in documents)
    with pytest.raises(ValueError, match="documents=100000"):
        offline_tasks.perplexity(documents=100_000)


@pytest.mark.parametrize("distance", [30, 200, 450])
@pytest.mark.parametrize("task", ["passkey", "key_value", "copy"])
def test_what_is_asked_for_was_said_at_its_distance_in_tokens(task: str, distance: int) -> None:
    tokenizer = load_tokenizer("bundled")
    made = getattr(offline_tasks, task)(distance=distance, documents=6, tokens=540, pretrained="bundled", dtype="ignored")["test"]
    assert len({document["text"] for document in made}) == 6
    for document in made:
        text = document["text"]
        asked = text[text.rfind("\n") + 1 :]
        said = ", ".join(document["target"].split())
        last = text.rfind(f"{asked} {said}" if task != "passkey" else f"{asked}{said}", 0, len(text) - len(asked))
        between = len(tokenizer(text[last:])["input_ids"])
        assert last >= 0 and -70 < between - distance < 80
        assert 440 < len(tokenizer(text)["input_ids"]) < 640


def test_the_identifier_was_written_before_and_not_nearer() -> None:
    for nearest, farthest in ((0, 400), (1000, 1800)):
        for document in offline_tasks.cloze(nearest=nearest, farthest=farthest, documents=4)["test"]:
            before, word = document["text"], document["target"]
            last = max(match.start() for match in re.finditer(rf"\b{word}\b", before))
            assert nearest <= len(before) - last < farthest


def test_seeds_and_distances_give_other_documents() -> None:
    first, same, other = (offline_tasks.passkey(60, seed=seed, tokenizer="bundled")["test"]["text"] for seed in (0, 0, 1))
    assert first == same and not set(first) & set(other)
    with pytest.raises(ValueError, match="distance=540"):
        offline_tasks.passkey(distance=540, tokens=540, tokenizer="bundled")


def test_distances_need_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        offline_tasks.passkey(distance=60)


def test_scores() -> None:
    document = {"text": "ä", "target": "one two three four"}
    assert offline_tasks.share_of_words(document, [" one, two, four"]) == {"acc": 0.5}
    assert offline_tasks.share_of_words(document, [""]) == {"acc": 0.0}
    assert offline_tasks.bits_per_byte(document, [-1.3862943611198906]) == {
        "bits_per_byte": pytest.approx(1.0),
        "byte_perplexity": (-1.3862943611198906, 2),
    }
