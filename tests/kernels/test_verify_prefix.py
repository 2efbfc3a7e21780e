"""verify_prefix and verify_prefix_sampled against plain Python, exact fractions and the distributions that they must give."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from patchkit.kernels.op import VARIABLE
from patchkit.kernels.verify_prefix import verify_prefix
from patchkit.kernels.verify_prefix_sampled import verify_prefix_sampled

ROOT = Path(__file__).resolve().parents[2]
JUST_BELOW_ONE = 1 - 2**-24
FORMS = pytest.mark.parametrize("form", ["reference", "chosen"])


def greedy(form: str, *args: torch.Tensor) -> tuple[list, list]:
    choice, accepted = (verify_prefix.reference if form == "reference" else verify_prefix)(*args)
    return choice.tolist(), accepted.tolist()


def sampled(form: str, *args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (verify_prefix_sampled.reference if form == "reference" else verify_prefix_sampled)(*args)


# -- greedy ----------------------------------------------------------------------------------------------------------------------


def largest(row: list[float]) -> int:
    """Lowest index of the largest element."""
    best = 0
    for index, value in enumerate(row):
        if value > row[best]:
            best = index
    return best


def stands(choice: list[int], draft: list[int], count: int) -> int:
    for index in range(count):
        if draft[index] != choice[index]:
            return index
    return count


@FORMS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_choice_and_prefix(form, dtype):
    torch.manual_seed(0)
    logits = torch.randn(25, 5, 37).to(dtype)
    choice = [[largest(row) for row in positions] for positions in logits.tolist()]
    draft, counts = torch.tensor(choice)[:, :-1].clone(), torch.arange(25) % 5
    for row in range(0, 20):  # right up to a position of its own, and right again after it
        draft[row, row // 5 : row // 5 + 1] += 1
    expected = [stands(*given) for given in zip(choice, draft.tolist(), counts.tolist(), strict=True)]
    assert set(expected) == {0, 1, 2, 3, 4}
    assert greedy(form, logits, draft, counts) == (choice, expected)

    # what a slip would give is something else
    right = torch.tensor(choice)
    shifted = [stands(*given) for given in zip(right[:, 1:].tolist(), draft.tolist(), counts.tolist(), strict=True)]
    uncounted = [stands(*given, 4) for given in zip(choice, draft.tolist(), strict=True)]
    matches = ((draft == right[:, :-1]) & (torch.arange(4) < counts[:, None])).sum(1).tolist()
    assert expected not in (shifted, uncounted, matches)


@FORMS
def test_of_equal_logits_the_first(form):
    logits = torch.tensor([[[1.0, 3.0, 3.0, 2.0], [-0.0, 0.0, -1.0, 0.0], [-torch.inf] * 4, [5.0, torch.nan, torch.inf, torch.nan]]])
    draft, counts = torch.tensor([[1, 0, 0]]), torch.tensor([3])
    assert greedy(form, logits, draft, counts) == ([[1, 0, 0, 1]], [3])
    wide = torch.zeros(1, 1, 50257)
    wide[..., [7, 20, 40000, 50256]] = 1
    assert greedy(form, wide, draft[:, :0], counts * 0) == ([[7]], [0])
    assert greedy(form, wide.flip(2), draft[:, :0], counts * 0) == ([[0]], [0])


@FORMS
def test_without_a_draft(form):
    logits = torch.randn(3, 1, 11)
    assert greedy(form, logits, torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))[1] == [0, 0, 0]


def test_logits_that_a_gradient_could_reach():
    logits = torch.randn(2, 3, 11, requires_grad=True)
    choice, accepted = verify_prefix(logits, logits[:, :-1].argmax(-1), torch.tensor([2, 1]))
    assert torch.equal(choice, logits.argmax(-1)) and accepted.tolist() == [2, 1] and not choice.requires_grad


# -- sampled: the rule -----------------------------------------------------------------------------------------------------------


def exact_rule(p, q, draft, count, draws, draw, strict=True, residual=lambda p, q: max(p - q, 0)) -> tuple[int, int]:
    """One row in exact fractions of nested lists. The keywords make a wrong rule of it."""
    stand = 0
    while stand < count:
        token = draft[stand]
        left, right = Fraction(draws[stand]) * Fraction(q[stand][token]), Fraction(p[stand][token])
        if not (left < right or (not strict and left == right)):
            break
        stand += 1
    weights = [Fraction(value) for value in p[stand]]
    if stand < count:
        left_over = [residual(weight, Fraction(value)) for weight, value in zip(weights, q[stand], strict=True)]
        weights = left_over if sum(left_over) else weights
    share, cumulative = Fraction(draw) * sum(weights), Fraction(0)
    for index, weight in enumerate(weights):
        cumulative += weight
        if cumulative > share:
            return stand, index
    raise AssertionError("a draw below 1 leaves an index")


def random_case(rows: int, positions: int, vocabulary: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    p = (torch.randn(rows, positions, vocabulary) * 1.5).softmax(-1)
    q = (p[:, :-1].log() + torch.randn(rows, positions - 1, vocabulary) * 0.7).softmax(-1)
    draft = q.view(-1, vocabulary).multinomial(1).view(rows, positions - 1)
    return p, q, draft, torch.arange(rows) % positions, torch.rand(rows, positions - 1), torch.rand(rows)


@FORMS
def test_the_rule_in_exact_fractions(form):
    args = random_case(60, 4, 13)
    rows = list(zip(*(given.tolist() for given in args), strict=True))
    accepted, next_token = (given.tolist() for given in sampled(form, *args))
    found = list(zip(accepted, next_token, strict=True))
    assert found == [exact_rule(*row) for row in rows]
    assert set(accepted) == {0, 1, 2, 3} and any(a < count for a, count in zip(accepted, args[3].tolist(), strict=True))

    # wrong residuals, a prefix that is one too long, no prefix at all
    assert found != [exact_rule(*row, residual=lambda p, q: p) for row in rows]
    assert found != [exact_rule(*row, residual=lambda p, q: max(q - p, 0)) for row in rows]
    assert found != [exact_rule(*row[:3], min(row[3] + 1, 3), *row[4:]) for row in rows]


def one(form: str, p: list, q: list, draft: list[int], draws: list[float], draw: float) -> tuple[int, int]:
    given = torch.tensor([p]), torch.tensor([q]), torch.tensor([draft]), torch.tensor([len(draft)])
    accepted, next_token = sampled(form, *given, torch.tensor([draws]), torch.tensor([draw]))
    return accepted.item(), next_token.item()


@FORMS
def test_borders(form):
    p, certain = [0.5, 0.25, 0.25], [1.0, 0.0, 0.0]
    # draw * q = p is a rejection, and then the token itself has no weight left
    assert one(form, [p, p], [certain], [0], [0.5], 0.0) == (0, 1)
    assert one(form, [p, p], [certain], [0], [0.5 - 2**-25], 0.0) == (1, 0)
    # a token of probability 0 is never accepted, even by the draw 0
    assert one(form, [[0.0, 0.5, 0.5], p], [certain], [0], [0.0], 0.0) == (0, 1)
    # nothing is divided by a q of 0
    assert one(form, [p, p], [certain], [1], [JUST_BELOW_ONE], 0.5) == (1, 1)
    # the ends of the inverse CDF: never a token without weight
    gaps = [0.0, 0.5, 0.0, 0.5, 0.0]
    for draw, token in ((0.0, 1), (0.5 - 2**-25, 1), (0.5, 3), (JUST_BELOW_ONE, 3)):
        assert one(form, [gaps, gaps], [[0.2] * 5], [0], [0.9], draw) == (0, token)
    # p <= q everywhere: no residual, so p itself
    assert one(form, [p, [0.0, 0.0, 1.0]], [[0.75, 0.25, 0.25]], [0], [0.9], 0.99) == (0, 2)
    # no distribution at all
    assert one(form, [[0.0] * 3, p], [certain], [0], [0.1], 0.3) == (0, -1)


@FORMS
def test_the_draft_beyond_the_count_is_not_looked_at(form):
    p, q, draft, counts, draws, draw = random_case(20, 4, 13)
    accepted, next_token = sampled(form, p, q, draft, counts, draws, draw)
    beyond = torch.arange(3) >= counts[:, None]
    q[beyond], draft[beyond], draws[beyond] = 7.0, -1, 0.0
    again = sampled(form, p, q, draft, counts, draws, draw)
    assert torch.equal(again[0], accepted) and torch.equal(again[1], next_token)


@FORMS
def test_a_large_vocabulary_is_summed_precisely(form):
    """Of V equal probabilities the draw u gives floor(u V); added up one by one in fp32 they give another token."""
    vocabulary = 50257
    p = torch.full((4, 1, vocabulary), 1 / vocabulary)
    draw = torch.tensor([0.1, 0.37, 0.9, JUST_BELOW_ONE])
    none = torch.zeros(4, 0)
    _, token = sampled(form, p, torch.zeros(4, 0, vocabulary), none.long(), torch.zeros(4, dtype=torch.int64), none, draw)
    expected = [int(Fraction(u) * vocabulary) for u in draw.tolist()]
    assert token.tolist() == expected
    single = np.cumsum(p[0, 0].numpy(), dtype=np.float32)
    assert [int(np.searchsorted(single, u, side="right")) for u in draw.tolist()] != expected


# -- sampled: the distribution ---------------------------------------------------------------------------------------------------

DRAWS = 60_000
PAIRS = {
    "alike": ([0.4, 0.3, 0.2, 0.1], [0.3, 0.3, 0.3, 0.1]),
    "opposite": ([0.7, 0.2, 0.08, 0.02], [0.02, 0.08, 0.2, 0.7]),
    "draft lacks tokens": ([0.25, 0.25, 0.25, 0.25], [0.0, 0.5, 0.5, 0.0]),
    "target lacks tokens": ([0.0, 0.6, 0.0, 0.4], [0.25, 0.25, 0.25, 0.25]),
    "nothing in common": ([0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.9, 0.1]),
    "deterministic draft": ([0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 1.0, 0.0]),
    "equal": ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
}


def chi_square(tokens: np.ndarray, p: list[float]) -> float:
    """Pearson's statistic of the counts of tokens, as a share of its quantile at 1 - 1e-4 (Wilson and Hilferty 1931)."""
    expected, counts = np.array(p) * len(tokens), np.bincount(tokens, minlength=len(p))
    if counts[expected == 0].any():
        return np.inf
    freedom = np.count_nonzero(expected) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.719 * np.sqrt(2 / (9 * freedom))) ** 3
    seen = expected > 0
    return float((((counts - expected)[seen] ** 2) / expected[seen]).sum() / quantile)


def spread(rows: int, probabilities: list) -> torch.Tensor:
    return torch.tensor(probabilities).expand(rows, *np.shape(probabilities))


@FORMS
@pytest.mark.parametrize("pair", PAIRS)
def test_the_distribution_of_the_first_token(form, pair):
    p, q = PAIRS[pair]
    random = np.random.default_rng(1)
    draft = random.choice(4, (DRAWS, 1), p=q)
    draws, draw = (torch.from_numpy(random.random(shape, dtype=np.float32)) for shape in ((DRAWS, 1), DRAWS))
    counts = torch.ones(DRAWS, dtype=torch.int64)
    given = spread(DRAWS, [p, q[::-1]]), spread(DRAWS, [q]), torch.from_numpy(draft), counts, draws, draw
    accepted, next_token = (found.numpy() for found in sampled(form, *given))
    assert chi_square(np.where(accepted == 1, draft[:, 0], next_token), p) < 1
    assert abs(accepted.mean() - np.minimum(p, q).sum()) < 4 * np.sqrt(0.25 / DRAWS)
    if 0 < np.minimum(p, q).sum() < 0.999:  # a rejected token replaced by one from p, and a draft that always stands
        again = random.choice(4, DRAWS, p=p)
        assert chi_square(np.where(accepted == 1, draft[:, 0], again), p) > 1
        assert chi_square(draft[:, 0], p) > 1


@FORMS
def test_the_distribution_at_every_position(form):
    p = [[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6], [0.25, 0.5, 0.15, 0.1]]
    q = [[0.4, 0.4, 0.1, 0.1], [0.2, 0.2, 0.1, 0.5]]
    random = np.random.default_rng(2)
    draft = np.stack([random.choice(4, DRAWS, p=row) for row in q], 1)
    draws, draw = (torch.from_numpy(random.random(shape, dtype=np.float32)) for shape in ((DRAWS, 2), DRAWS))
    counts = torch.arange(DRAWS) % 3
    accepted, next_token = (
        found.numpy() for found in sampled(form, spread(DRAWS, p), spread(DRAWS, q), torch.from_numpy(draft), counts, draws, draw)
    )
    emitted = np.concatenate([draft, np.zeros((DRAWS, 1), dtype=np.int64)], 1)
    emitted[np.arange(DRAWS), accepted] = next_token
    for position in range(3):
        tokens = emitted[accepted >= position, position]
        assert len(tokens) > 5000 and chi_square(tokens, p[position]) < 1
        assert chi_square(tokens, p[(position + 1) % 3]) > 1


@pytest.mark.matrix
def test_all_but_the_distributions_under_tritons_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", VARIABLE: "triton", "PYTHONPATH": str(ROOT)}
    chosen = "chosen and not distribution and not float64 and not float16"  # the first is not served, the second is in the contract test
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__)), "-k", chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout
