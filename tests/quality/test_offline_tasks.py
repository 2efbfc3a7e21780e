from __future__ import annotations

import re

import pytest

pytest.importorskip("datasets")
from patchkit.quality import offline_tasks
from patchkit.quality.stdlib_text import read_texts, stdlib_files

HELDOUT = list(read_texts(stdlib_files("heldout")))


def test_streamed_texts_are_held_out_and_of_one_length() -> None:
    documents = offline_tasks.perplexity(documents=5, characters=6000)["test"]["text"]
    assert len(set(documents)) == 5
    assert all(5700 < len(text) <= 6000 and any(whole.startswith(text) for whole in HELDOUT) for text in documents)
    with pytest.raises(ValueError, match="documents=100000"):
        offline_tasks.perplexity(documents=100_000)


@pytest.mark.parametrize("distance", [100, 700, 1500])
@pytest.mark.parametrize("task", ["passkey", "key_value", "copy"])
def test_what_is_asked_for_was_said_at_its_distance(task: str, distance: int) -> None:
    made = getattr(offline_tasks, task)(distance=distance, documents=6, characters=1800, pretrained="ignored")["test"]
    assert len({document["text"] for document in made}) == 6
    for document in made:
        text = document["text"]
        asked = text[text.rfind("\n") + 1 :]
        said = ", ".join(document["target"].split())
        last = text.rfind(f"{asked} {said}" if task != "passkey" else f"{asked}{said}", 0, len(text) - len(asked))
        assert last >= 0 and abs(len(text) - last - distance) < 220
        assert 1300 < len(text) < 2200


def test_the_identifier_was_written_before_and_not_nearer() -> None:
    for nearest, farthest in ((0, 400), (1000, 1800)):
        for document in offline_tasks.cloze(nearest=nearest, farthest=farthest, documents=4)["test"]:
            before, word = document["text"], document["target"]
            last = max(match.start() for match in re.finditer(rf"\b{word}\b", before))
            assert nearest <= len(before) - last < farthest


def test_seeds_and_distances_give_other_documents() -> None:
    first, same, other = (offline_tasks.passkey(distance=200, seed=seed)["test"]["text"] for seed in (0, 0, 1))
    assert first == same and not set(first) & set(other)
    with pytest.raises(ValueError, match="distance=1800"):
        offline_tasks.passkey(distance=1800, characters=1800)


def test_scores() -> None:
    document = {"text": "ä", "target": "one two three four"}
    assert offline_tasks.share_of_words(document, [" one, two, four"]) == {"acc": 0.5}
    assert offline_tasks.share_of_words(document, [""]) == {"acc": 0.0}
    assert offline_tasks.bits_per_byte(document, [-1.3862943611198906]) == {
        "bits_per_byte": pytest.approx(1.0),
        "byte_perplexity": (-1.3862943611198906, 2),
    }
