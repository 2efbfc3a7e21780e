"""Chunks of prompts between rounds, on a simulated machine: a forward of n tokens takes a + b n seconds."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from patchkit.speculation.pace import SHARE, Pace

MOST = 512


@dataclass
class Machine:
    """Costs of forwards in milliseconds.

    Attributes:
        forward: of any forward.
        token: of a token, at the beginning of a prompt.
        row: of a row in a round.
        noise: share by which each time differs.
    """

    forward: float
    token: float
    row: float
    noise: float = 0.0
    slowing: float = 0.0

    def __post_init__(self) -> None:
        self.chance = random.Random(0)

    def _seconds(self, ms: float) -> float:
        return ms / 1000 * self.chance.uniform(1 - self.noise, 1 + self.noise)

    def chunk(self, tokens: int, fed: int) -> float:
        return self._seconds(self.forward + self.token * tokens * (1 + self.slowing * fed / 4096))

    def round(self, rows: int) -> float:
        return self._seconds(self.forward + self.row * rows)


def feed(pace: Pace, machine: Machine, prompts: list[int], rows: int) -> list[tuple[int, float, float]]:
    """Feed prompts of these lengths while ``rows`` sequences are generated: tokens, and seconds of chunks and of the round, per step."""
    steps, left, fed = [], list(prompts), 0
    while left:
        pace.begin(rows)
        tokens, seconds = 0, 0.0
        while left and (most := pace.next(fed + left[0])) > 0:
            count = min(most, left[0])
            taken = machine.chunk(count, fed)
            pace.fed(count, taken)
            tokens, seconds, fed = tokens + count, seconds + taken, fed + count
            left[0] -= count
            if not left[0]:
                left.pop(0)
                fed = 0
        own = machine.round(rows)
        pace.round(own)
        steps.append((tokens, seconds, own))
    return steps


MACHINES = {
    "small": Machine(forward=5.0, token=0.3, row=1.0),
    "large": Machine(forward=55.0, token=2.0, row=4.0),
    "noisy": Machine(forward=5.0, token=0.3, row=1.0, noise=0.05),
    "slower with the context": Machine(forward=20.0, token=1.0, row=3.0, slowing=1.0),
    "tokens are cheap": Machine(forward=10.0, token=0.01, row=1.0),
}


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("rows", [1, 4, 8])
def test_a_long_prompt_makes_nobody_wait_for_three_rounds(name: str, rows: int) -> None:
    machine, pace = MACHINES[name], Pace(MOST)
    # Before, the prompts of the others were fed, at first while nothing was generated.
    feed(pace, machine, [20], 0)
    for others in range(1, rows):
        feed(pace, machine, [20], others)
    for _ in range(5):
        pace.round(machine.round(rows))
    steps = feed(pace, machine, [4096], rows)
    assert sum(tokens for tokens, _, _ in steps) == 4096
    shares = [seconds / own for _, seconds, own in steps]
    assert max(shares) < 2.0  # so that a step takes less than three rounds
    settled = shares[6:-1]
    assert all(share <= SHARE * 1.15 for share in settled)
    # Most of what may be used is used, unless chunks are as large as they may be.
    assert all(share > 0.75 * SHARE for share in settled) or max(tokens for tokens, _, _ in steps) == MOST


def test_all_is_fed_where_nothing_is_generated() -> None:
    pace, machine = Pace(100), MACHINES["small"]
    assert [tokens for tokens, _, _ in feed(pace, machine, [40, 30, 250], 0)] == [100, 100, 100, 20]


def test_prompts_go_on_where_a_forward_takes_longer_than_allowed() -> None:
    """A round that a compiled step makes cheap: no chunk fits, and a few tokens are fed all the same."""
    pace, machine = Pace(MOST), Machine(forward=5.0, token=0.3, row=1.0)
    pace.begin(0)
    pace.fed(64, 0.1)
    for _ in range(5):
        pace.round(0.0005)
    pace.begin(2)
    first = pace.next(500)
    assert 0 < first <= 8
    pace.fed(first, machine.chunk(first, 0))
    assert pace.next(500) == 0


def test_a_second_prompt_is_fed_in_the_same_step_if_there_is_time() -> None:
    pace = Pace(MOST)
    machine = Machine(forward=1.0, token=0.3, row=20.0)  # a round has time for several chunks
    feed(pace, machine, [64], 0)
    for _ in range(5):
        pace.round(machine.round(4))
    steps = feed(pace, machine, [17] * 12, 4)
    assert max(tokens for tokens, _, _ in steps) >= 34
    assert all(seconds <= SHARE * 1.15 * own for _, seconds, own in steps[1:])


@pytest.mark.parametrize("forward", [24.0, 29.0, 40.0, 200.0])
def test_tokens_that_cost_little_beside_a_forward_are_not_fed_by_a_few(forward: float) -> None:
    """Rounds of 20 ms, as of compiled code, and forwards of prompts that take longer, whatever they are fed."""
    pace, machine = Pace(MOST), Machine(forward=forward, token=0.01, row=20.0 - forward)
    feed(pace, machine, [20], 0)
    for _ in range(5):
        pace.round(machine.round(1))
    steps = feed(pace, machine, [4096], 1)
    assert len(steps) < 80 and max(tokens for tokens, _, _ in steps) >= 100
    longest = max(seconds for _, seconds, _ in steps)
    assert longest <= 1.02 * max(SHARE * 0.020, 1.25 * (forward + 4 * 0.01) / 1000)


def test_a_clock_that_stands_still_or_jumps() -> None:
    pace, machine = Pace(MOST), Machine(forward=5.0, token=0.3, row=1.0)
    pace.round(0.0)
    for seconds in (0.0, 0.001):
        pace.begin(1)
        pace.fed(pace.next(500), seconds)
    assert pace.next(500) == 0
    for _ in range(5):
        pace.round(machine.round(4))
    pace.begin(4)
    pace.fed(pace.next(500), 30.0)
    assert pace.next(500) == 0
    sizes = [tokens for tokens, _, _ in feed(pace, machine, [512], 4)]
    assert sizes[0] <= 8 and max(sizes[:8]) > 20


def test_a_short_prompt_is_not_cut() -> None:
    """Where a forward alone takes longer than allowed, a prompt of 20 tokens in chunks of four would take five of them."""
    pace, machine = Pace(MOST), Machine(forward=20.0, token=0.3, row=1.0)
    pace.begin(0)
    pace.fed(64, 0.1)
    for _ in range(5):
        pace.round(0.004)
    assert [tokens for tokens, _, _ in feed(pace, machine, [20, 18], 2)] == [20, 18]
    assert feed(pace, machine, [300], 2)[0][0] < 20
