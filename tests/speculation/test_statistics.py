from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from patchkit.speculation.statistics import RunStatistics, StepRecord, expected_tokens, formula_speedup


def step(k: int, proposed: tuple[int, ...], accepted: tuple[int, ...], ms: tuple[float, float, float] = (0.0, 10.0, 0.0)) -> StepRecord:
    return StepRecord(k, len(proposed), proposed, accepted, sum(accepted) + len(accepted), *ms)


@pytest.fixture
def run() -> RunStatistics:
    result = RunStatistics(prompt_tokens=7, drafter="draft", acceptance="exact", memory_bytes=100)
    result.add(step(0, (0,), (0,), (0, 8, 2)))
    result.add(step(3, (3,), (3,), (6, 12, 2)))
    result.add(step(3, (3,), (1,), (6, 12, 2)))
    result.add(step(3, (2,), (0,), (6, 11, 2)))
    result.add(step(3, (0,), (0,), (1, 8, 2)))
    return result


def test_counts(run: RunStatistics) -> None:
    assert (run.proposed, run.accepted, run.emitted) == (8, 4, 9)
    assert run.acceptance_rate == 4 / 8
    assert run.accepted_histogram == {0: 1, 1: 1, 3: 1}
    assert run.tokens_per_target_step == 9 / 5
    assert (run.draft_ms, run.verify_ms, run.overhead_ms) == (19, 51, 10)


def test_acceptance_by_position(run: RunStatistics) -> None:
    assert run.conditional_acceptance_by_position == [2 / 3, 1 / 2, 1 / 1]
    assert run.unconditional_acceptance_by_position == [2 / 3, 1 / 3, 1 / 2]


def test_a_position_that_no_draft_survived_to_has_no_conditional_acceptance() -> None:
    run = RunStatistics([step(3, (3,), (0,))])
    assert run.conditional_acceptance_by_position == [0.0]
    assert run.unconditional_acceptance_by_position == [0.0, 0.0, 0.0]


def test_speedups(run: RunStatistics) -> None:
    assert run.plain_ms == 10  # a round without drafts is a plain step
    assert run.achieved_speedup == pytest.approx(9 * 10 / 80)
    # rounds of longest draft 0: 1 token, 10 (and 1 or 0 for the drafter); of 3: 1 + 2/3 + 2/3*1/2 + 1/3; of 2: without the last.
    plain_time = 10 * (2 * 1 + 2 * (2 + 1 / 3) + (2 + 0))
    assert run.predicted_speedup == pytest.approx(plain_time / (2 * 10.5 + 2 * 20 + 19))


def test_speedups_need_the_time_of_a_plain_step() -> None:
    run = RunStatistics([step(2, (2, 2), (2, 1), (1, 19, 0)), step(2, (2,), (2,), (1, 9, 0))])
    assert run.achieved_speedup is None and run.predicted_speedup is None and run.plain_ms is None
    run.plain_ms_by_rows = {2: 15.0}
    assert run.achieved_speedup == pytest.approx(15 * 5 / 2 / 20)  # the round of one row is left out


def test_prediction_is_right_if_acceptance_and_costs_are_constant() -> None:
    run = RunStatistics([step(2, (2,), (accepted,), (2, 12, 1)) for accepted in (0, 1, 2, 2)] + [step(0, (0,), (0,))])
    assert run.predicted_speedup == pytest.approx(run.achieved_speedup)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.9, 1.0])
def test_formula(acceptance: float) -> None:
    k, c, v = 4, 0.1, 1.3
    closed = k + 1 if acceptance == 1 else (1 - acceptance ** (k + 1)) / (1 - acceptance)
    assert formula_speedup(acceptance, k, c, v) == pytest.approx(closed / (k * c + v))
    assert expected_tokens([]) == formula_speedup(acceptance, 0, c, 1) == 1


@pytest.mark.parametrize(
    "arguments, says", [((1.2, 4, 0.1, 1), "probability"), ((0.5, -1, 0.1, 1), "k is -1"), ((0.5, 0, 0, 0), "above 0")]
)
def test_formula_refuses(arguments: tuple[float, int, float, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        formula_speedup(*arguments)


def test_merged_adds_counts_and_keeps_the_largest_memory(run: RunStatistics) -> None:
    other = RunStatistics([step(1, (1, 1), (1, 0))], prompt_tokens=3, near_ties=1, near_tie_checked=4, memory_bytes=50, drafter="draft")
    both = RunStatistics.merged([run, other])
    assert both.emitted == run.emitted + 3 and both.prompt_tokens == 10 and both.memory_bytes == 100
    assert both.drafter == "draft" and both.acceptance == "exact" and both.near_tie_rate == 0.25
    assert len(run.steps) == 5 and RunStatistics.merged([]).emitted == 0


def test_files(run: RunStatistics, tmp_path: Path) -> None:
    run.write_json(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(run.to_dict()))
    run.add(step(2, (2, 1), (1, 1)))
    run.write_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines] == list(range(6))
    assert lines[5]["proposed"] == "2 1" and float(lines[1]["draft_ms"]) == 6


def test_text(run: RunStatistics) -> None:
    assert "9 tokens in 5 target steps" in str(run) and "50 % of 8 drafts" in str(run) and "1.12 x plain" in str(run)
    assert str(RunStatistics()) == "no rounds"
    json.dumps(RunStatistics().to_dict(), allow_nan=False)


@pytest.mark.parametrize("proposed, accepted", [((2,), (3,)), ((2, 2), (1,))])
def test_a_record_that_contradicts_itself_is_refused(proposed: tuple[int, ...], accepted: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="accepted"):
        StepRecord(2, len(proposed), proposed, accepted, 3, 0.0, 1.0, 0.0)
