"""How many tokens to draft: `Fixed`, `Adaptive`, and `CostModel`, which measures and may decide not to draft at all.

A controller is options; `begin` gives the session that holds what was measured. Keep one session for the life of a patch, and tell it of
every `new_text`: costs and acceptance are worth remembering, and an unsuitable drafter need not be found out again and again.

CostModel maximises, over K, expected tokens per millisecond of a whole round:

    (1 + a_1 + a_1 a_2 + ... + a_1...a_K) / (draft(K) + verify(K) + overhead(K))

with the terms of Leviathan et al. 2023 (arXiv 2211.17192, section 3.3). Differs from the paper in that acceptance is estimated by
position, costs are measured while generating, and K = 0, a plain step, competes with the rest.
"""

from __future__ import annotations

import ast
import bisect
import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from patchkit.errors import SpecError
from patchkit.speculation.statistics import StepRecord

Bounds = tuple[int, int]


class ControllerSession(ABC):
    """A controller at work; lives as long as the patch."""

    @abstractmethod
    def choose(self) -> int:
        """K for the next round; 0 is a plain step."""

    def observe(self, record: StepRecord) -> None:  # noqa: B027
        """After a round."""

    def new_text(self, tokens: int) -> None:  # noqa: B027
        """Before the first round of another text, whose prompt has so many tokens."""

    def predicted_speedup(self) -> float | None:
        """Plain over speculative time per token at the K that would be chosen now; None if that is not known."""
        return None

    def why_plain(self) -> str | None:
        """Why `choose` may have given 0 again and again; None if that is what was asked for."""
        return "no number of drafts is expected to pay"


class Controller(ABC):
    """Options of a way to choose K: a frozen dataclass, validated in `__post_init__`, without run-time state."""

    @abstractmethod
    def begin(self) -> ControllerSession:
        """A fresh session."""


@dataclass(frozen=True)
class Fixed(Controller):
    """Always K.

    Attributes:
        k: drafts per round; 0 is plain decoding.
    """

    k: int

    def __post_init__(self) -> None:
        _check_count("k", self.k)

    def begin(self) -> ControllerSession:
        return _FixedSession(self.k)


@dataclass
class _FixedSession(ControllerSession):
    k: int

    def choose(self) -> int:
        return self.k

    def why_plain(self) -> str | None:
        return None


@dataclass(frozen=True)
class Adaptive(Controller):
    """More drafts while most are accepted, fewer while not. Knows no costs, hence never stops drafting if bounds start above 0.

    Attributes:
        target: acceptance rate, over the last `window` rounds, above which K goes up and below which it goes down.
        window: rounds.
        step: by how much K goes up or down.
        bounds: smallest and largest K; a session starts half-way.
    """

    target: float = 0.7
    window: int = 16
    step: int = 1
    bounds: Bounds = (1, 8)

    def __post_init__(self) -> None:
        if not 0 < self.target < 1:
            raise ValueError(f"target is {self.target}: give an acceptance rate between 0 and 1, such as 0.7")
        for name in ("window", "step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give at least 1")
        object.__setattr__(self, "bounds", _checked_bounds(self.bounds, smallest=1))

    def begin(self) -> ControllerSession:
        return _AdaptiveSession(self)


class _AdaptiveSession(ControllerSession):
    def __init__(self, options: Adaptive) -> None:
        self.options = options
        self.k = (options.bounds[0] + options.bounds[1] + 1) // 2
        self.rounds: deque[tuple[int, int]] = deque(maxlen=options.window)

    def choose(self) -> int:
        return self.k

    def observe(self, record: StepRecord) -> None:
        if record.longest == 0:
            return
        self.rounds.append((sum(record.proposed), sum(record.accepted)))
        proposed, accepted = (sum(column) for column in zip(*self.rounds, strict=True))
        rate = accepted / proposed
        if rate != self.options.target:
            step = self.options.step if rate > self.options.target else -self.options.step
            self.k = min(max(self.k + step, self.options.bounds[0]), self.options.bounds[1])


@dataclass(frozen=True)
class CostModel(Controller):
    """The K with the best expected tokens per millisecond, as measured; 0 where drafting does not pay.

    The first rounds draft twice and take a plain step or two. Afterwards what is not in use is looked at now and then: while drafting,
    plain steps and the K next to the chosen one; while not drafting, a trial of two drafted rounds, ever more rarely, until trials lose
    no more than `budget`. A trial goes on while drafts are accepted.

    Attributes:
        bounds: smallest and largest K; 0 lets it stop drafting.
        look_every: rounds of drafting between two looks at another K.
        budget: share of the time that trials may lose while drafting does not pay.
    """

    bounds: Bounds = (0, 8)
    look_every: int = 16
    budget: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "bounds", _checked_bounds(self.bounds, smallest=0))
        if self.look_every < 2:
            raise ValueError(f"look_every is {self.look_every}: give at least 2 rounds")
        if not 0 < self.budget < 1:
            raise ValueError(f"budget is {self.budget}: give a share of the time between 0 and 1, such as 0.01")

    def begin(self) -> ControllerSession:
        return _CostModelSession(self)


# K of the first rounds; a second plain step is left out where drafting is so many times faster.
_FIRST_K = 2
_FAR_AHEAD = 1.5
# Between two K that were measured, times are taken to rise by so much of a straight line: optimism makes a promising K be tried.
_PESSIMISM = 0.5
# What is assumed before anything is seen, with the weight of so many outcomes.
_PRIOR, _PRIOR_WEIGHT = 0.7, 2.0
_NEIGHBOUR_WEIGHT = 6.0
# Each outcome counts this much less per later outcome at the same position: some 50 are remembered; fewer where something new begins.
_DECAY = 0.98
_REMEMBERED_AT_NEW_TEXT, _REMEMBERED_AT_TRIAL = 16.0, 4.0
_TRIAL_ROUNDS, _LONGEST_TRIAL = 2, 8
# Trials start this much more often than the budget allows, and become half as frequent with each failure.
_EAGERNESS = 8
_FEWEST_BETWEEN_TRIALS = 16
# A K measured n times is tried if it comes within 1 / n of this share of the best.
_BONUS = 0.1
# Rounds per K from which its cost is taken.
_WINDOW = 15
# A K that was measured once and took more than so many times what was expected may have met a warm-up (a compilation, say): until it is
# measured again, it counts as expected.
_SURPRISE = 1.3
# Changes of a typical time below this share are not followed, which saves most of the controller's own time.
_NO_CHANGE = 0.01
# After so many plain steps the drafter has a text to catch up on, and its next call says little about its usual cost.
_GAP = 3


class _Rate:
    """A running share that forgets."""

    def __init__(self, hits: float = 0.0, total: float = 0.0) -> None:
        self.hits, self.total = hits, total

    def add(self, hit: bool) -> None:
        self.hits = _DECAY * self.hits + hit
        self.total = _DECAY * self.total + 1

    @property
    def share(self) -> float:
        return self.hits / self.total

    def share_given(self, prior: float) -> float:
        return (self.hits + _NEIGHBOUR_WEIGHT * prior) / (self.total + _NEIGHBOUR_WEIGHT)

    def forget(self, remembered: float) -> None:
        """Let what was seen weigh no more than so many outcomes."""
        if self.total > remembered:
            self.hits, self.total = self.hits * remembered / self.total, remembered


class _Curve:
    """Milliseconds as a function of K that never falls, from running measurements at some K.

    Because it never falls, a larger K's time bounds a smaller one's, which also keeps one slow round from spoiling others.
    """

    def __init__(self, grows: bool, largest: int) -> None:
        self.grows = grows  # from 0, and in a straight line beyond the largest K known; otherwise no more than is shown there
        self.times: dict[int, deque[float]] = {}
        self.typical: dict[int, float] = {}
        self.at = [0.0] * (largest + 1)  # by K

    def add(self, k: int, ms: float) -> None:
        self.times.setdefault(k, deque(maxlen=_WINDOW)).append(ms)
        typical = _typical(self.times[k])
        if len(self.times[k]) > 2 and abs(typical - self.typical[k]) < _NO_CHANGE * typical:
            return
        self.typical[k] = typical
        points = self._points()
        self.at = [self._between(points, k) for k in range(len(self.at))]

    def _points(self) -> list[tuple[int, float]]:
        points = [(0, 0.0)] if self.grows else []
        for k in sorted(self.typical):
            ms = self.typical[k]
            if len(self.times[k]) == 1 and len(points) > self.grows and ms > _SURPRISE * self._beyond(points, k):
                ms = self._beyond(points, k)
            while points and points[-1][1] > ms:
                points.pop()
            points.append((k, ms))
        return points

    def _between(self, points: list[tuple[int, float]], k: int) -> float:
        index = bisect.bisect_right(points, (k, math.inf))
        if index == 0:
            return points[0][1]
        if index == len(points):
            return self._beyond(points, k)
        (left, low), (right, high) = points[index - 1], points[index]
        return low + _PESSIMISM * (high - low) * (k - left) / (right - left)

    def _beyond(self, points: list[tuple[int, float]], k: int) -> float:
        last, ms = points[-1]
        if not self.grows or len(points) == 1:
            return ms
        before, less = points[-2]
        return ms + (ms - less) * (k - last) / (last - before)


class _Costs:
    """Milliseconds by K for one number of rows."""

    def __init__(self, largest: int) -> None:
        self.largest = largest
        self.target = _Curve(grows=False, largest=largest)
        self.draft = _Curve(grows=True, largest=largest)
        self.draft_after_gap = _Curve(grows=True, largest=largest)

    def add(self, record: StepRecord, gap: bool) -> None:
        self.target.add(record.k if record.longest else 0, record.target_ms)
        if record.k:
            (self.draft_after_gap if gap else self.draft).add(record.k, record.draft_ms)

    def once(self) -> _Costs:
        """The same figures, each as if measured once."""
        result = _Costs(self.largest)
        for name in ("target", "draft", "draft_after_gap"):
            for k, ms in getattr(self, name).typical.items():
                getattr(result, name).add(k, ms)
        return result


class _CostModelSession(ControllerSession):
    def __init__(self, options: CostModel) -> None:
        self.options = options
        self.smallest, self.largest = options.bounds
        self.costs: dict[int, _Costs] = {}  # by rows
        self.costs_by_length: dict[int, dict[int, _Costs]] = {}  # of prompts within a factor of four
        self.rows = 1
        self.has_proposal, self.row_has_proposal, first = (_Rate(_PRIOR * _PRIOR_WEIGHT, _PRIOR_WEIGHT) for _ in range(3))
        # By position, of the rows that have a proposal. What is not known of a position is taken from the one before.
        self.accepted = [first, *(_Rate() for _ in range(1, self.largest))][: self.largest]
        self.first = deque(self._first_rounds())
        self.plain_in_a_row = _GAP  # at the start of a text the drafter has all of it to read
        self.since_look = self.looks = 0
        self.trial_rounds = self.trial_end = self.failed_trials = 0
        self.trial_loss = 0.0  # of the last one, in plain steps
        self.tokens = [1.0] * (self.largest + 1)  # expected of a round of K, per row
        self.speeds = [1.0] * (self.largest + 1)  # tokens per millisecond
        self.promises = [1.0] * (self.largest + 1)  # the same, with a bonus for what is hardly known

    def choose(self) -> int:
        if self.first:
            return self.first[0]
        if self.trial_end:
            return self._best(at_least=1)
        best = self._best()
        if best and self.since_look >= self.options.look_every:
            return self._look_beside(best)
        return best

    def observe(self, record: StepRecord) -> None:
        if record.rows < self.rows:  # those whose drafts were accepted less go on
            self._forget(_REMEMBERED_AT_NEW_TEXT)
        self.rows = record.rows
        if self.rows not in self.costs:
            nearest = min(self.costs, key=lambda rows: abs(rows - self.rows), default=None)
            self.costs[self.rows] = _Costs(self.largest) if nearest is None else self.costs[nearest].once()
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
        self._forget(_REMEMBERED_AT_NEW_TEXT)
        self.costs = self.costs_by_length.setdefault(tokens.bit_length() // 2, {})
        if not self.costs:  # what drafting costs, and what it is worth, may be another matter at this length
            self._forget(_REMEMBERED_AT_TRIAL)
            self.first = deque(self._first_rounds())
            self.trial_end = 0

    def predicted_speedup(self) -> float | None:
        if self.rows not in self.costs or 0 not in self.costs[self.rows].target.times:
            return None
        return self.speeds[self._best()] / self.speeds[0]

    def _learn(self, record: StepRecord) -> None:
        if record.k == 0:
            return
        self.has_proposal.add(record.longest > 0)
        for proposed, accepted in zip(record.proposed, record.accepted, strict=True):
            self.row_has_proposal.add(proposed > 0)
            # Fewer drafts than were asked for are as good as rejected ones.
            for position in range(min(accepted + 1, record.k, self.largest) if proposed else 0):
                self.accepted[position].add(accepted > position)

    def _forget(self, remembered: float) -> None:
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
        # A plain step that met a warm-up would make drafting look good: a second one, unless drafting is far ahead.
        if not self.first and self.speeds[self._best()] < _FAR_AHEAD * self.speeds[0] and len(self._plain_times()) < 2:
            self.first.append(0)

    def _plain_times(self) -> Collection[float]:
        return self.costs[self.rows].target.times.get(0, ())

    def _count_towards_look(self) -> None:
        self.since_look += 1
        if self._best():
            self.failed_trials = 0
            if self.since_look > self.options.look_every:
                self.since_look, self.looks = 0, self.looks + 1
        elif self.largest and self.since_look >= self._rounds_between_trials():
            self.trial_rounds, self.trial_end, self.trial_loss = 0, _TRIAL_ROUNDS, 0.0
            self._forget(_REMEMBERED_AT_TRIAL)

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

    def _look_beside(self, best: int) -> int:
        """In turns a few more drafts, one less, and a plain step; of what the bounds leave."""
        k = (best + 1, best - 1, best + 2, 0)[self.looks % 4]
        return k if self.smallest <= k <= self.largest else best

    def _best(self, at_least: int = 0) -> int:
        if at_least == 0 == self.smallest and self.speeds[0] >= max(self.speeds):
            return 0  # a bonus must not make drafting look worth it
        return max(range(max(self.smallest, at_least), self.largest + 1), key=self.promises.__getitem__)


def _typical(times: Iterable[float]) -> float:
    """The mean, but what is far above the upper quartile counts as that; of two the smaller."""
    ordered = sorted(times)
    if len(ordered) < 3:
        return ordered[0]
    most = 1.5 * ordered[3 * (len(ordered) - 1) // 4]
    return sum(min(ms, most) for ms in ordered) / len(ordered)


CONTROLLERS: dict[str, type[Controller]] = {"fixed": Fixed, "adaptive": Adaptive, "cost_model": CostModel}


def controller(value: int | str | Controller) -> Controller:
    """The controller that a number (`Fixed`) or a text such as "fixed(4)", "adaptive(target=0.8)" or "cost_model" stands for.

    Raises:
        SpecError: (a ValueError) an unknown name or option, a missing one, or a value that is refused.
        TypeError: value is none of the three.
    """
    if isinstance(value, Controller):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Fixed(value)
    if isinstance(value, str):
        result: Controller = parse_call(value, CONTROLLERS, "k")
        return result
    raise TypeError(f"k is {value!r}: give a number of drafts, a Controller, or one of {', '.join(CONTROLLERS)}")


def parse_call(text: str, classes: Mapping[str, type[Any]], what: str) -> Any:
    """An object from `name` or `name(value, option=value)`, with Python literals as values.

    Args:
        classes: dataclasses by name.
        what: the option that is being read, for messages.

    Raises:
        SpecError: bad syntax, an unknown name or option, a missing option, or a value that the class refuses.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise SpecError(f"cannot read {what}={text!r}: write it like '{next(iter(classes))}' or 'name(option=value)'") from error
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if isinstance(node, ast.Constant | ast.UnaryOp):  # a bare number, which belongs to the first class
        call = ast.Call(ast.Name(next(iter(classes))), [node], [])
    name = call.func.id if isinstance(call.func, ast.Name) else ast.unparse(call.func)
    if name not in classes:
        nearest = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
        guess = f"did you mean {nearest[0]!r}? " if nearest else ""
        raise SpecError(f"unknown {what} {name!r}: {guess}available: {', '.join(classes)}")
    fields = [field for field in dataclasses.fields(classes[name]) if field.init]
    options = ", ".join(field.name for field in fields)
    try:
        values = [ast.literal_eval(argument) for argument in call.args]
        named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg}
    except (ValueError, TypeError, SyntaxError) as error:
        raise SpecError(f"{text}: values must be literals such as 4, 0.5 or (0, 8)") from error
    if len(values) > len(fields) or not named.keys() <= {field.name for field in fields[len(values) :]}:
        raise SpecError(f"{text}: {name} takes {options}, each at most once")
    given = dict(zip((field.name for field in fields), values, strict=False)) | named
    for field in fields:
        if field.name not in given and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpecError(f"{text}: {name} needs {field.name}: write {name}({field.name}=...)")
    try:
        return classes[name](**given)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{text}: {error}") from error


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}: give a whole number, 0 (plain decoding) or more")
    if value < 0:
        raise ValueError(f"{name} is {value}: give 0 (plain decoding) or more drafts per round")


def _checked_bounds(bounds: Any, smallest: int) -> Bounds:
    remedy = f"give two whole numbers, {smallest} or more, the smaller first, such as ({smallest}, 8)"
    if not isinstance(bounds, tuple | list) or len(bounds) != 2 or not all(type(bound) is int for bound in bounds):
        raise ValueError(f"bounds is {bounds!r}: {remedy}")
    if not smallest <= bounds[0] <= bounds[1]:
        raise ValueError(f"bounds is {tuple(bounds)}: {remedy}")
    return bounds[0], bounds[1]
