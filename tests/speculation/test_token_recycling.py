"""Token recycling: what the matrix holds, how ranks are learned, and that nothing outlives the weights or the patch."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from speculation import FEW, plain_text, text_of

from patchkit import patch_model, patched, unpatch_model
from patchkit.models import load_model
from patchkit.patches.speculative import Speculative
from patchkit.speculation import statistics_of
from patchkit.speculation.calibration import Calibration
from patchkit.speculation.drafter import State
from patchkit.speculation.drafters.chain import Chain
from patchkit.speculation.drafters.prompt_lookup import PromptLookup
from patchkit.speculation.drafters.token_recycling import RecyclingSession, RememberingRecycling, TokenRecycling
from patchkit.speculation.shared import reset_statistics, speculation_of
from patchkit.speculation.successors import Successors
from patchkit.testing import tiny_model


def tokens(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def drafter_of(model: Any) -> RememberingRecycling:
    drafter = speculation_of(model).drafter
    assert isinstance(drafter, RememberingRecycling)
    return drafter


def test_the_matrix_holds_the_last_distribution_of_each_token() -> None:
    successors = Successors(3)
    assert successors.after(4) == [] and successors.n_bytes == 0
    successors.update(tokens(4, 7), torch.tensor([[1, 2, 3], [4, 5, 6]]), 10)
    assert successors.after(4) == [1, 2, 3] and successors.after(7) == [4, 5, 6] and successors.after(5) == []
    successors.update(tokens(7, 7, 4), torch.tensor([[7, 8, 9], [0, 1, 2], [9, 8, 7]]), 10)
    assert successors.after(7) == [7, 8, 9], "of a token that comes twice the first one counts"
    assert successors.after(4) == [9, 8, 7]
    few = Successors(8)
    few.update(tokens(1), torch.tensor([[2, 0, 1]]), 3)
    assert few.after(1) == [2, 0, 1], "a vocabulary of three tokens"


def test_a_sequence_puts_what_follows_in_front_the_latest_first() -> None:
    successors = Successors(3)
    successors.read([])
    successors.read([5])
    successors.read([1, 2, 1, 3, 1, 2, 9])
    assert successors.after(1) == [2, 3] and successors.after(2) == [9, 1] and successors.after(9) == []
    successors.update(tokens(1), torch.tensor([[6, 3, 7]]), 10)
    successors.read([1, 4, 1, 3])
    assert successors.after(1) == [3, 4, 6], "the model's own come after them"


def test_bytes_of_the_matrix_are_bounded_and_reported() -> None:
    successors = Successors(TokenRecycling().width)
    successors.update(tokens(0), torch.zeros(1, 8, dtype=torch.int64), 49_152)
    assert successors.n_bytes == 49_152 * 8 * 4 < 2_000_000
    model = tiny_model("llama")
    with patched(model, "speculative(draft=prompt_lookup, k=4)", verbose=False):
        text_of(model, 1, FEW)
        without = statistics_of(model).memory_bytes
    with patched(model, "speculative(draft=token_recycling, k=4)", verbose=False):
        text_of(model, 1, FEW)
        assert drafter_of(model).successors.n_bytes == model.config.vocab_size * 8 * 4
        assert statistics_of(model).memory_bytes == without + model.config.vocab_size * 8 * 4


def session_of(text: list[int], width: int = 3) -> tuple[RecyclingSession, State]:
    state = State(torch.nn.functional.pad(tokens(*text)[None], (0, 20)), [len(text)], [0])
    return RecyclingSession(Successors(width), Calibration(), state), state


def test_filler_is_not_learned_and_rejected_drafts_are() -> None:
    session, _ = session_of([1, 2])
    logits = torch.zeros(2, 3, 10)
    for position, token in enumerate((3, 4, 5)):
        logits[:, position, token] = 1.0
    session.observe_logits(torch.tensor([[2, 6, 7], [3, 0, 0]]), logits, [3, 1])
    assert [session.successors.after(token)[:1] for token in (2, 6, 7, 3)] == [[3], [4], [5], [3]]
    assert session.successors.after(0) == []


def test_a_tree_is_grown_from_the_matrix_and_ranks_are_learned_from_what_followed() -> None:
    session, state = session_of([1, 2])
    session.successors.update(tokens(2, 3, 4), torch.tensor([[3, 4, 5], [4, 6, 7], [8, 9, 1]]), 10)
    proposal = session.propose(state, 4)
    assert proposal is not None and proposal.chances is not None
    # 0.45 for the best of 2; its best, 0.45^2; the best of that, 0.45^3 = 0.09; the second of 2, 0.12.
    assert proposal.tokens.tolist() == [[3, 4, 4, 8]] and proposal.parents == [(-1, 0, -1, 1)]
    assert proposal.chances == [pytest.approx([0.45, 0.45, 0.12, 0.45])]
    state.tokens[0, 2:4], state.lengths = tokens(3, 6), [4]
    session.propose(state, 4)
    outcomes = session.calibration._outcomes
    assert [round(outcomes[rank][0]) for rank in range(3)] == [1, 1, 0], "3 was the best of 2, and 6 the second of 3"
    assert all(round(outcomes[rank][1]) == 2 for rank in range(3))
    state.trees = False
    state.tokens[0, 4], state.lengths = 2, [5]
    chain = session.propose(state, 3)
    assert chain is not None and chain.parents is None and chain.tokens.tolist() == [[3, 4, 8]]


def test_a_second_call_drafts_from_the_first() -> None:
    model, tokenizer = load_model("stdlib-7m")
    ids = tokenizer("import os\nimport sys\n\n", return_tensors="pt").input_ids

    def rounds() -> int:
        reset_statistics(model)
        model.generate(input_ids=ids, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
        return len(statistics_of(model).steps)

    with patched(model, "speculative(draft=token_recycling, k=8)", verbose=False):
        first, second = rounds(), rounds()
    with patched(model, "speculative(draft=token_recycling(scope=call), k=8)", verbose=False):
        assert rounds() == first
        assert second < 0.8 * rounds()


def test_changed_weights_are_other_distributions() -> None:
    model = patch_model(tiny_model("llama"), "speculative(draft=token_recycling, k=8)", verbose=False)
    text_of(model, 2, FEW)
    before = drafter_of(model)
    assert before.successors.n_bytes > 0
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    text = text_of(model, 2, FEW)
    after = drafter_of(model)
    assert after.successors is not before.successors and after.calibration is not before.calibration
    fresh = tiny_model("llama")
    with torch.no_grad():
        fresh.lm_head.weight.copy_(fresh.lm_head.weight.flip(0))
    assert torch.equal(text, text_of(fresh, 2, FEW))
    assert torch.equal(text_of(model, 2, FEW), text) and drafter_of(model).successors is after.successors


def test_nothing_is_left_after_unpatching() -> None:
    model = patch_model(tiny_model("llama"), "speculative(draft=token_recycling, k=8)", verbose=False)
    text_of(model, 2, FEW)
    matrix = weakref.ref(drafter_of(model).successors)
    unpatch_model(model)
    gc.collect()
    assert matrix() is None


@pytest.mark.parametrize("scope", ["model", "call"])
def test_rows_share_one_matrix(scope: str) -> None:
    """Four rows with padding, two of them the same: what one learns serves the other, and the texts are those of plain decoding."""
    model = patch_model(tiny_model("llama"), f"speculative(draft=token_recycling(scope={scope}), k=8)", verbose=False)
    for _ in range(2):
        assert torch.equal(text_of(model, 4, FEW), plain_text("llama", 4, new=FEW))
    assert statistics_of(model).tokens_per_target_step > 1.2


def test_a_chain_of_drafters_shows_it_the_logits() -> None:
    model = tiny_model("llama")
    with patched(model, Speculative(draft=Chain((PromptLookup(), TokenRecycling())), k=6), verbose=False):
        assert torch.equal(text_of(model, 2, FEW), plain_text("llama", 2, new=FEW))
        chain: Any = speculation_of(model).drafter
        assert chain.drafters[1].successors.n_bytes > 0


def test_text_of_a_trained_model_is_the_same_in_fewer_rounds() -> None:
    model, tokenizer = load_model("stdlib-7m")
    prompts = [
        "def read(self, path):\n    with open(path) as file:\n",
        "class Error(Exception):\n",
        "import os\nimport sys\n\n\ndef main():\n",
    ]
    given = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]
    options: Any = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)
    wanted = [model.generate(input_ids=ids, **options) for ids in given]
    with patched(model, "speculative(draft=token_recycling, k=8)", verbose=False):
        assert all(torch.equal(model.generate(input_ids=ids, **options), text) for ids, text in zip(given, wanted, strict=True))
        assert statistics_of(model).tokens_per_target_step > 1.5


@pytest.mark.parametrize("wrong", [dict(scope="file"), dict(width=0), dict(width=True)])
def test_options_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TokenRecycling(**wrong)
