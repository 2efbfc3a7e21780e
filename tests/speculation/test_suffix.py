"""Suffix drafting: the store against a search by definition, what is remembered, the file, and costs that cut drafts."""

from __future__ import annotations

import copy
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from patchkit import patch_model, unpatch_model
from patchkit.errors import PatchError
from patchkit.speculation import Scheduler, statistics_of
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.controllers.cost_model import CostModel
from patchkit.speculation.drafter import Proposal, State
from patchkit.speculation.drafters.suffix import Suffix, SuffixSession
from patchkit.speculation.shared import reset_statistics
from patchkit.speculation.statistics import StepRecord
from patchkit.speculation.suffix_file import SuffixFile, Writer
from patchkit.speculation.suffix_store import GrowingSequence, SuffixStore
from patchkit.speculation.tree import parents_of
from patchkit.testing import tiny_model


def sequence_of(tokens: list[int]) -> GrowingSequence:
    sequence = GrowingSequence()
    for token in tokens:
        sequence.extend([token])
    return sequence


def by_definition(kept: list[list[int]], own: list[int], most: int, longest: int = 32) -> tuple[list[int], list[float], int] | None:
    """Continuation of the longest common suffix, by comparing every place of every sequence."""
    places: list[tuple[int, list[int], int]] = []
    for tokens in [*kept, own]:
        for end in range(1, len(tokens) + (tokens is not own)):
            matched = 0
            while matched < min(end, len(own), longest) and tokens[end - 1 - matched] == own[-1 - matched]:
                matched += 1
            if matched:
                places.append((matched, tokens, end))
    if not places:
        return None
    best = max(matched for matched, _, _ in places)
    following = [(tokens, end) for matched, tokens, end in places if matched == best]
    found: list[int] = []
    shares: list[float] = []
    while len(found) < most and following:
        nexts = [(([*tokens, *found] if tokens is own else tokens)[end : end + 1] or [None])[0] for tokens, end in following]
        votes = Counter(token for token in nexts if token is not None)
        if not votes:
            break
        token = next(each for each in reversed(nexts) if each is not None and votes[each] == max(votes.values()))
        found.append(token)
        shares.append(votes[token] / len(nexts))
        following = [(tokens, end + 1) for (tokens, end), each in zip(following, nexts, strict=True) if each == token]
    return found, shares, best


@pytest.mark.parametrize("seed", range(40))
def test_the_store_finds_what_a_search_of_every_place_finds(seed: int) -> None:
    chance = random.Random(seed)
    vocabulary = chance.choice([2, 3, 10])
    kept = [[chance.randrange(vocabulary) for _ in range(chance.randrange(1, 12))] for _ in range(chance.randrange(4))]
    own = [chance.randrange(vocabulary) for _ in range(chance.randrange(1, 15))]
    store = SuffixStore(4096)
    for tokens in kept:
        store.add(np.array(tokens, np.int32))
    kept = [each.tolist() for each in store.sequences()]  # without those that were there already
    expected, found = by_definition(kept, own, most=6), store.continuation(sequence_of(own), 6)
    if expected is None or not expected[0]:
        assert found is None or found.tokens == []
    else:
        assert found is not None
        assert (found.tokens, found.shares, found.matched) == expected


@pytest.mark.parametrize("seed", range(20))
def test_votes_are_those_of_all_places(seed: int) -> None:
    chance = random.Random(seed)
    kept = [[chance.randrange(3) for _ in range(12)] for _ in range(2)]
    own = [chance.randrange(3) for _ in range(15)]
    store, sequence = SuffixStore(4096), sequence_of(own)
    for tokens in kept:
        store.add(np.array(tokens, np.int32))
    places = store.places(sequence)
    assert places is not None
    texts = [*(each.tolist() for each in store.sequences()), own]
    ending = own[-places.matched :]
    ends = [
        (text, end)
        for text in texts
        for end in range(places.matched, len(text) + (text is not own))
        if text[end - places.matched : end] == ending
    ]
    votes = Counter(text[end] for text, end in ends if end < len(text))
    found = store.following(sequence, places)
    assert {token: share for token, share, _ in found} == {token: count / len(ends) for token, count in votes.items()}
    assert [share for _, share, _ in found] == sorted((share for _, share, _ in found), reverse=True)


def drafts(text: list[int], k: int, trees: bool = True) -> Proposal:
    session = SuffixSession(Suffix(), SuffixStore(1024), Calibration(), 1)
    proposal = session.propose(State(torch.tensor([text]), [len(text)], [0], trees=trees), k)
    assert proposal is not None
    return proposal


def test_a_tie_is_drafted_as_a_tree_and_a_rare_token_is_not() -> None:
    tie = [1, 2, 3, 9, 1, 2, 4, 8, 1, 2]
    tree, chain = drafts(tie, 4), drafts(tie, 4, trees=False)
    first = [token for token, parent in zip(tree.tokens[0].tolist(), parents_of(tree, 0), strict=True) if parent == -1]
    assert first == [4, 3], "the latest first"
    assert chain.parents is None and chain.tokens[0].tolist() == [4, 8, 1, 2]
    often = [8, 1, 2, 4, 7, 1, 2, 4, 6, 1, 2, 4, 8, 1, 2, 4, 9, 1, 2, 3, 5, 1, 2]
    tree = drafts(often, 8)
    assert [token for token, parent in zip(tree.tokens[0].tolist(), parents_of(tree, 0), strict=True) if parent == -1] == [4]


def test_sequences_that_were_not_used_for_longest_go_first() -> None:
    store = SuffixStore(1024)
    for first in (1000, 2000, 3000):
        store.add(np.arange(first, first + 300, dtype=np.int32))
    assert store.continuation(sequence_of([1004, 1005]), 3).tokens == [1006, 1007, 1008]  # type: ignore[union-attr]
    store.add(np.arange(4000, 4300, dtype=np.int32))
    assert [int(each[0]) for each in store.sequences()] == [1000, 3000, 4000]
    assert store.continuation(sequence_of([2004, 2005]), 3) is None
    store.add(np.arange(9000, 12000, dtype=np.int32))
    assert [int(each[-1]) for each in store.sequences()] == [11999] and store.n_bytes <= 4 * 1024


def test_the_store_does_not_go_on_into_the_next_sequence() -> None:
    store = SuffixStore(1024)
    store.add(np.array([1, 2, 3], np.int32))
    store.add(np.array([7, 8, 9], np.int32))
    assert store.continuation(sequence_of([2]), 5).tokens == [3]  # type: ignore[union-attr]
    assert store.continuation(sequence_of([3]), 5).tokens == []  # type: ignore[union-attr]
    assert store.continuation(sequence_of([3, 7]), 5).matched == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(6))
def test_what_is_kept_is_what_dropping_one_by_one_keeps(seed: int) -> None:
    chance, store = random.Random(seed), SuffixStore(1024)
    kept: list[tuple[int, ...]] = []  # the one that was not used for longest first
    for _ in range(300):
        new = tuple(chance.randrange(6) for _ in range(chance.choice([0, 1, 2, 40, 300, 900, 1022, 2000])))[-1022:]
        store.add(np.array(new, np.int32))
        if new in kept:
            kept.remove(new)
        else:
            while 1 + sum(len(each) + 1 for each in kept) + len(new) + 1 > 1024:
                del kept[0]
        kept.append(new)
        assert [tuple(each.tolist()) for each in store.by_use()] == kept
        assert sorted(each.tobytes() for each in store.sequences()) == sorted(each.tobytes() for each in store.by_use())
        assert store.n_bytes <= 4 * 1024 and store.largest == max((max(each, default=-1) for each in kept), default=-1)


def test_many_sequences_are_added_without_a_look_at_every_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(np, "array_equal", lambda *arrays: compared.append(arrays))
    copied = []
    concatenate = np.concatenate
    monkeypatch.setattr(np, "concatenate", lambda arrays: copied.append(sum(map(len, arrays))) or concatenate(arrays))
    store = SuffixStore(1 << 16)
    for first in range(2000):
        store.add(np.arange(first, first + 20, dtype=np.int32))
    assert len(store.sequences()) == 2000 and len(compared) < 2000 and sum(copied) < 10 * 2000 * 20


def prompt(rows: int = 1, seed: int = 3) -> torch.Tensor:
    return torch.randint(5, 90, (rows, 14), generator=torch.Generator().manual_seed(seed))


def rounds(model: Any, ids: torch.Tensor, new: int = 40) -> tuple[int, torch.Tensor]:
    reset_statistics(model)
    out = model.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0)
    return len(statistics_of(model).steps), out


@pytest.mark.parametrize("rows", [1, 3])
def test_a_second_call_drafts_from_the_first(rows: int) -> None:
    plain = tiny_model("llama").generate(prompt(rows), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    remembering = patch_model(tiny_model("llama"), "speculative(draft=suffix, k=8)", verbose=False)
    forgetting = patch_model(tiny_model("llama"), "speculative(draft=suffix(scope=call), k=8)", verbose=False)
    for model, second_is_fast in ((remembering, True), (forgetting, False)):
        first, out = rounds(model, prompt(rows))
        assert torch.equal(out, plain)
        second, out = rounds(model, prompt(rows))
        assert torch.equal(out, plain)
        assert (second <= first // 2) == second_is_fast, (first, second)


def test_a_call_is_remembered_in_a_chain_too() -> None:
    model = patch_model(tiny_model("llama"), "speculative(draft=[suffix, prompt_lookup], k=8)", verbose=False)
    assert rounds(model, prompt())[0] > 2 * rounds(model, prompt())[0]


def test_an_interrupted_call_is_remembered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = patch_model(tiny_model("llama"), "speculative(draft=suffix, k=4)", verbose=False)

    class Stop(BaseException):
        pass

    def interrupt(tokens: Any, scores: Any) -> Any:
        if tokens.shape[1] > 30:
            raise Stop
        return torch.zeros(len(tokens), dtype=torch.bool)

    with pytest.raises(Stop):
        model.generate(prompt(), max_new_tokens=40, do_sample=False, pad_token_id=0, stopping_criteria=[interrupt])
    count, _ = rounds(model, prompt(), new=15)
    assert count <= 4


def test_the_file_is_read_by_the_next_process_and_refused_for_others(tmp_path: Path) -> None:
    path = tmp_path / "suffixes.safetensors"
    spec = f"speculative(draft=suffix(scope='{path}'), k=8)"
    first, _ = rounds(patch_model(tiny_model("llama"), spec, verbose=False), prompt())
    second, _ = rounds(patch_model(tiny_model("llama"), spec, verbose=False), prompt())
    assert second <= 6 < first
    assert [each.name for each in tmp_path.iterdir()] == ["suffixes.safetensors"], "no unfinished file stays"
    with pytest.raises(PatchError, match=r"holds token ids of LlamaForCausalLM with .* tokens, and this model is"):
        patch_model(tiny_model("gpt2"), spec)


def test_a_scheduler_that_is_never_idle_writes_now_and_then(tmp_path: Path) -> None:
    path = tmp_path / "suffixes.safetensors"
    model = patch_model(tiny_model("llama"), f"speculative(draft=suffix(scope='{path}'), k=3)", verbose=False)
    scheduler, options = Scheduler(model, slots=4), dict(do_sample=False, eos_token_id=None, pad_token_id=0)
    long = scheduler.submit(prompt(), max_new_tokens=400, **options)
    written = []
    for seed in range(35):
        row = scheduler.submit(prompt(seed=seed), max_new_tokens=3, **options)
        while row.finish is None:
            scheduler.step()
        written.append(len(load_file(path)["lengths"]) if path.exists() else 0)
    assert long.finish is None and written == [0] * 15 + [16] * 16 + [32] * 4
    assert [each.name for each in tmp_path.iterdir()] == [path.name]
    scheduler.close()
    assert len(load_file(path)["lengths"]) == 36


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: path.mkdir(), "is a folder: give the path of a file"),
        (lambda path: path.write_bytes(b"nonsense"), "cannot be read"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "not a file that suffix drafting wrote"),
        (
            lambda path: save_file(
                {"tokens": torch.ones(3, dtype=torch.int32), "lengths": torch.ones(2, dtype=torch.int64)},
                path,
                metadata={"format": "patchkit suffix 1", "model": "LlamaForCausalLM with 128 tokens"},
            ),
            "damaged",
        ),
    ],
)
def test_bad_files_are_refused_before_anything_is_touched(make: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    model = tiny_model("llama")
    with pytest.raises(PatchError, match=words):
        patch_model(model, f"speculative(draft=suffix(scope='{path}'))")
    assert not hasattr(model, "_patchkit")
    with pytest.raises(PatchError, match="not a folder that can be written to"):
        patch_model(model, f"speculative(draft=suffix(scope='{tmp_path}/nowhere/file'))")


def _written(path: Path, tokens: Any, lengths: Any) -> None:
    metadata = {"format": "patchkit suffix 1", "model": "LlamaForCausalLM with 128 tokens"}
    save_file({"tokens": torch.as_tensor(tokens), "lengths": torch.as_tensor(lengths)}, path, metadata=metadata)


@pytest.mark.parametrize(
    ("tokens", "lengths"),
    [
        (torch.tensor([1, 2, 128], dtype=torch.int32), torch.tensor([3])),
        (torch.tensor([1, -1, 2], dtype=torch.int32), torch.tensor([3])),
        (torch.tensor([1, 2, 3]), torch.tensor([3])),
        (torch.ones(2, 4, dtype=torch.int32), torch.tensor([2])),
        (torch.ones(3, dtype=torch.int32), torch.tensor([1.0, 2.0])),
        (torch.ones(3, dtype=torch.int32), torch.zeros(0, dtype=torch.int64)),
    ],
)
def test_a_damaged_file_never_reaches_the_model(tokens: torch.Tensor, lengths: torch.Tensor, tmp_path: Path) -> None:
    _written(tmp_path / "file", tokens, lengths)
    with pytest.raises(PatchError, match="damaged"):
        patch_model(tiny_model("llama"), f"speculative(draft=suffix(scope='{tmp_path}/file'))")


def test_the_file_keeps_the_order_of_use(tmp_path: Path) -> None:
    path = tmp_path / "file"
    store = SuffixStore(1024)
    for first in (0, 40, 80):
        store.add(np.arange(first, first + 30, dtype=np.int32))
    assert store.continuation(sequence_of([4, 5]), 3) is not None
    writer = Writer.of(tiny_model("llama"))
    SuffixFile(str(path)).write(store, writer)
    read = SuffixFile(str(path)).read(writer, 1024)
    read.add(np.arange(940, dtype=np.int32) % 7)
    assert [int(each[0]) for each in read.by_use()][:2] == [80, 0], "the one from 40 on was not used for longest"


def test_a_text_is_not_lost_where_the_file_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    plain = tiny_model("llama").generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = patch_model(tiny_model("llama"), f"speculative(draft=suffix(scope='{folder}/file'), k=4)", verbose=False)
    folder.rmdir()
    with caplog.at_level("WARNING", "patchkit"):
        for _ in range(2):
            assert torch.equal(rounds(model, prompt())[1], plain)
    assert sum("cannot be written (FileNotFoundError)" in line for line in caplog.messages) == 1


def test_a_relative_path_is_that_of_the_folder_at_patching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = patch_model(tiny_model("llama"), "speculative(draft=suffix(scope='file'), k=4)", verbose=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    rounds(model, prompt())
    assert (tmp_path / "file").is_file() and not (tmp_path / "elsewhere" / "file").exists()


def test_tokens_that_a_smaller_vocabulary_does_not_have_are_forgotten() -> None:
    model = patch_model(tiny_model("llama"), "speculative(draft=suffix, k=8)", verbose=False)
    rounds(model, prompt())
    model.resize_token_embeddings(100)
    same = unpatch_model(copy.deepcopy(model))
    wanted = same.generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(rounds(model, prompt())[1], wanted)


def test_a_file_over_its_bound_keeps_the_latest(tmp_path: Path) -> None:
    path = tmp_path / "file"
    spec = f"speculative(draft=suffix(scope='{path}', max_tokens=1024))"
    long = patch_model(tiny_model("llama"), f"speculative(draft=suffix(scope='{path}'), k=2)", verbose=False)
    for seed in range(30):
        long.generate(prompt(seed=seed), max_new_tokens=30, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(load_file(path)["tokens"]) > 1200
    short = patch_model(tiny_model("llama"), spec, verbose=False)
    rounds(short, prompt(seed=29))
    assert len(load_file(path)["tokens"]) <= 1024


def test_options_are_checked() -> None:
    for wrong in (dict(scope=""), dict(scope=3), dict(shortest=0), dict(shortest=33), dict(max_tokens=10)):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Suffix(**wrong)  # type: ignore[arg-type]


def test_calibration_follows_what_happened() -> None:
    calibration = Calibration()
    assert calibration.chance("long", 0.9) == pytest.approx(0.9)
    for _ in range(50):
        calibration.add("long", False)
    assert calibration.chance("long", 0.9) < 0.1 and calibration.chance("short", 0.5) == 0.5


def test_costs_cut_drafts_that_do_not_pay() -> None:
    session = CostModel(bounds=(0, 8)).begin()

    def observe(k: int, ms: float) -> None:
        session.observe(StepRecord(k, 1, (k,), (0,), 1, 0.01, ms, 0.0))

    session.new_text(10)
    # A verification of 2 to 9 tokens takes 1.8 plain steps.
    for k, ms in ((2, 18.0), (0, 10.0), (2, 18.0), (0, 10.0), (8, 18.5), (4, 18.2), (0, 10.0), (1, 18.0), (1, 18.0)):
        observe(k, ms)
    assert session.most() == 8
    assert session.worth([[0.9] * 8]) == 8
    assert session.worth([[0.3] * 8]) == 0, "1.4 tokens for 1.8 steps"
    assert session.worth([[0.9, 0.9, 0.01, 0.01]]) in (2, 3)
    assert session.worth([[0.9] * 8, []]) == 8 or session.worth([[0.9] * 8, []]) > 0
    tried = [session.worth([[0.3] * 8]) for _ in range(200)]
    assert 1 <= sum(each > 0 for each in tried) <= 6, "costs are looked at again, ever more rarely"
    assert CostModel(bounds=(2, 8)).begin().worth([[0.1] * 8]) == 8, "nothing is known yet"


@pytest.mark.parametrize("bounds", [(0, 0), (1, 8), (2, 4), (4, 4)])
def test_bounds_that_ask_for_no_first_rounds(bounds: tuple[int, int]) -> None:
    plain = tiny_model("llama").generate(prompt(), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)
    model = patch_model(tiny_model("llama"), f"speculative(draft=suffix, k=cost_model(bounds={bounds}))", verbose=False)
    assert torch.equal(rounds(model, prompt())[1], plain)


def test_a_number_of_rows_that_is_new_at_this_length() -> None:
    session = CostModel(bounds=(0, 8)).begin()
    for tokens, rows in ((10, 1), (1000, 4)):
        session.new_text(tokens)
        for k in (2, 0, 2, 0):
            session.observe(StepRecord(k, rows, (k,) * rows, (0,) * rows, rows, 0.01, 10.0, 0.0))
    session.new_text(10)
    assert session.most() == 8


def test_drafts_come_back_after_a_long_bad_time() -> None:
    session = CostModel(bounds=(0, 8)).begin()
    session.new_text(10)

    def drafted(several: int, drafts_cost: float) -> list[int]:
        found = []
        for _ in range(several):
            k = session.worth([[0.6]]) if session.most() else 0
            session.observe(StepRecord(k, 1, (k,), (0,), 1, 0.01, 10.0 * (drafts_cost if k else 1), 0.0))
            found.append(k)
        return found

    assert 2 < sum(drafted(20_000, 3.0)) < 200, "1.6 tokens for 3 steps: hardly ever, and at most 1 % of the time is lost"
    assert drafted(4_000, 1.1)[-20:] == [1] * 20, "1.6 tokens for 1.1 steps"


@pytest.mark.parametrize(("draft_ms", "asked"), [(0.01, 1.0), (5.0, 0.2)])
def test_a_search_that_costs_is_not_made_for_drafts_that_are_always_cut(draft_ms: float, asked: float) -> None:
    session = CostModel(bounds=(0, 8)).begin()
    session.new_text(10)
    searches = 0
    for _ in range(400):
        k = session.most()
        searches += k > 0
        kept = session.worth([[0.1] * k]) if k else 0
        session.observe(StepRecord(kept, 1, (kept,), (0,), 1, draft_ms if k else 0.0, 18.0 if kept else 10.0, 0.0))
    assert searches / 400 <= asked and (asked < 1 or searches > 390)


def test_a_search_that_was_paid_for_is_worth_more_drafts() -> None:
    kept = []
    for draft_ms in (0.0, 20.0):
        session = CostModel(bounds=(0, 8)).begin()
        session.new_text(10)
        for k, ms in [(8, 24.0), (4, 14.0), (2, 12.0), (1, 11.0), (0, 10.0)] * 20:
            asked = session.most()
            session.observe(StepRecord(k, 1, (k,), (k,), 1 + k, draft_ms if asked else 0.0, ms, 0.0))
        kept.append(session.worth([[0.75] * 8]))
    assert kept == [3, 7], "2.7 tokens for 12.5 ms, or 3.6 for 17.8; with 20 ms that were spent already the latter is faster"
