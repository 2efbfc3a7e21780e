"""Controllers on a simulated clock: a round's true time is known, what the controller is shown may be noisy."""

from __future__ import annotations

import copy
import math
import pickle
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from patchkit.errors import SpecError
from patchkit.speculation.controllers import Controller, ControllerSession
from patchkit.speculation.controllers.adaptive import Adaptive
from patchkit.speculation.controllers.cost_model import CostModel
from patchkit.speculation.controllers.fixed import Fixed
from patchkit.speculation.read_controller import read_controller
from patchkit.speculation.statistics import StepRecord

Cost = Callable[[int], float]
TOKENS = 128


@dataclass
class Simulation:
    """A drafter and a target. Times are in plain steps.

    Attributes:
        acceptance: by position, of what is drafted; the last holds for all positions after it.
        has_proposal: share of the rounds in which the drafter finds something.
        jitter, outliers: of the times that the controller is shown: relative deviation, and share of those that are 3 to 10 times as long.
        warm_up: what the first round at each K takes longer, as shown.
    """

    acceptance: Sequence[float]
    draft: Cost
    target: Cost
    has_proposal: float = 1.0
    rows: int = 1
    jitter: float = 0.0
    outliers: float = 0.0
    warm_up: float = 0.0
    seed: int = 0
    chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    def chance(self, position: int) -> float:
        return self.acceptance[min(position, len(self.acceptance) - 1)]

    def best_time_per_token(self, largest: int = 8) -> float:
        """Of the best fixed K, exactly."""
        return min(self.time(k) / self.tokens(k) for k in range(largest + 1))

    def time(self, k: int) -> float:
        """Expected of a round."""
        return (self.draft(k) if k else 0.0) + self.has_proposal * self.target(k) + (1 - self.has_proposal) * self.target(0)

    def tokens(self, k: int) -> float:
        """Expected of a round, per row."""
        return 1 + self.has_proposal * sum(math.prod(map(self.chance, range(position + 1))) for position in range(k))

    def shown(self, time: float) -> float:
        slow = self.random.uniform(3, 10) if self.random.random() < self.outliers else 1.0
        return 5.0 * time * slow * max(0.5, self.random.gauss(1, self.jitter))

    def run(self, session: ControllerSession, texts: int = 1, tokens: int = TOKENS, length: int = 128) -> float:
        """True time per token of the K that were chosen, without the luck of this run's drafts."""
        start = len(self.chosen)
        for _ in range(texts):
            session.new_text(length)
            done = 0.0
            while done < tokens:
                k = session.choose()
                proposed = tuple(k if self.random.random() < self.has_proposal else 0 for _ in range(self.rows))
                accepted = tuple(self.survivors(count) for count in proposed)
                draft, target = self.draft(k) if k else 0.0, self.target(max(proposed))
                extra = 0.0 if k in self.chosen else 5.0 * self.warm_up
                self.chosen.append(k)
                emits = sum(accepted) + self.rows
                session.observe(
                    StepRecord(k, self.rows, proposed, accepted, emits, self.shown(draft), self.shown(target) + extra, overhead_ms=0.0)
                )
                done += emits / self.rows
        return sum(map(self.time, self.chosen[start:])) / sum(map(self.tokens, self.chosen[start:]))

    def survivors(self, proposed: int) -> int:
        return next((position for position in range(proposed) if self.random.random() >= self.chance(position)), proposed)


ACCEPTANCE = {
    "0": [0.0],
    "0.3": [0.3],
    "0.6": [0.6],
    "0.8": [0.8],
    "0.95": [0.95],
    "falling": [0.8, 0.6, 0.4, 0.3],
    "rising": [0.6, 0.8, 0.9],
}
DRAFT: dict[str, Cost] = {"lookup": lambda k: 0.01, "heads": lambda k: 0.12, "small": lambda k: 0.05 * k, "large": lambda k: 0.3 * k}
TARGET: dict[str, Cost] = {
    "flat": lambda k: 1 + 0.03 * k,
    "steep": lambda k: 1 + 0.2 * k,
    "jump at 1": lambda k: 1.4 + 0.02 * k if k else 1.0,
    "jump at 6": lambda k: 1 + 0.03 * k + (0.8 if k >= 6 else 0),
}
SETTINGS = [(a, d, t) for a in ACCEPTANCE for d in ("heads", "small", "large") for t in TARGET]


def share_of_best(setting: tuple[str, str, str], texts: int, seeds: int, **options: float) -> float:
    """Throughput of CostModel, trials included, over that of the best fixed K."""
    acceptance, draft, target = ACCEPTANCE[setting[0]], DRAFT[setting[1]], TARGET[setting[2]]
    runs = [Simulation(acceptance, draft, target, seed=seed, **options) for seed in range(seeds)]  # type: ignore[arg-type]
    return runs[0].best_time_per_token() / statistics.fmean(run.run(CostModel().begin(), texts) for run in runs)


@pytest.mark.parametrize("acceptance", ACCEPTANCE)
def test_cost_model_is_close_to_the_best_fixed_k(acceptance: str) -> None:
    shares = {setting: share_of_best(setting, texts=16, seeds=2) for setting in SETTINGS if setting[0] == acceptance}
    assert min(shares.values()) >= 0.95, min(shares.items(), key=lambda item: item[1])


def test_cost_model_is_close_to_the_best_fixed_k_on_a_noisy_machine() -> None:
    shares = [share_of_best(setting, texts=10, seeds=1, jitter=0.1, outliers=0.03, warm_up=20) for setting in SETTINGS]
    assert statistics.fmean(shares) >= 0.95 and min(shares) >= 0.8


def test_cost_model_learns_within_two_texts() -> None:
    shares = [share_of_best(setting, texts=2, seeds=2) for setting in SETTINGS]
    assert statistics.fmean(shares) >= 0.95 and min(shares) >= 0.8


@pytest.mark.parametrize("draft", DRAFT)
@pytest.mark.parametrize("target", TARGET)
def test_a_drafter_that_is_always_wrong_costs_at_most_3_percent(draft: str, target: str) -> None:
    run = Simulation([0.0], DRAFT[draft], TARGET[target], jitter=0.1)
    assert run.run(CostModel().begin(), texts=20) <= 1.03
    assert 0 < sum(k > 0 for k in run.chosen[-1500:]) < 200  # still tried now and then


def test_a_drafter_that_is_always_right_gets_the_largest_k() -> None:
    run = Simulation([1.0], DRAFT["small"], TARGET["flat"])
    run.run(CostModel().begin(), texts=4)
    assert statistics.mode(run.chosen[-40:]) == 8


def test_a_drafter_without_proposals_costs_next_to_nothing() -> None:
    run = Simulation([1.0], DRAFT["lookup"], TARGET["flat"], has_proposal=0.0)
    assert run.run(CostModel().begin(), texts=4) <= 1.01


def test_a_drafter_with_rare_but_good_proposals_stays_in_use() -> None:
    run = Simulation([0.95], DRAFT["lookup"], TARGET["steep"], has_proposal=0.15)
    assert run.best_time_per_token() / run.run(CostModel().begin(), texts=10) >= 0.95
    assert sum(k > 0 for k in run.chosen) > 0.8 * len(run.chosen)


def test_a_change_is_followed_both_ways() -> None:
    session = CostModel().begin()
    good = Simulation([0.85], DRAFT["small"], TARGET["flat"])
    good.run(session, texts=2)
    assert min(good.chosen[-15:]) >= 3
    bad = Simulation([0.02], DRAFT["small"], TARGET["flat"])
    bad.run(session, tokens=150)
    assert sum(bad.chosen[-60:]) <= 25
    better = Simulation([0.85], DRAFT["small"], TARGET["flat"], seed=1)
    better.run(session, tokens=400)
    assert statistics.fmean(better.chosen[-20:]) >= 3


def test_rows_leaving_do_not_start_the_search_again() -> None:
    session = CostModel().begin()
    Simulation([0.8], DRAFT["small"], lambda k: 2 + 0.1 * k, rows=8).run(session, texts=3)
    fewer = Simulation([0.8], DRAFT["small"], lambda k: 1.7 + 0.08 * k, rows=7)
    fewer.run(session, tokens=16)
    assert min(fewer.chosen) >= 3


def test_batches() -> None:
    run = Simulation([0.7], DRAFT["small"], TARGET["steep"], rows=8, jitter=0.05)
    assert run.best_time_per_token() / run.run(CostModel().begin(), texts=8) >= 0.95


def test_a_number_of_rows_that_was_not_measured_at_this_length() -> None:
    session = CostModel().begin()
    Simulation([0.8], DRAFT["lookup"], TARGET["flat"]).run(session, length=128)
    session.new_text(4096)
    for _ in range(8):
        session.observe(StepRecord(session.choose(), 6, (0,) * 6, (0,) * 6, 6, 0.1, 5.0, 0.1))
    session.new_text(128)  # measured with one row only
    assert session.most() >= 0 and session.worth([[0.9, 0.9]] * 6) >= 0


def test_predicted_speedup() -> None:
    run = Simulation([0.8], DRAFT["small"], TARGET["flat"])
    session = CostModel().begin()
    assert session.predicted_speedup() is None
    run.run(session, texts=4)
    assert session.predicted_speedup() == pytest.approx(1 / run.best_time_per_token(), rel=0.15)
    hopeless = CostModel().begin()
    Simulation([0.0], DRAFT["large"], TARGET["steep"]).run(hopeless, texts=4)
    assert hopeless.predicted_speedup() == 1


@pytest.mark.parametrize("bounds", [(0, 0), (0, 1), (2, 2), (1, 3)])
def test_bounds_hold(bounds: tuple[int, int]) -> None:
    run = Simulation([0.6], DRAFT["small"], TARGET["flat"])
    run.run(CostModel(bounds=bounds).begin(), texts=2)
    assert bounds[0] <= min(run.chosen) and max(run.chosen) == bounds[1]


def test_a_text_may_end_at_any_k() -> None:
    session = CostModel().begin()
    for k in (1, 0, 1, 0, 0, 1) * 20:  # never what was chosen: so few tokens were left each time
        session.new_text(128)
        session.choose()
        session.observe(StepRecord(k, 1, (k,), (k,), k + 1, 0.1 * k, 1.0 + 0.1 * k, 0.0))
    assert session.choose() > 0


def test_costs_are_those_of_the_length() -> None:
    session = CostModel().begin()
    short = Simulation([0.3], DRAFT["large"], TARGET["steep"])
    long = Simulation([0.9], DRAFT["small"], TARGET["flat"])
    short.run(session, texts=4, length=128)
    assert sum(k > 0 for k in short.chosen) < 0.2 * len(short.chosen)
    for length in (8192, 7000):
        start = len(long.chosen)
        long.run(session, length=length)
        assert sum(k > 0 for k in long.chosen[start:]) > 0.8 * len(long.chosen[start:])
    start = len(short.chosen)
    short.run(session, length=100)
    assert sum(k > 0 for k in short.chosen[start:]) < 0.2 * len(short.chosen[start:])


def test_fixed() -> None:
    run = Simulation([0.5], DRAFT["small"], TARGET["flat"])
    run.run(Fixed(3).begin())
    assert set(run.chosen) == {3}


def test_adaptive_goes_where_acceptance_leads() -> None:
    always, never = (Simulation([chance], DRAFT["small"], TARGET["flat"]) for chance in (1.0, 0.0))
    session = Adaptive(bounds=(2, 6), window=4).begin()
    always.run(session)
    assert always.chosen[0] == 4 and always.chosen[-1] == 6
    never.run(session)
    assert never.chosen[-1] == 2 and len(never.chosen) == TOKENS


@pytest.mark.parametrize("options", [Fixed(2), Adaptive(), CostModel()])
def test_a_session_can_be_copied_and_goes_on_through_texts(options: Controller) -> None:
    session = options.begin()
    Simulation([0.7], DRAFT["small"], TARGET["flat"]).run(session, texts=2)
    for twin in (copy.deepcopy(session), pickle.loads(pickle.dumps(session))):
        assert twin.choose() == session.choose()


def test_controller_reads_numbers_texts_and_objects() -> None:
    assert read_controller(4) == read_controller("fixed(4)") == read_controller("fixed(k=4)") == read_controller("4") == Fixed(4)
    assert read_controller("adaptive") == Adaptive() and read_controller("adaptive(0.8, window=4)") == Adaptive(0.8, 4)
    assert read_controller("cost_model(bounds=(0, 4))") == read_controller("cost_model(bounds=[0, 4])") == CostModel(bounds=(0, 4))
    assert read_controller(CostModel(look_every=8)) == CostModel(look_every=8)


@pytest.mark.parametrize(
    "text, says",
    [
        (-1, "k is -1: give 0"),
        ("fixed(-1)", "k is -1: give 0"),
        ("fixed(2.5)", "whole number"),
        ("fixed", r"needs k: write fixed\(k=...\)"),
        ("fixd(4)", "did you mean 'fixed'"),
        ("cost_model(bound=(0, 8))", "'bound', did you mean 'bounds'\\? available: bounds, look_every, budget"),
        ("cost_model(bounds=(4, 2))", "smaller first"),
        ("cost_model(bounds=8)", "two whole numbers"),
        ("cost_model(budget=2)", "between 0 and 1"),
        ("adaptive(bounds=(0, 8))", "1 or more"),
        ("adaptive(target=1.5)", "between 0 and 1"),
        ("adaptive(window=0)", "at least 1"),
        ("fixed(1, 2)", "takes k"),
        ("fixed(1, k=2)", "'k' is given twice"),
        ("2.5", "k is 2.5: give a whole number"),
        ("fixed(k=four)", "k is 'four': give a whole number"),
        ("fixed(k=f(4))", "k=f\\(4\\) is not a literal"),
        ("fixed(4", "cannot read"),
    ],
)
def test_bad_controllers_are_refused_by_name(text: str | int, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        read_controller(text)
    assert isinstance(text, int) or isinstance(error.value, SpecError)


def test_a_controller_that_is_no_number_text_or_object_is_refused() -> None:
    for value in (None, True, 2.0):
        with pytest.raises(TypeError, match="give a number of drafts"):
            read_controller(value)  # type: ignore[arg-type]
