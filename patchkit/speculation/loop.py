"""The speculative loop: draft, verify in one forward of the target, keep what stands, repeat.

It runs as transformers' `custom_generate`, so prompts, processors, stopping criteria and lengths are prepared by `generate` itself.
Processors and criteria are called once for every token that is emitted, on the same prefixes and in the same order as in plain
decoding; tokens after one that stops a text are dropped.

Shapes: B rows of the batch, R rows still generating, V vocabulary. A round feeds the last known token and n drafts.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from patchkit import _compat
from patchkit.speculation.cached_model import CachedModel, make_cache
from patchkit.speculation.drafter import Proposal, State
from patchkit.speculation.judge import Judge
from patchkit.speculation.ragged_cache import VERIFIED_LENGTHS, RaggedCache
from patchkit.speculation.refusals import Call, refuse_call
from patchkit.speculation.shared import Speculation
from patchkit.speculation.statistics import RunStatistics, StepRecord
from patchkit.speculation.stops import BY_ROW, Stops, processors_of
from patchkit.speculation.tree import at_most, depths, stacked, tree_shape, trunk
from patchkit.static_step import FixedCache
from patchkit.views import cache_bytes

# The room that a cache is given at first, in tokens, however many may be generated.
_MOST_ROOM = 4096

# So many rounds of a text without a draft are worth a remark.
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
    """`GenerationMixin._sample`, speculatively.

    Args:
        streamer: gets every token as it is final, after ``release()``; None for none.
        own_cache: the cache in ``model_kwargs`` was made for this call, so another may take its place.
        input_ids: [B, L] int64, left-padded.

    Raises:
        Unserved: the call asks for what only the stock methods do.
    """
    call = Call(model, input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs, own_cache)
    refuse_call(call, has_streamer=streamer is not None)
    speculation.exclusive.take(f"generate of this {type(model).__name__}")
    try:
        run = _Run(speculation, call)
        if streamer is not None:
            streamer.release()
            run.streamer = streamer
        speculation.watching, speculation.hidden = False, None
        return run.generate()
    finally:
        speculation.watching, speculation.hidden = False, None
        speculation.exclusive.give_back()


class _Run(Judge):
    """One call of generate."""

    def __init__(self, speculation: Speculation, call: Call) -> None:
        self.speculation, self.model, self.processors, self.config = speculation, call.model, call.processors, call.config
        self.streamer: Any = None
        self.decoder = _compat.decoder_of(self.model)
        self.sampled = bool(self.config.do_sample)
        input_ids, config = call.input_ids, call.config
        batch, length = input_ids.shape
        mask = call.model_kwargs.get("attention_mask")
        pads = [0] * batch if mask is None else (mask == 0).sum(1).tolist()
        cache = call.model_kwargs[_compat.CACHE]
        if call.own_cache and cache.get_seq_length() == 0 and type(cache) in (_compat.DynamicCache, FixedCache):
            cache = make_cache(self.model, min(config.max_length or 1, _MOST_ROOM))
        self.past = cache.get_seq_length()
        self.cached = CachedModel(self.model, cache, pads, speculation.ragged, self.past)
        self.stops = Stops(call.criteria, input_ids.device)
        buffer = input_ids.new_zeros(batch, length + 64)
        buffer[:, :length] = input_ids
        self.state = State(buffer, [length] * batch, list(pads), self.distribution if self.sampled else None)
        self.active = list(range(batch))  # the batch's number of each row still generating
        self.texts: list[torch.Tensor] = [input_ids[row] for row in range(batch)]
        self.keeps_scores = config.return_dict_in_generate and config.output_scores
        self.keeps_logits = config.return_dict_in_generate and config.output_logits
        self.row_processors = [processors_of(row, call.processors) for row in range(batch)]
        # A processor that may keep a state must not see what is only drafted.
        self.draft_processors = [type(own)(each for each in own if type(each).__name__ in BY_ROW) for own in self.row_processors]
        self.scores: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.logits: list[list[torch.Tensor]] = [[] for _ in range(batch)]
        self.prompt = length
        self.statistics = RunStatistics(
            prompt_tokens=batch * length - sum(pads), drafter=speculation.label, acceptance=str(speculation.acceptance)
        )

    # -- the rounds --------------------------------------------------------------------------------------------------------

    def generate(self) -> Any:
        speculation, state = self.speculation, self.state
        session = speculation.drafter.begin(self.model, state)
        speculation.watching = session.wants_hidden
        self.cached.ragged = self.cached.ragged and not session.aligned
        speculation.controller.new_text(self.prompt)
        self._prefill(session)
        while self.active:
            started = time.perf_counter()
            k = min(speculation.controller.choose(), min(self.stops.room(length) for length in state.lengths) - 1)
            proposal = session.propose(state, k) if k > 0 else None
            if proposal is not None:
                proposal = at_most(proposal if self.cached.ragged else trunk(proposal), k)
            _synchronize(self.model)
            drafted = time.perf_counter()
            logits = self._verify(proposal)
            _synchronize(self.model)
            verified = time.perf_counter()
            rows = state.rows
            accepted, paths, emitted = self._settle(proposal, logits)
            if speculation.watching:
                assert speculation.hidden is not None
                session.observe(*self._standing(speculation.hidden, proposal, paths))
            self._drop_finished(session)
            ended = time.perf_counter()
            record = StepRecord(
                k=max(k, 0),
                rows=rows,
                proposed=tuple(depths(proposal, rows)),
                accepted=tuple(accepted),
                emitted=emitted,
                draft_ms=1000 * (drafted - started),
                verify_ms=1000 * (verified - drafted),
                overhead_ms=1000 * (ended - verified),
            )
            self.statistics.add(record)
            speculation.controller.observe(record)
            self._count(record)
        self._notice_idleness()
        return self._finish(session)

    def _notice_idleness(self) -> None:
        """Say so where a text of some length was made without a single draft."""
        steps = self.statistics.steps
        if len(steps) < _IDLE_ROUNDS or any(sum(step.proposed) for step in steps):
            return
        asked = any(step.k > 0 for step in steps)
        reason = f"{self.speculation.label} had nothing to propose" if asked else self.speculation.controller.why_plain()
        if reason is not None:
            self.speculation.warnings.add(f"generate ran without drafts: {reason}")

    def _prefill(self, session: Any) -> None:
        """Feed the prompt and take the first token from its logits."""
        started = time.perf_counter()
        prompt = self.state.tokens[:, self.past : self.prompt]
        chunk = self.config.prefill_chunk_size or prompt.shape[1]
        hidden = []
        for piece in prompt.split(chunk, dim=1):
            logits = self.cached.forward(piece, only_last=True)
            self.cached.keep([piece.shape[1]] * len(piece))
            hidden.append(self.speculation.hidden)
        self.cached.record()
        self._settle(None, logits[:, -1:], fed=False)
        if self.speculation.watching:
            session.observe(torch.cat([each for each in hidden if each is not None], 1), [prompt.shape[1]] * len(prompt))
        self.statistics.memory_bytes = cache_bytes(self.cached.cache)
        self._drop_finished(session)
        self.statistics.prefill_ms = 1000 * (time.perf_counter() - started)

    def _verify(self, proposal: Proposal | None) -> torch.Tensor:
        """Logits [R, 1 + n, V] after the last known token and after each draft."""
        device = self.state.tokens.device
        last = self.state.tokens[torch.arange(self.state.rows, device=device), torch.tensor(self.state.lengths, device=device) - 1]
        if proposal is None:
            return self.cached.forward(last[:, None])
        tokens = torch.cat([last[:, None], proposal.tokens], 1)
        if proposal.parents is None:
            width = tokens.shape[1]
            compiled = isinstance(self.cached.cache, RaggedCache) and self.speculation.compiled
            if compiled:
                rounded = min((length for length in VERIFIED_LENGTHS if length >= width), default=width)
                if self.stops.room(max(self.cached.fed)) < rounded:  # there may be no positions beyond
                    rounded = width
                tokens = torch.nn.functional.pad(tokens, (0, rounded - width))
            return self.cached.forward(tokens)[:, :width]
        depths, ancestors = tree_shape(proposal.parents, device)
        return self.cached.forward(tokens, depths=depths, ancestors=ancestors)

    def _settle(self, proposal: Proposal | None, logits: torch.Tensor, fed: bool = True) -> tuple[list[int], list[list[int]], int]:
        """Judge the drafts, append what stands, and take the rest back.

        Returns:
            Of each row, how many drafts were accepted, and the nodes that were fed and stand (0 is the last known token); and
            how many tokens all rows got.
        """
        state = self.state
        self.done = [False] * state.rows
        self._make_room(1 + (0 if proposal is None else proposal.tokens.shape[1]))
        texts, nodes = self.judge(proposal, logits)
        accepted = [len(path) - 1 for path in nodes]
        if self.cached.aligned:  # no row may get ahead of the others
            least = min((len(new) for new, done in zip(texts, self.done, strict=True) if not done), default=max(map(len, texts)))
            # A row that ended beyond that goes back too: to keep only drawn ends would make ends likelier than they are.
            self.done = [done and len(new) <= least for new, done in zip(texts, self.done, strict=True)]
            texts = [new[:least] for new in texts]
            nodes = [(path + path[-1:] * least)[:least] for path in nodes]
            accepted = [min(count, least - 1) for count in accepted]
        paths = [path[: len(new)] for path, new in zip(nodes, texts, strict=True)]
        if fed:
            if proposal is not None and proposal.parents is not None:
                self.cached.keep_path(paths)
            elif self.cached.aligned:
                self.cached.keep([least] * state.rows)
            else:
                self.cached.keep([len(path) for path in paths])
        if logits.dtype in (torch.float16, torch.bfloat16):
            self._count_near_ties(logits, [[0]] * state.rows if not fed else paths)
        for row, new in enumerate(texts):
            number = self.active[row]
            state.lengths[row] += len(new)
            del self.scores[number][state.lengths[row] - self.prompt :], self.logits[number][state.lengths[row] - self.prompt :]
        if self.streamer is not None:
            for token in texts[0]:
                self.streamer.put(torch.tensor([token]))
        return accepted, paths, sum(map(len, texts))

    def _standing(self, hidden: torch.Tensor, proposal: Proposal | None, paths: list[list[int]]) -> tuple[torch.Tensor, list[int]]:
        """Hidden states in the order of the text, for a tree too."""
        counts = [len(path) for path in paths]
        if proposal is None or proposal.parents is None:
            return hidden, counts
        longest = max(counts)
        index = torch.tensor([path + path[-1:] * (longest - len(path)) for path in paths], device=hidden.device)
        return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1])), counts

    def _drop_finished(self, session: Any) -> None:
        """Rows whose text has stopped cost nothing more."""
        state = self.state
        for row, done in enumerate(self.done):
            if done:
                self.texts[self.active[row]] = state.tokens[row, : state.lengths[row]].clone()
        rows = [row for row, done in enumerate(self.done) if not done]
        if rows and len(rows) < state.rows:
            session.select_rows(rows)
            self.cached.select_rows(rows)
            state.tokens = state.tokens[rows]
            state.lengths = [state.lengths[row] for row in rows]
            state.pads = [state.pads[row] for row in rows]
        self.active = [self.active[row] for row in rows]

    def _make_room(self, tokens: int) -> None:
        state = self.state
        needed = max(state.lengths) + tokens
        if needed > state.tokens.shape[1]:
            state.tokens = torch.nn.functional.pad(state.tokens, (0, needed))

    # -- the end -----------------------------------------------------------------------------------------------------------

    def _finish(self, session: Any) -> Any:
        longest = max(map(len, self.texts))
        # Without an EOS token there may be no padding token either, and all texts are as long (`refuse_call`).
        pad = 0 if self.config._pad_token_tensor is None else int(self.config._pad_token_tensor)
        sequences = torch.stack([torch.nn.functional.pad(text, (0, longest - len(text)), value=pad) for text in self.texts])
        if self.streamer is not None:
            self.streamer.end()
        cache: Any = self.cached.cache
        self.statistics.memory_bytes = max(self.statistics.memory_bytes, cache_bytes(cache) + cache_bytes(session))
        self.speculation.runs.append(self.statistics)
        if not self.config.return_dict_in_generate:
            return sequences
        output: Any = GenerateDecoderOnlyOutput  # its annotations want tuples of one
        return output(
            sequences=sequences,
            scores=stacked(self.scores) if self.keeps_scores else None,
            logits=stacked(self.logits) if self.keeps_logits else None,
            # What is left of a batch's cache belongs to its last row.
            **{_compat.CACHE: cache if len(self.texts) == 1 else None},
        )

    def _count(self, record: StepRecord) -> None:
        hits = self.speculation.hits
        hits["rounds"] += 1
        hits["tokens"] += record.emitted
        hits["proposed"] += sum(record.proposed)
        hits["accepted"] += sum(record.accepted)

    def _count_near_ties(self, logits: torch.Tensor, paths: list[list[int]]) -> None:
        """Positions at which the two best logits are closer than one step of their dtype."""
        best = logits.float().topk(2, -1).values
        close = (best[..., 0] - best[..., 1]) <= torch.finfo(logits.dtype).eps * best[..., 0].abs()
        for row, path in enumerate(paths):
            self.statistics.near_tie_checked += len(path)
            self.statistics.near_ties += int(close[row, path].sum())


def _synchronize(model: Any) -> None:
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
