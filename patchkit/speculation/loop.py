"""The speculative loop: draft, verify in one forward of the target, keep the accepted drafts, repeat.

It runs as transformers' `custom_generate`, so prompts, processors, stopping criteria and lengths are prepared by `generate` itself.
Processors and criteria are called once for every emitted token, with the prefixes and in the order of plain decoding. Tokens after the
end of a row are dropped.

Shapes: B rows of the batch, R rows still generating, V vocabulary. A round feeds the last known token and n drafts.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.generation.utils import GenerateDecoderOnlyOutput

from patchkit import _compat
from patchkit.handle import refresh_patches
from patchkit.speculation.cached_model import CachedModel, make_cache
from patchkit.speculation.constraint import Constraint
from patchkit.speculation.drafter import Proposal
from patchkit.speculation.drafters.forced import Forced, ForcedSession
from patchkit.speculation.forced_end import append_forced_end, forced_tokens, grammar_decides
from patchkit.speculation.judge import Verdict, judge_for
from patchkit.speculation.refusals import Call, refuse_call
from patchkit.speculation.rows import Rows
from patchkit.speculation.shared import Speculation
from patchkit.speculation.statistics import RunStatistics, StepRecord
from patchkit.speculation.tree import at_most, depths, stacked, trunk
from patchkit.speculation.verifier import accepted_hidden, in_step, keep_accepted, near_ties, verify
from patchkit.static_step import FixedCache
from patchkit.views import cache_bytes

# The largest room, in tokens, with which a cache starts, however many may be generated.
_MOST_ROOM = 4096

# Rounds without a draft after which a warning is due.
_IDLE_ROUNDS = 32


def speculate(
    speculation: Speculation,
    streamer: Any,
    own_cache: bool,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """Generate by speculative decoding, in place of transformers' own sampling loop.

    Args:
        streamer: receives every token once it is final, after ``release()``; None for none.
        own_cache: the cache in ``model_kwargs`` was made for this call, and may be replaced.
        input_ids: [B, L] int64, left-padded.

    Returns:
        Token ids [B, L + new], or a `GenerateDecoderOnlyOutput` if the config asks for one.

    Raises:
        Unserved: only the stock method can serve the call; nothing was computed.
    """
    call = Call(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, own_cache)
    refuse_call(call, has_streamer=streamer is not None)
    speculation.exclusive.take(f"generate of this {type(model).__name__}")
    try:
        refresh_patches(model)
        run = _Run(speculation, call)
        if streamer is not None:
            streamer.release()
            run.streamer = streamer
        speculation.watching, speculation.hidden = False, None
        return run.generate()
    finally:
        speculation.watching, speculation.hidden = False, None
        speculation.exclusive.give_back()


class _Run:
    """The state of one call of generate."""

    def __init__(self, speculation: Speculation, call: Call) -> None:
        self.speculation, self.model, self.config = speculation, call.model, call.config
        self.streamer: Any = None
        self.rows = Rows(call)
        self.judge = judge_for(self.rows, speculation.acceptance)
        # What is returned of a text must not lack the forwards of its end, nor what other processors make of forced tokens.
        self.may_skip_forwards = call.own_cache and not self.config.return_dict_in_generate and grammar_decides(call.processors)
        cache = call.model_kwargs[_compat.CACHE]
        if call.own_cache and cache.get_seq_length() == 0 and type(cache) in (_compat.DynamicCache, FixedCache):
            cache = make_cache(self.model, min(self.config.max_length or 1, _MOST_ROOM))
        self.past = cache.get_seq_length()
        pads = self.rows.state.pads
        self.cached = CachedModel(self.model, cache, list(pads), speculation.ragged, self.past)
        prompt_tokens = len(pads) * self.rows.prompt - sum(pads)
        label = speculation.label if self.rows.constraint is None else f"forced, {speculation.label}"
        self.statistics = RunStatistics(prompt_tokens=prompt_tokens, drafter=label, acceptance=str(speculation.acceptance))

    def generate(self) -> Any:
        """Return the output of `speculate`."""
        speculation, rows = self.speculation, self.rows
        drafter = speculation.drafter
        if rows.constraint is not None:
            drafter = Forced(drafter, rows.constraint, speculation.controller.worth)
        session = drafter.begin(self.model, rows.state)
        speculation.watching = session.wants_hidden
        self.cached.ragged = self.cached.ragged and not session.aligned
        speculation.controller.new_text(rows.prompt)
        try:
            self._prefill(session)
            self._rounds(session)
        finally:
            session.close(rows.state)
        self._warn_if_idle()
        return self._output(session)

    def _rounds(self, session: Any) -> None:
        """Draft, verify, accept and commit until every row has ended."""
        speculation, rows, controller = self.speculation, self.rows, self.speculation.controller
        while rows.active:
            clock, count = _Clock(self.model), rows.state.rows
            k = min(controller.most() if session.estimates else controller.choose(), rows.room() - 1)
            proposal = self._draft(session, k)
            if proposal is not None and proposal.chances is not None:
                k = controller.worth(proposal.chances)
                proposal = at_most(proposal, k)
            clock.mark()
            logits = verify(self.cached, rows, proposal, speculation.compiled)
            clock.mark()
            verdict = self._commit(proposal, logits, self._accept(proposal, logits))
            if speculation.watching:
                assert speculation.hidden is not None
                session.observe(*accepted_hidden(speculation.hidden, proposal, verdict.paths))
            self._drop_finished(session)
            emitted = sum(map(len, verdict.tokens))
            record = StepRecord(max(k, 0), count, tuple(depths(proposal, count)), tuple(verdict.accepted), emitted, *clock.milliseconds())
            if not (isinstance(session, ForcedSession) and session.forced):  # what is certain says nothing of the drafter
                controller.observe(record)
            self._count(record)

    def _prefill(self, session: Any) -> None:
        """Feed the prompt, and choose the first token from its logits."""
        started = time.perf_counter()
        rows = self.rows
        prompt = rows.state.tokens[:, self.past : rows.prompt]
        chunk = self.config.prefill_chunk_size or prompt.shape[1]
        hidden = []
        for piece in prompt.split(chunk, dim=1):
            logits = self.cached.forward(piece, only_last=True)
            self.cached.keep([piece.shape[1]] * len(piece))
            hidden.append(self.speculation.hidden)
        self.cached.record()
        if self.rows.constraint is not None:
            self.rows.constraint.follow(self.rows.state)
            self.rows.constraint.fill([[] for _ in self.rows.active])
        self._commit(None, logits[:, -1:], self._accept(None, logits[:, -1:]), fed=False)
        if self.speculation.watching:
            session.observe(torch.cat([each for each in hidden if each is not None], 1), [prompt.shape[1]] * len(prompt))
        self.statistics.memory_bytes = cache_bytes(self.cached.cache)
        self._drop_finished(session)
        self.statistics.prefill_ms = 1000 * (time.perf_counter() - started)

    def _draft(self, session: Any, k: int) -> Proposal | None:
        """Draft at most ``k`` tokens for every row, as a chain where the cache cannot verify trees; None for no drafts."""
        if isinstance(session, ForcedSession):
            session.room = self.rows.room() - 1
            return session.propose(self.rows.state, k)
        proposal: Proposal | None = session.propose(self.rows.state, k) if k > 0 else None
        if proposal is None:
            return None
        return at_most(proposal if self.cached.ragged else trunk(proposal), k)

    def _accept(self, proposal: Proposal | None, logits: torch.Tensor) -> Verdict:
        """Judge the drafts by the target's logits [R, 1 + n, V], and cut the verdict to what the cache can keep."""
        self.rows.begin_round(logits.shape[1])
        verdict = self.judge.judge(proposal, logits)
        if self.cached.aligned:
            verdict = in_step(verdict, self.rows)
        verdict.paths = [path[: len(new)] for path, new in zip(verdict.paths, verdict.tokens, strict=True)]
        return verdict

    def _commit(self, proposal: Proposal | None, logits: torch.Tensor, verdict: Verdict, fed: bool = True) -> Verdict:
        """Make a verdict final: roll back the cache, extend the rows, and send new tokens to the streamer.

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
            self.rows.advance(row, len(new))
        if self.rows.constraint is not None:
            self._end_by_grammar(self.rows.constraint, verdict)
        if self.streamer is not None:
            for token in verdict.tokens[0]:
                self.streamer.put(torch.tensor([token]))
        return verdict

    def _end_by_grammar(self, constraint: Constraint, verdict: Verdict) -> None:
        """Count the forced tokens of a verdict, and add to it those that end a row."""
        self.statistics.forced += forced_tokens(constraint, verdict)
        if self.may_skip_forwards:
            for row, new in enumerate(append_forced_end(self.rows, constraint)):
                self.rows.advance(row, len(new))
                verdict.tokens[row] = verdict.tokens[row] + new
                self.statistics.forced += len(new)
        self.statistics.masked, self.statistics.mask_us = constraint.applied, 1e6 * constraint.seconds

    def _drop_finished(self, session: Any) -> None:
        """Remove rows that have ended from the drafter's session and the cache."""
        before = self.rows.state.rows
        going_on = self.rows.drop_finished()
        if going_on and len(going_on) < before:
            session.select_rows(going_on)
            self.cached.select_rows(going_on)

    def _count(self, record: StepRecord) -> None:
        self.statistics.add(record)
        hits = self.speculation.hits
        hits["rounds"] += 1
        hits["tokens"] += record.emitted
        hits["proposed"] += sum(record.proposed)
        hits["accepted"] += sum(record.accepted)

    def _warn_if_idle(self) -> None:
        """Warn if a call of many rounds had no draft at all."""
        steps = self.statistics.steps
        if len(steps) < _IDLE_ROUNDS or any(sum(step.proposed) for step in steps):
            return
        asked = any(step.k > 0 for step in steps)
        reason = f"{self.speculation.label} had nothing to propose" if asked else self.speculation.controller.why_plain()
        if reason is not None:
            self.speculation.warnings.add(f"generate ran without drafts: {reason}")

    def _output(self, session: Any) -> Any:
        rows, cache = self.rows, self.cached.cache
        if self.streamer is not None:
            self.streamer.end()
        self.statistics.memory_bytes = max(self.statistics.memory_bytes, cache_bytes(cache) + cache_bytes(session))
        self.speculation.runs.append(self.statistics)
        longest = max(map(len, rows.finished))
        # Without an EOS token there may be no padding token either, and all rows are as long (`refuse_call`).
        pad = _compat.padding_token(self.config) or 0
        sequences = torch.stack([torch.nn.functional.pad(each, (0, longest - len(each)), value=pad) for each in rows.finished])
        if not self.config.return_dict_in_generate:
            return sequences
        output: Any = GenerateDecoderOnlyOutput  # its annotations want tuples of one
        return output(
            sequences=sequences,
            scores=stacked(rows.scores) if rows.keeps_scores else None,
            logits=stacked(rows.logits) if rows.keeps_logits else None,
            # The cache of a batch ends with the keys of its last row only.
            **{_compat.CACHE: cache if len(rows.finished) == 1 else None},
        )


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
