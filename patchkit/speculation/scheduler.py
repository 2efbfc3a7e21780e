"""Continuous batching: sequences join a running batch and leave it when they end (`Scheduler`).

Yu et al. 2022, "Orca", https://www.usenix.org/conference/osdi22/presentation/yu. Differs from it in that a round verifies drafts, so that
sequences advance by different numbers of tokens.
"""

from __future__ import annotations

import contextvars
import functools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from patchkit.errors import PatchError
from patchkit.speculation.batch import Batch
from patchkit.speculation.generate import prepared_call
from patchkit.speculation.pace import Pace
from patchkit.speculation.refusals import Call, Unserved
from patchkit.speculation.row import Row
from patchkit.speculation.rows import Rows
from patchkit.speculation.shared import speculation_of

# Rows of different lengths share a batch as long as the padding, which every round reads, is less than this, or than half of the weights:
# what a shared batch saves is another pass over these.
_PADDING = 2**25

# Rounds after which the statistics of a batch are handed over, so that one that never ends does not grow.
_ROUNDS = 1024


@dataclass(eq=False)
class _Waiting:
    """A sequence that has no slot yet, and the context variables with which it was submitted (a salt of `prefix_cache`)."""

    call: Call
    rows: Rows
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    @property
    def row(self) -> Row:
        return self.rows.rows[0]


class Scheduler:
    """Generates any number of sequences, up to ``slots`` of them at a time, on a model patched with `speculative`.

        scheduler = Scheduler(model, slots=6)
        rows = [scheduler.submit(ids, max_new_tokens=80) for ids in prompts]
        scheduler.run()
        answers = [tokenizer.decode(row.new) for row in rows]

    Each sequence gets the tokens that it would get alone. Sequences share one batch where rows may advance by different numbers of tokens;
    on other models (a streaming window, a recurrent state) each has a batch of its own, and batches take turns.

    Not for several threads at once: one thread submits, steps and cancels. Without drafts, patch with ``speculative(k=0)``.

    Args:
        model: patched with `speculative`.
        slots: sequences that are generated at the same time. The attribute may be changed: those that have a slot keep it.
        prefill: most tokens of waiting prompts that are fed between two rounds. While sequences are generated, as many as take not much
            longer than a round (`patchkit.speculation.pace`), or a block of `prefix_cache`.

    Raises:
        PatchConflict: the model is not patched with speculative.
        ValueError: slots or prefill below 1.
    """

    def __init__(self, model: Any, slots: int = 8, prefill: int = 512) -> None:
        for name, value in (("slots", slots), ("prefill", prefill)):
            if value < 1:
                raise ValueError(f"{name}={value}: give at least 1")
        self.model, self.slots = model, slots
        self._pace = Pace(prefill)
        self._most_padding = max(_PADDING, sum(each.numel() * each.element_size() for each in model.parameters()) // 2)
        self._speculation = speculation_of(model)
        self._waiting: deque[_Waiting] = deque()
        self._incoming: list[Batch] = []  # whose prompts are fed, one after the other
        self._batches: list[Batch] = []

    @property
    def waiting(self) -> int:
        """Number of sequences of which nothing was fed yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Number of sequences that have a slot."""
        return sum(len(batch.rows) for batch in self._all())

    @property
    def caches(self) -> list[Any]:
        """The caches of all sequences that have a slot."""
        return [batch.cache for batch in self._all()]

    def submit(
        self, input_ids: torch.Tensor, *, seed: int | None = None, on_tokens: Callable[[list[int]], None] | None = None, **options: Any
    ) -> Row:
        """Queue one sequence; `step` or `run` generates it.

        Args:
            input_ids: [T] or [1, T] int64, the prompt.
            seed: of the sequence's own random numbers. A sampled sequence then has the tokens that ``torch.manual_seed(seed)`` and
                ``generate`` of the unpatched model give, whatever else is generated.
            on_tokens: called with the new tokens of each round.
            options: of ``generate``: max_new_tokens, do_sample, logits_processor, ...

        Returns:
            The sequence: ``row.new`` are its new tokens, ``row.finish`` says why it has ended.

        Raises:
            PatchError: several prompts, or an option that only transformers' own generate serves (beams, a streamer).
        """
        if input_ids.ndim == 1:
            input_ids = input_ids[None]
        if len(input_ids) != 1:
            raise PatchError(f"submit got {len(input_ids)} prompts: submit them one by one")
        try:
            call = prepared_call(self.model, input_ids, **options)
        except Unserved as unserved:
            raise PatchError(f"a scheduler does not serve {unserved}: call generate for that") from None
        generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        rows = Rows(call, generator)
        rows.rows[0].sink = on_tokens
        self._waiting.append(_Waiting(call, rows))
        return rows.rows[0]

    def run(self) -> None:
        """Generate until every sequence has ended."""
        while self.step():
            pass

    @torch.no_grad()
    def step(self) -> bool:
        """Feed waiting prompts, and generate one round of all running sequences.

        A sequence that meets an error ends with ``finish="error"``, as do those that share its batch; `Row.error` has the exception.

        Returns:
            Whether any sequence is left.
        """
        self._admit()
        started = time.perf_counter()
        for batch in list(self._batches):
            self._guarded([batch], batch.round)
            if len(batch.statistics.steps) >= _ROUNDS:
                batch.publish()
        if self._batches:
            self._pace.round(time.perf_counter() - started)
        self._sweep()
        return bool(self._batches or self._waiting or self._incoming)

    def cancel(self, row: Row) -> None:
        """End a sequence where it is; its slot is free for the next round. Does nothing to one that has ended."""
        if row.finish is not None:
            return
        for waiting in self._waiting:
            if waiting.row is row:
                row.finish = "cancelled"
                self._waiting.remove(waiting)
                return
        for batch in self._all():
            if row in batch.rows.rows:
                batch.cancel([row])
        self._sweep()

    def close(self) -> None:
        """Cancel every sequence."""
        for row in [waiting.row for waiting in self._waiting] + [row for batch in self._all() for row in batch.rows.rows]:
            self.cancel(row)

    def _all(self) -> list[Batch]:
        return self._batches + self._incoming

    def _sweep(self) -> None:
        """Forget batches that have no rows any more."""
        for batch in self._all():
            if not len(batch.rows):
                batch.publish()
        self._batches = [batch for batch in self._batches if len(batch.rows)]
        self._incoming = [batch for batch in self._incoming if len(batch.rows)]

    def _admit(self) -> None:
        """Feed a part of the waiting prompts, and let those that are fed join the others."""
        self._pace.begin(sum(len(batch.rows) for batch in self._batches))
        while self._incoming or (self._waiting and self.running < self.slots):
            most = self._pace.next((self._incoming[0].rows.rows[0] if self._incoming else self._waiting[0].row).prompt)
            if not most:
                return
            if not self._incoming:
                self._start(most)
                continue
            batch = self._incoming[0]
            before, started = batch.unfed, time.perf_counter()
            fed = self._guarded([batch], functools.partial(batch.prefill, most))
            if self.model.device.type != "cpu":
                torch.accelerator.synchronize(self.model.device.type)  # else the next round would wait for it, and be timed with it
            self._pace.fed(before - batch.unfed, time.perf_counter() - started)
            if fed and len(batch.rows):
                self._incoming.remove(batch)
                self._place(batch)
            self._sweep()

    def _start(self, most: int) -> None:
        """Take the next prompt out of the queue, and those behind it that are fed in one forward with it."""
        lengths: list[int] = []
        while self._waiting and self.running < self.slots:
            if lengths and not (self._incoming[0].is_gatherable and _go_together(lengths, self._waiting[0].row.prompt, most)):
                return
            waiting = self._waiting.popleft()
            others = bool(lengths) or (bool(self._waiting) and _go_together([waiting.row.prompt], self._waiting[0].row.prompt, most))
            batch = self._started(waiting, beside=not others)
            if batch is None:
                continue
            lengths.append(waiting.row.prompt)
            if len(lengths) == 1 or not self._incoming[0].gathers(batch):
                self._incoming.append(batch)
            else:
                self._guarded([self._incoming[0], batch], functools.partial(self._incoming[0].gather, batch))
                self._sweep()
            if len(self._incoming) != 1:
                return

    def _started(self, waiting: _Waiting, beside: bool) -> Batch | None:
        """Return a batch of one sequence, or None after an error; with its keys beside those of a running batch, if asked for."""
        near = (each for each in self._batches if self._is_near(each, [waiting.call.input_ids.shape[1]])) if beside else iter(())
        try:
            return waiting.context.run(Batch, self._speculation, waiting.call, waiting.rows, next(near, None))
        except BaseException as error:
            waiting.row.finish, waiting.row.error = "error", error
            if not isinstance(error, Exception):
                raise
            return None

    def _is_near(self, batch: Batch, lengths: list[int]) -> bool:
        """Whether rows of these lengths would not make the others read much padding."""
        return not batch.cached.ragged or batch.cached.padding(lengths) <= self._most_padding

    def _place(self, batch: Batch) -> None:
        for other in self._batches:
            if other.joins(batch) and self._is_near(other, batch.cached.fed):
                self._guarded([other, batch], functools.partial(other.join, batch))
                return
        self._batches.append(batch)
        self._guarded([batch], batch.stay_apart)

    def _guarded(self, batches: Sequence[Batch], work: Callable[[], Any]) -> Any:
        """Do a piece of the work of some batches; after an error their rows have ended, and None is returned."""
        rows = [row for batch in batches for row in batch.rows.rows]
        try:
            return work()
        except BaseException as error:
            for row in rows:
                if row.finish is None:
                    row.finish, row.error = "error", error
            for batch in batches:
                batch.rows.ended()  # which sets their tokens
                batch.abandon()
            if not isinstance(error, Exception):
                self._sweep()
                raise
            return None


def _go_together(lengths: list[int], other: int, most: int) -> bool:
    """Whether prompts of these lengths and another are fed in one forward, of up to ``most`` tokens with at most a third of filler."""
    fed = (1 + len(lengths)) * max(*lengths, other)
    return fed <= most and 3 * (sum(lengths) + other) >= 2 * fed
