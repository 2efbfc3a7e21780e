"""The controller that measures what drafts cost and bring, and drafts where that pays: `CostModel`.

It maximises, over K, expected tokens per millisecond of a whole round:

    (1 + a_1 + a_1 a_2 + ... + a_1...a_K) / (draft(K) + verify(K) + overhead(K))

with the terms of Leviathan et al. 2023 (arXiv 2211.17192, section 3.3). Differs from the paper in that acceptance is estimated by
position, costs are measured while generating, and K = 0, a plain step, competes with the rest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from patchkit.speculation.controllers import Bounds, Controller, ControllerSession, checked_bounds
from patchkit.speculation.controllers.cost_curve import Costs, Rate
from patchkit.speculation.statistics import StepRecord


@dataclass(frozen=True)
class CostModel(Controller, name="cost_model"):
    """A bandit over K: choose the K with the best expected tokens per millisecond, as measured; 0 where drafting does not pay.

    1. The first rounds draft twice and take a plain step or two.
    2. While drafting, it measures another K from time to time: plain steps and the neighbours of the chosen K.
    3. While not drafting, it makes trials of two drafted rounds, less and less often, until trials lose no more than `budget`. A trial
       goes on while drafts are accepted.

    Attributes:
        bounds: smallest and largest K; 0 lets it stop drafting.
        look_every: rounds of drafting between two measurements of another K.
        budget: share of the time, 0 to 1, that trials may lose while drafting does not pay.
    """

    bounds: Bounds = (0, 8)
    look_every: int = 16
    budget: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", checked_bounds(self.bounds, smallest=0))
        if self.look_every < 2:
            raise ValueError(f"look_every is {self.look_every}: give at least 2 rounds")
        if not 0 < self.budget < 1:
            raise ValueError(f"budget is {self.budget}: give a share of the time between 0 and 1, such as 0.01")

    def begin(self) -> ControllerSession:
        return _CostModelSession(self)


# K of the first rounds.
_FIRST_K = 2

# Speed-up of drafting above which the first rounds do without a second plain step.
_FAR_AHEAD = 1.5

# Acceptance that is assumed before the first outcome, and its weight in outcomes.
_PRIOR, _PRIOR_WEIGHT = 0.7, 2.0

# Outcomes that past acceptance counts for at most when a sequence or a trial begins.
_REMEMBERED_AT_NEW_TEXT, _REMEMBERED_AT_TRIAL = 16.0, 4.0

_TRIAL_ROUNDS, _LONGEST_TRIAL = 2, 8

# Factor by which the first trials are more frequent than the budget allows. Each failure halves their frequency.
_EAGERNESS = 8

_FEWEST_BETWEEN_TRIALS = 16

# Exploration bonus: the expected speed of a K that was measured n times counts 1 + _BONUS / n times.
_BONUS = 0.1

# Plain steps after which the drafter has tokens to catch up on, so that its next call is not representative of its cost.
_GAP = 3


# Share of a plain step up to which a search for drafts counts as free, and the weight of the last one in its mean.
_FREE, _SEARCH_WEIGHT = 0.05, 0.1


class _CostModelSession(ControllerSession):
    def __init__(self, options: CostModel) -> None:
        self.options = options
        self.smallest, self.largest = options.bounds
        self.costs: dict[int, Costs] = {}  # by rows
        self.costs_by_length: dict[int, dict[int, Costs]] = {}  # of prompts within a factor of four
        self.rows = 1
        self.has_proposal, self.row_has_proposal, first = (Rate(_PRIOR * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for _ in range(3))
        # By position, of the rows that have a proposal. The prior of a position is the acceptance at the one before.
        self.accepted = [first, *(Rate() for _ in range(1, self.largest))][: self.largest]
        self.first = deque(self._first_rounds())
        self.plain_in_a_row = _GAP  # at the start of a sequence the drafter has all of it to read
        self.since_look = self.looks = 0
        self.trial_rounds = self.trial_end = self.failed_trials = 0
        self.trial_loss = 0.0  # of the last one, in plain steps
        self.search_ms = 0.0  # of the drafter when it was asked for chances, running mean
        self.asked = False  # it was, for the next round
        self.declined, self.patience = 0, options.look_every  # proposals of which nothing was kept, and how many until one is tried
        self.tokens = [1.0] * (self.largest + 1)  # expected of a round of K, per row
        self.speeds = [1.0] * (self.largest + 1)  # tokens per millisecond
        self.promises = [1.0] * (self.largest + 1)  # tokens per millisecond, with the exploration bonus

    def choose(self) -> int:
        if self.first:
            return self.first[0]
        if self.trial_end:
            return self._best(at_least=1)
        best = self._best()
        if best and self.since_look >= self.options.look_every:
            return self._neighbour_of(best)
        return best

    def most(self) -> int:
        # A drafter whose search costs something, compared with a step, is asked only where acceptance by position says that it pays.
        most = self.choose() if self.first or self._search_costs() else self.largest
        self.asked = most > 0
        return most

    def worth(self, chances: Sequence[Sequence[float]]) -> int:
        """Number of drafts with the best expected tokens per millisecond, by the chances given and the costs measured."""
        longest = min(max(map(len, chances)), self.largest)
        if self.first or self.rows not in self.costs:
            return longest
        curve, survive = self.costs[self.rows].target, [1.0] * len(chances)
        # As measured, where it was: libraries may take longer for two rows than for four, which the curve, as it never falls, hides.
        costs = [curve.typical[n] if len(curve.times.get(n, ())) > 1 else curve.at[n] for n in range(longest + 1)]
        costs = [self.search_ms + each for each in costs]  # the search has been paid for, whatever is verified of it
        expected, speeds = float(len(chances)), [len(chances) / costs[0]]
        for n in range(longest):
            survive = [each * (row[n] if n < len(row) else 0.0) for each, row in zip(survive, chances, strict=True)]
            expected += sum(survive)
            speeds.append(expected / costs[n + 1])
        best = max(range(self.smallest, longest + 1), key=speeds.__getitem__, default=longest)
        if best or not longest:
            self.declined, self.patience = 0, self.options.look_every
            return best
        self.declined += 1
        if self.declined < self.patience:
            return 0
        # Costs that were measured in a bad moment must not keep drafts away for ever: look again, more and more rarely, but as often as
        # the budget allows.
        nearest = max(range(1, longest + 1), key=speeds.__getitem__)
        loss = costs[nearest] * (speeds[0] - speeds[nearest]) / len(chances)  # in plain steps
        self.declined, self.patience = 0, max(self.options.look_every, min(2 * self.patience, round(loss / self.options.budget)))
        return nearest

    def observe(self, record: StepRecord) -> None:
        if self.asked:
            self.search_ms += _SEARCH_WEIGHT * (record.draft_ms - self.search_ms)
        if record.rows < self.rows:  # rows with fewer accepted drafts remain
            self._discount(_REMEMBERED_AT_NEW_TEXT)
        self.rows = record.rows
        if self.rows not in self.costs:
            nearest = min(self.costs, key=lambda rows: abs(rows - self.rows), default=None)
            self.costs[self.rows] = Costs(self.largest) if nearest is None else self.costs[nearest].once()
        self.costs[self.rows].add(record, gap=self.plain_in_a_row >= _GAP)
        self.plain_in_a_row = 0 if record.k else self.plain_in_a_row + 1
        self._learn(record)
        self._estimate()
        if self.first:
            self._go_on_with_first_rounds(record)
        elif self.trial_end:
            self._go_on_trying(record)
        else:
            self._count_towards_look()

    def new_text(self, tokens: int) -> None:
        self.plain_in_a_row = _GAP
        self._discount(_REMEMBERED_AT_NEW_TEXT)
        self.costs = self.costs_by_length.setdefault(tokens.bit_length() // 2, {})
        if not self.costs:  # costs and gains of drafting may differ at this length
            self._begin_again()

    def new_weights(self) -> None:
        self.failed_trials = 0
        self.declined, self.patience = 0, self.options.look_every
        self._begin_again()

    def predicted_speedup(self) -> float | None:
        if self.rows not in self.costs or 0 not in self.costs[self.rows].target.times:
            return None
        return self.speeds[self._best()] / self.speeds[0]

    def _learn(self, record: StepRecord) -> None:
        if record.k == 0:
            if self.asked and self.accepted and self._search_costs():
                self.accepted[0].add(False)  # a search that was paid for found nothing that is worth verifying
            return
        self.has_proposal.add(record.longest > 0)
        for proposed, accepted in zip(record.proposed, record.accepted, strict=True):
            self.row_has_proposal.add(proposed > 0)
            # Drafts that are missing count as rejected.
            for position in range(min(accepted + 1, record.k, self.largest) if proposed else 0):
                self.accepted[position].add(accepted > position)

    def _begin_again(self) -> None:
        self._discount(_REMEMBERED_AT_TRIAL)
        self.first = deque(self._first_rounds())
        self.trial_end = 0

    def _discount(self, remembered: float) -> None:
        for rate in (self.has_proposal, self.row_has_proposal, *self.accepted):
            rate.forget(remembered)

    def _estimate(self) -> None:
        costs = self.costs[self.rows]
        plain, share = costs.target.at[0], self.has_proposal.share
        draft = (costs.draft if costs.draft.times else costs.draft_after_gap).at
        self.speeds[0] = self.promises[0] = 1 / plain
        accepted, survives, chance = 0.0, 1.0, _PRIOR
        for k, rate in enumerate(self.accepted, start=1):
            chance = rate.share if k == 1 else rate.share_given(prior=chance)
            survives *= chance
            accepted += survives
            self.tokens[k] = 1 + self.row_has_proposal.share * accepted
            self.speeds[k] = self.tokens[k] / (draft[k] + share * costs.target.at[k] + (1 - share) * plain)
            measured = sum(len(each.target.times.get(k, ())) for each in self.costs.values())
            self.promises[k] = self.speeds[k] * (1 + _BONUS / max(measured, 1))

    def _first_rounds(self) -> list[int]:
        if self.smallest > 0 or self.largest == 0:
            return []
        return [min(_FIRST_K, self.largest), 0, min(_FIRST_K, self.largest)]

    def _go_on_with_first_rounds(self, record: StepRecord) -> None:
        self.first.popleft()
        # A plain step during a warm-up would favour drafting, so a second one follows, unless drafting is far ahead.
        if not self.first and self.speeds[self._best()] < _FAR_AHEAD * self.speeds[0] and len(self._plain_times()) < 2:
            self.first.append(0)

    def _plain_times(self) -> Collection[float]:
        # Nothing was measured yet where no first rounds are asked for, or where the last call had another number of rows.
        return self.costs[self.rows].target.times.get(0, ()) if self.rows in self.costs else ()

    def _search_costs(self) -> bool:
        plain = self._plain_times()
        return bool(plain) and self.search_ms > _FREE * min(plain)

    def _count_towards_look(self) -> None:
        self.since_look += 1
        if self._best():
            self.failed_trials = 0
            if self.since_look > self.options.look_every:
                self.since_look, self.looks = 0, self.looks + 1
        elif self.largest and self.since_look >= self._rounds_between_trials():
            self.trial_rounds, self.trial_end, self.trial_loss = 0, _TRIAL_ROUNDS, 0.0
            self._discount(_REMEMBERED_AT_TRIAL)

    def _go_on_trying(self, record: StepRecord) -> None:
        self.trial_rounds += 1
        self.trial_loss += record.total_ms * self.speeds[0] - record.emitted / record.rows
        if any(record.accepted):
            self.trial_end = min(self.trial_rounds + _TRIAL_ROUNDS, _LONGEST_TRIAL)
        if self.trial_rounds >= self.trial_end:
            self.failed_trials += 1
            self.trial_end = self.since_look = 0

    def _rounds_between_trials(self) -> float:
        k = self._best(at_least=1)
        expected_loss = _TRIAL_ROUNDS * self.tokens[k] * (self.speeds[0] / self.speeds[k] - 1)
        return max(
            _FEWEST_BETWEEN_TRIALS, max(expected_loss, self.trial_loss) / self.options.budget * min(1, 2**self.failed_trials / _EAGERNESS)
        )

    def _neighbour_of(self, best: int) -> int:
        """Return another K to measure: K + 1, K - 1, K + 2 and 0, one after the other, where the bounds allow it; else ``best``."""
        k = (best + 1, best - 1, best + 2, 0)[self.looks % 4]
        return k if self.smallest <= k <= self.largest else best

    def _best(self, at_least: int = 0) -> int:
        if at_least == 0 == self.smallest and self.speeds[0] >= max(self.speeds):
            return 0  # the bonus must not decide between drafting and plain steps
        return max(range(max(self.smallest, at_least), self.largest + 1), key=self.promises.__getitem__)
