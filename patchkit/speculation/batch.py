"""A batch of rows that are generated together: `Batch`. Rows leave when they end, and other batches join.

Shapes: R rows still generating, n drafts, V vocabulary. A round feeds the last known token of every row and n drafts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from patchkit import _compat
from patchkit.handle import refresh_patches
from patchkit.speculation.cached_model import CachedModel, make_cache
from patchkit.speculation.constraint import Constraint, unconstrained
from patchkit.speculation.drafter import Proposal, Session
from patchkit.speculation.drafters.forced import Forced, ForcedSession
from patchkit.speculation.forced_end import append_forced_end, forced_tokens
from patchkit.speculation.judge import Verdict, judge_for
from patchkit.speculation.prefixed import prefixed_prompts
from patchkit.speculation.ragged_cache import RaggedCache
from patchkit.speculation.refusals import Call
from patchkit.speculation.row import Row
from patchkit.speculation.rows import Rows, order_after
from patchkit.speculation.shared import Speculation
from patchkit.speculation.statistics import RunStatistics, StepRecord
from patchkit.speculation.tree import at_most, chain_chances, depths, trunk
from patchkit.speculation.verifier import accepted_hidden, in_step, keep_accepted, near_ties, show_logits, verify
from patchkit.static_step import FixedCache
from patchkit.views import cache_bytes

# The largest room, in tokens, with which a cache starts, however many may be generated.
_MOST_ROOM = 4096

# Rounds without a draft after which a warning is due.
_IDLE_ROUNDS = 32


class Batch:
    """Rows, their cache, and the drafter's session.

        batch = Batch(speculation, call, Rows(call))
        while not batch.prefill(512): ...
        while len(batch.rows): batch.round()

    Args:
        speculation: of the patched model.
        call: of `generate`, with the prompts of all rows; `refuse_call` has let it pass.
        rows: those of the call.
        beside: a running batch that this one may join; a single row then lives in a spare row of its buffers, if there is one.

    Attributes:
        rows: those still generating.
        statistics: of all rounds so far.
    """

    cached: CachedModel

    def __init__(self, speculation: Speculation, call: Call, rows: Rows, beside: Batch | None = None) -> None:
        refresh_patches(call.model)
        self.speculation, self.model = speculation, call.model
        self.rows = rows
        self._is_lent = False  # the cache is a row of another batch's buffers
        cache = call.model_kwargs[_compat.CACHE]
        if call.own_cache and cache.get_seq_length() == 0 and type(cache) in (_compat.DynamicCache, FixedCache):
            tokens = min(call.config.max_length or 1, _MOST_ROOM)
            spare = beside.cache.lend(tokens) if beside is not None and beside.cached.ragged and len(rows) == 1 else None
            cache = make_cache(self.model, tokens, speculation.compiled) if spare is None else spare
            self._is_lent = spare is not None
        past, state = cache.get_seq_length(), self.rows.state
        self.cached = CachedModel(self.model, cache, list(state.pads), speculation.ragged, past)
        drafter, constraint = speculation.drafter, self.rows.constraint
        if constraint is not None:
            drafter = Forced(drafter, constraint, speculation.controller.worth)
        state.trees = self.cached.ragged and constraint is None
        self.session: Session = drafter.begin(self.model, state)
        self.cached.ragged = self.cached.ragged and not self.session.aligned
        self.judge = judge_for(self.rows, speculation.acceptance)
        prompt = state.lengths[0]
        label = speculation.label if constraint is None else f"forced, {speculation.label}"
        self.statistics = RunStatistics(
            prompt_tokens=len(state.pads) * prompt - sum(state.pads), drafter=label, acceptance=str(speculation.acceptance)
        )
        chunk = call.config.prefill_chunk_size
        self._prefixed = prefixed_prompts(self.model, state, self.cached, self.session.wants_hidden, chunk)
        self._hidden: list[torch.Tensor] = [] if self._prefixed is None else self._prefixed.kept()
        self._count_reused()
        self._unfed = state.tokens[:, self.cached.fed[0] : prompt]
        self._chunk = chunk or prompt
        self._gathered: list[int] | None = None  # lengths of prompts that are fed in one forward
        self._is_new = True
        self._closed = self._working = False

    @property
    def cache(self) -> Any:
        """The cache of all rows."""
        return self.cached.cache

    @property
    def unfed(self) -> int:
        """Tokens of all prompts that were not fed yet, filler included."""
        return self._unfed.numel()

    def prefill(self, most: int | None = None) -> bool:
        """Feed the prompt, or the next ``most`` tokens of it; return whether all of it is fed, and every row has its first token.

        Under `prefix_cache`, forwards end at its borders instead, and so at fixed places of the prompt: up to a block more is fed. Prompts
        of several batches (`gather`) are fed at once.
        """
        started = time.perf_counter()
        with self._at_work():
            if self._gathered is not None:
                self._feed_gathered(self._gathered)
            else:
                self._feed(most)
        self.statistics.prefill_ms += 1000 * (time.perf_counter() - started)
        return not self._unfed.shape[1]

    def _feed(self, most: int | None) -> None:
        """Feed prompts of equal lengths, or ``most`` tokens of them."""
        if self._prefixed is not None and len(self.rows) > 1 and not self.cached.fed[0]:
            self._hidden += self._prefixed.feed_rows(self.cached, lambda: self.speculation.hidden)
            self._count_reused()
            self._unfed = self._prefixed.prompts[:, self.cached.fed[0] :]
        fed, size = 0, self._unfed.shape[1]
        while fed < size and (most is None or fed < most):
            count = min(self._chunk, size - fed)
            if self._prefixed is not None:
                count = self._prefixed.piece(self.cached.fed[0], count)
            elif most is not None:
                count = min(count, most - fed)
            logits = self.cached.forward(self._unfed[:, fed : fed + count], only_last=True)
            self.cached.keep([count] * len(self._unfed))
            fed += count
            if self.speculation.hidden is not None:
                self._hidden.append(self.speculation.hidden)
            if self._prefixed is not None:
                self._prefixed.keep(self.cache, self.cached.fed[0], self._hidden)
        self._unfed = self._unfed[:, fed:]
        if not self._unfed.shape[1]:
            if self._prefixed is not None:
                logits, self._hidden = self._prefixed.repeat(self.cached, logits, self._hidden)
            self._begin(logits[:, -1:])

    def _feed_gathered(self, lengths: list[int]) -> None:
        """Feed prompts of these lengths."""
        logits = self.cached.feed_prompts(self._unfed, lengths)
        self._unfed = self._unfed[:, :0]
        if self.speculation.hidden is not None:
            self._hidden.append(self.speculation.hidden)
        self._begin(logits)

    def round(self) -> None:
        """Draft, verify, accept and commit; rows that have ended leave."""
        with self._at_work():
            rows, controller = self.rows, self.speculation.controller
            if self._is_new:
                controller.new_text(max(row.prompt for row in rows.rows))
                self._is_new = False
            clock, members = _Clock(self.model), rows.rows
            k = min(controller.most() if self.session.estimates else controller.choose(), self._room())
            proposal = self._draft(k)
            if proposal is not None and proposal.chances is not None:
                k = controller.worth(chain_chances(proposal))
                proposal = at_most(proposal, k)
            clock.mark()
            logits = verify(self.cached, rows, proposal, self.speculation.compiled)
            clock.mark()
            show_logits(self.session, rows, proposal, logits)
            verdict = self._commit(proposal, logits, self._accept(proposal, logits))
            certain = isinstance(self.session, ForcedSession) and self.session.forced
            if self.speculation.watching:
                assert self.speculation.hidden is not None
                self.session.observe(*accepted_hidden(self.speculation.hidden, proposal, verdict.paths))
            self._drop(self.rows.ended())
            emitted, count = sum(map(len, verdict.tokens)), len(members)
            proposed = tuple(depths(proposal, count))
            record = StepRecord(max(k, 0), count, proposed, tuple(verdict.accepted), emitted, *clock.milliseconds())
            if not certain:  # what a grammar forces says nothing of the drafter
                controller.observe(record)
            self._count(record, members)

    @property
    def is_gatherable(self) -> bool:
        """Whether prompts of this batch can be fed in one forward with others: nothing was fed of it, nor is kept by a prefix cache."""
        is_whole = self._gathered is not None or (len(self.rows) == 1 and self._chunk >= self._unfed.shape[1])
        return is_whole and self._prefixed is None and not self._is_lent and self.cached.is_unfed

    def gathers(self, other: Batch) -> bool:
        """Whether `gather` can be called with another batch of the same model."""
        return self.is_gatherable and other.is_gatherable and self._is_like(other)

    def gather(self, other: Batch) -> None:
        """Have the rows of another batch too, whose prompt is then fed in one forward with this one's; do not use the other any more.

        To read the weights once for several short prompts takes much less time than to read them for each.
        """
        lengths = self._gathered or self.rows.state.lengths
        self._gathered = lengths + other.rows.state.lengths
        self._take_rows(other)
        self.cached.gather(other.cached)
        self._unfed = self.rows.state.tokens[:, : max(self._gathered)]

    def joins(self, other: Batch) -> bool:
        """Whether `join` can be called with another batch of the same model, whose prompts are fed."""
        return bool(len(self.rows) and len(other.rows)) and self.cached.joins(other.cached) and self._is_like(other)

    def join(self, other: Batch) -> None:
        """Go on with the rows of another batch too, which must not be used any more; `joins` tells whether that can be done."""
        self.cached.join(other.cached)
        self._take_rows(other)

    def _is_like(self, other: Batch) -> bool:
        """Whether rows of both can be in one batch, as far as drafters and grammars go."""
        own, joining = (_unforced(batch.session) for batch in (self, other))
        vocabularies = {id(batch.rows.constraint.vocabulary) for batch in (self, other) if batch.rows.constraint is not None}
        return type(own) is type(joining) and not own.aligned and len(vocabularies) <= 1

    def _take_rows(self, other: Batch) -> None:
        """Append the rows of another batch; the caches have them already."""
        self._wrap(other.rows.constraint)
        other._wrap(self.rows.constraint)
        self.session.join(other.session)
        self.rows.join(other.rows)
        self.statistics.absorb(other.statistics)
        self.judge = judge_for(self.rows, self.speculation.acceptance)
        self._is_new, other._closed = True, True

    def cancel(self, rows: Sequence[Row], finish: str = "cancelled") -> None:
        """Let these rows end where they are; called while a round makes its tokens final (`Row.sink`), at the end of that round."""
        for row in rows:
            row.finish = finish
        if not self._working:
            with self._at_work():
                self._drop(self.rows.ended())

    def stay_apart(self) -> None:
        """Give back a spare row of another batch's buffers, because this batch does not join that one."""
        if isinstance(self.cache, RaggedCache):
            self.cache.move_away()

    def close(self) -> None:
        """End the drafter's session; also after an error, when the rows that were still generating count as ended."""
        if not self._closed:
            self._closed = True
            self.session.close(self.rows.state)

    def abandon(self) -> None:
        """Drop all rows, after an error."""
        try:
            self.close()
        finally:
            self.rows.rows = []

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[None]:
        """Hold the model for this thread, and keep its hidden states where the drafter wants them."""
        speculation = self.speculation
        speculation.exclusive.take(f"generate of this {type(self.model).__name__}")
        speculation.watching, speculation.hidden = self.session.wants_hidden, None
        self._working = True
        try:
            yield
        finally:
            self._working = False
            speculation.watching, speculation.hidden = False, None
            speculation.exclusive.give_back()

    def _begin(self, logits: torch.Tensor) -> None:
        """Choose the first token of every row from the logits [R, 1, V] of its prompt."""
        self.cached.record()
        constraint = self.rows.constraint
        if constraint is not None:
            constraint.follow(self.rows.state)
            constraint.fill([[] for _ in self.rows.rows])
        show_logits(self.session, self.rows, None, logits)
        self._commit(None, logits, self._accept(None, logits), fed=False)
        if self.speculation.watching:
            hidden = torch.cat(self._hidden, 1)
            self.session.observe(hidden, self._gathered or [hidden.shape[1]] * len(hidden))
        self._hidden.clear()
        self.statistics.memory_bytes = cache_bytes(self.cached.cache)
        self._drop(self.rows.ended())

    def _count_reused(self) -> None:
        if self._prefixed is not None:
            for row, tokens in zip(self.rows.rows, self._prefixed.reused, strict=True):
                row.reused = tokens

    def _room(self) -> int:
        """Return the most drafts of a round: up to the end of the row that may get most, or, where the model has no more positions or
        the buffers would have to grow, of the row that may get least."""
        least, most = self.rows.room()
        spare = self.cached.cache.room - max(self.cached.fed) if self.cached.ragged else 0
        if self.cached.positions is not None:
            spare = min(spare, self.cached.positions - max(self.cached.fed))
        return min(most, max(least, spare)) - 1

    def _draft(self, k: int) -> Proposal | None:
        """Draft at most ``k`` tokens for every row, as a chain where the cache cannot verify trees; None for no drafts."""
        if isinstance(self.session, ForcedSession):
            self.session.room = self._room()
            return self.session.propose(self.rows.state, k)
        proposal: Proposal | None = self.session.propose(self.rows.state, k) if k > 0 else None
        if proposal is None:
            return None
        return at_most(proposal if self.cached.ragged else trunk(proposal), k)

    def _accept(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        """Judge the drafts by the target's logits [R, 1 + n, V], and cut the verdict to what the cache can keep."""
        self.rows.reserve(logits.shape[1])
        verdict = self.judge.judge(proposal, logits)
        if self.cached.aligned:
            verdict = in_step(verdict, self.rows)
        verdict.paths = [path[: len(new)] for path, new in zip(verdict.paths, verdict.tokens, strict=True)]
        return verdict

    def _commit(self, proposal: Proposal | None, logits: torch.Tensor, verdict: Verdict, fed: bool = True) -> Verdict:
        """Make a verdict final: roll back the cache, and extend the rows.

        Args:
            fed: the last known token was fed with the drafts; False after the prompt.
        """
        if fed:
            keep_accepted(self.cached, proposal, verdict)
        if logits.dtype in (torch.float16, torch.bfloat16):
            paths = verdict.paths if fed else [[0]] * len(verdict.paths)
            self.statistics.near_tie_checked += sum(map(len, paths))
            self.statistics.near_ties += near_ties(logits, paths)
        for row, new in enumerate(verdict.tokens):
            self.rows.advance(row, new)
        if self.rows.constraint is not None:
            self._end_by_grammar(self.rows.constraint, verdict)
        return verdict

    def _end_by_grammar(self, constraint: Constraint, verdict: Verdict) -> None:
        """Count the forced tokens of a verdict, and add to it those that end a row."""
        forced = forced_tokens(constraint, verdict)
        for row, new in enumerate(append_forced_end(self.rows, constraint)):
            self.rows.advance(row, new)
            verdict.tokens[row] = verdict.tokens[row] + new
            forced[row] += len(new)
        for own, count in zip(self.rows.rows, forced, strict=True):
            own.forced += count
        self.statistics.forced += sum(forced)
        self.statistics.masked += constraint.applied
        self.statistics.mask_us += 1e6 * constraint.seconds
        constraint.applied, constraint.seconds = 0, 0.0

    def _drop(self, ended: list[int]) -> None:
        """Remove rows that have ended. The last ones stay in the session, for `close`, and in the cache, for the caller of `generate`."""
        if not ended:
            return
        if len(ended) == len(self.rows):
            self.rows.rows = []
            self.close()
            return
        order = order_after(ended, len(self.rows))
        self.session.finished(self.rows.state, ended)
        self.session.select_rows(order)
        self.cached.select_rows(order)
        self.rows.select(order)
        if isinstance(self.session, ForcedSession) and self.session.constraint.is_free:
            self.session = self.session.other
            self.rows.constrain(None)
        self.judge = judge_for(self.rows, self.speculation.acceptance)

    def _wrap(self, like: Constraint | None) -> None:
        """Have grammars, of no row, if ``like`` is not None: a batch with grammars is about to join."""
        if like is None or self.rows.constraint is not None:
            return
        constraint = unconstrained(like.vocabulary, len(self.rows))
        self.rows.constrain(constraint)
        self.session = ForcedSession(self.session, constraint, self.speculation.controller.worth)

    def _count(self, record: StepRecord, members: Sequence[Row]) -> None:
        self.statistics.add(record)
        for row, proposed, accepted in zip(members, record.proposed, record.accepted, strict=True):
            row.rounds, row.proposed, row.accepted = row.rounds + 1, row.proposed + proposed, row.accepted + accepted
        hits = self.speculation.hits
        hits["rounds"] += 1
        hits["tokens"] += record.emitted
        hits["proposed"] += sum(record.proposed)
        hits["accepted"] += sum(record.accepted)

    def publish(self) -> None:
        """Hand the statistics over to the patched model, and warn if many rounds had no draft at all."""
        statistics, speculation = self.statistics, self.speculation
        statistics.memory_bytes = max(statistics.memory_bytes, cache_bytes(self.cached.cache) + cache_bytes(self.session))
        speculation.runs.append(statistics)
        self.statistics = RunStatistics(drafter=statistics.drafter, acceptance=statistics.acceptance)
        steps = statistics.steps
        if len(steps) < _IDLE_ROUNDS or any(sum(step.proposed) for step in steps):
            return
        asked = any(step.k > 0 for step in steps)
        reason = f"{speculation.label} had nothing to propose" if asked else speculation.controller.why_plain()
        if reason is not None:
            speculation.warnings.add(f"generate ran without drafts: {reason}")


def _unforced(session: Session) -> Session:
    """The drafter's own session."""
    return session.other if isinstance(session, ForcedSession) else session


class _Clock:
    """A clock for one round: drafting, verification, and the rest. Each mark waits for the device."""

    def __init__(self, model: Any) -> None:
        self.device = model.device.type
        self.marks = [time.perf_counter()]

    def mark(self) -> None:
        if self.device != "cpu":
            torch.accelerator.synchronize(self.device)
        self.marks.append(time.perf_counter())

    def milliseconds(self) -> tuple[float, float, float]:
        begun, drafted, verified = self.marks
        return 1000 * (drafted - begun), 1000 * (verified - drafted), 1000 * (time.perf_counter() - verified)
