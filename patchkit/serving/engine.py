"""The thread that owns the model: it takes choices from the server, generates them together, and hands their text back.

engine = Engine(model, max_rows=8, max_queue=64)
engine.start()
engine.submit(choices)  # pieces and ends come to Choice.mailbox
engine.close()
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from patchkit.serving.api_error import ApiError
from patchkit.serving.choice import Choice, End, Piece, deliver
from patchkit.serving.metrics import Metrics
from patchkit.serving.patching import base_of, claim, make_speculative, release
from patchkit.serving.threads import measured_threads
from patchkit.speculation import Row, Scheduler
from patchkit.views import cache_bytes

_logger = logging.getLogger("patchkit")

_RETRY_AFTER = 1  # seconds
# Between two measurements of the bytes of the caches, in seconds.
_BYTES_EVERY = 0.5


class Engine:
    """Generates the choices of all requests on one model, in a thread.

    Args:
        model: patched with `speculative`, or it will be for the life of the engine, without drafts.
        max_rows: choices that are generated at the same time.
        max_queue: choices that may wait beside those.
        prefill: most tokens of waiting prompts that are fed between two rounds; see `Scheduler`.
        threads: with which the model computes on a CPU; None to choose them by timing (`patchkit.serving.threads`).

    Attributes:
        metrics: its figures.
        draining: it takes no more choices, and finishes those that it has.
        dead: what has ended the thread; None while it runs.
        running, waiting: choices that have a slot, and that have none yet, after the last round.
    """

    def __init__(
        self, model: Any, metrics: Metrics, max_rows: int = 8, max_queue: int = 64, prefill: int = 512, threads: int | None = None
    ) -> None:
        given = {"max_rows": max_rows, "max_queue": max_queue, "prefill": prefill, "threads": 1 if threads is None else threads}
        for name, value in given.items():
            if value < (name != "max_queue"):
                raise ValueError(f"{name}={value}: give at least {int(name != 'max_queue')}")
        self.model, self.metrics = base_of(model), metrics
        self.max_rows, self.max_queue, self.prefill, self.threads = max_rows, max_queue, prefill, threads
        self.draining = False
        self.dead: BaseException | None = None
        self.running = self.waiting = 0
        self._condition = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._accepted = 0  # choices that have not ended, whether or not the thread has seen them
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._undo: Callable[[], Any] = lambda: None
        # The thread's own:
        self._live: list[Choice] = []
        self._counted: dict[Choice, Counter[str]] = {}
        self._measured = 0.0
        self._outbox: list[Piece | End] = []

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive() and self.dead is None

    @property
    def idle(self) -> bool:
        """Whether every choice has ended."""
        return self._accepted == 0

    def start(self) -> None:
        """Patch the model where it has to be, and start the thread.

        Raises:
            PatchConflict: another server has this model, or it cannot be patched again.
            UnsupportedModel: it cannot be patched.
        """
        claim(self.model)
        undo: Callable[[], Any] | None = None
        try:
            undo = make_speculative(self.model)
            self._schedulers = self._new_schedulers()
            self._threads_before = torch.get_num_threads()
            self._threads = self.threads or measured_threads(self.model, self.max_rows)
        except BaseException:
            try:
                if undo is not None:
                    undo()
            finally:
                release(self.model)
            raise
        self._undo = undo
        self._stopping, self.draining, self.dead = False, False, None
        self._thread = threading.Thread(target=self._run, name="patchkit-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel what is left, end the thread, and undo what `start` has patched."""
        if self._thread is None:
            return
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()
        self._thread = None
        try:
            self._undo()
        finally:
            release(self.model)

    def drain(self) -> None:
        """Take no more choices."""
        self.draining = True

    def submit(self, choices: Sequence[Choice]) -> None:
        """Take the choices of a request, all or none.

        Raises:
            ApiError: 429 if too many wait; 503 if the engine does not take any.
        """
        with self._condition:
            if not self.alive or self._stopping:
                raise ApiError(503, "the engine does not run: the server's log has the reason", code="engine_dead")
            if self.draining:
                raise ApiError(503, "the server shuts down", code="shutting_down", retry_after=10)
            room = self.max_rows + self.max_queue
            if len(choices) > room:
                raise ApiError(400, f"n: {len(choices)} texts in one request, this server takes at most {room}", "n")
            if self._accepted + len(choices) > room:
                raise ApiError(429, f"{self._accepted} texts wait or are generated: try again", code="queue_full", retry_after=_RETRY_AFTER)
            self._accepted += len(choices)
            self._commands += [functools.partial(self._admit, choice) for choice in choices]
            self._condition.notify()

    def cancel(self, choices: Sequence[Choice]) -> None:
        """End choices where they are, before the next round. Those that have ended are left as they are."""
        with self._condition:
            self._commands += [functools.partial(self._cancel, choice) for choice in choices]
            self._condition.notify()

    def cancel_all(self) -> None:
        """End every choice."""
        with self._condition:
            self._commands.append(self._cancel_live)
            self._condition.notify()

    # -- in the thread ---------------------------------------------------------------------------------------------------------

    def _new_schedulers(self) -> list[Scheduler]:
        """The scheduler of all, and one that generates alone those choices that were in a batch that met an error; see `_slots`."""
        return [Scheduler(self.model, self.max_rows, self.prefill), Scheduler(self.model, 1, self.prefill)]

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            self._work()
        finally:
            # A part of this number is the whole process's: what was set when the server started, whoever has set another since.
            torch.set_num_threads(self._threads_before)

    def _work(self) -> None:
        commands: list[Callable[[], None]] = []
        try:
            while True:
                with self._condition:
                    while not (self._commands or self._live or self._stopping):
                        self._condition.wait()
                    if self._stopping:
                        break
                    commands, self._commands = self._commands, []
                while commands:
                    commands.pop(0)()
                self._step()
                self._deliver()
        except BaseException as error:
            self.dead = error
            _logger.exception("patchkit: the engine of the server has died")
        with self._condition:
            self._stopping = True
            commands, self._commands = commands + self._commands, []
        for command in commands:
            command()
        for choice in list(self._live):
            self._end(choice, "cancelled" if self.dead is None else "error", self.dead)
        self._deliver()
        for scheduler in self._schedulers:
            try:
                scheduler.close()
            except Exception:
                _logger.exception("patchkit: rows of the server could not be ended")
        self._measure(now=True)

    def _step(self) -> None:
        """One round of all choices, and the ends of those that have ended."""
        for alone in (False, True):
            scheduler = self._schedulers[alone]
            scheduler.slots = self._slots(alone)
            try:
                scheduler.step()
            except Exception as error:
                _logger.exception("patchkit: a round of the server has failed")
                self._replace(scheduler, error)
        failed = Counter(id(choice.row.error) for choice in self._live if choice.row is not None and choice.row.finish == "error")
        for choice in list(self._live):
            self._count(choice)
            row = choice.row
            assert row is not None
            if row.finish == "error":
                self._after_error(choice, row, shared=failed[id(row.error)] > 1)
            elif row.finish is not None or choice.shown.stopped:
                self._finish(choice, row)
        self._measure()

    def _slots(self, alone: bool) -> int:
        """Slots of a scheduler now: both have `max_rows` together, of which one is kept for choices that are to be generated alone."""
        shared, again = self._schedulers
        return min(1, self.max_rows - shared.running) if alone else self.max_rows - bool(again.running or again.waiting)

    def _replace(self, scheduler: Scheduler, error: Exception) -> None:
        """Go on with a new scheduler after an error of one, which ends the rows that it had."""
        for choice in self._live:
            if choice.row is not None and choice.row.finish is None and self._scheduler_of(choice) is scheduler:
                choice.row.finish, choice.row.error = "error", error
        number = self._schedulers.index(scheduler)
        self._schedulers[number] = self._new_schedulers()[number]

    def _admit(self, choice: Choice, alone: bool = False) -> None:
        scheduler = self._schedulers[alone]
        choice.alone = alone
        try:
            choice.row = scheduler.submit(choice.ids, seed=choice.seed, on_tokens=functools.partial(self._take, choice), **choice.options)
        except Exception as error:
            _logger.error("patchkit: a request could not be started", exc_info=error)
            self._live += [] if choice in self._live else [choice]
            self._end(choice, "error", error)
            return
        self._counted[choice] = Counter()
        if choice not in self._live:
            self._live.append(choice)
            self.metrics.prompt_tokens.inc(len(choice.ids))

    def _scheduler_of(self, choice: Choice) -> Scheduler:
        return self._schedulers[choice.alone]

    def _take(self, choice: Choice, new: list[int]) -> None:
        """Turn the tokens of a round into text. Called by the scheduler within a round."""
        fresh = max(0, len(choice.row.new) - choice.taken) if choice.row is not None else 0
        piece, is_first = choice.take(new), choice.last is None
        now = time.perf_counter()
        if fresh:
            self.metrics.generated_tokens.inc(fresh)
            if choice.last is None:
                self.metrics.first_token.observe(now - choice.submitted)
            else:
                for _ in range(fresh):
                    self.metrics.between_tokens.observe((now - choice.last) / fresh)
            choice.last = now
        if piece is not None:
            self._outbox.append(piece)
            if is_first:  # which does not wait for the round of the others
                self._deliver()

    def _count(self, choice: Choice) -> None:
        """Add a row's drafts since the last round to the figures."""
        row, seen = choice.row, self._counted[choice]
        counters = {"proposed": self.metrics.draft_tokens, "accepted": self.metrics.accepted_tokens, "forced": self.metrics.forced_tokens}
        for name, counter in counters.items():
            counter.inc(getattr(row, name) - seen[name])
            seen[name] = getattr(row, name)

    def _after_error(self, choice: Choice, row: Row, shared: bool) -> None:
        """End a choice that met an error alone. Where others shared its round, one of them may be guilty: it is generated again, alone.

        A choice has the same tokens whenever and beside whom it is generated, so those that the client has are skipped.
        """
        if shared and not choice.alone:
            self._admit(choice, alone=True)
            return
        _logger.error("patchkit: a request has failed", exc_info=row.error)
        self._end(choice, "error", row.error)

    def _finish(self, choice: Choice, row: Row) -> None:
        if row.finish is None:  # the stop text was found in the text, and not yet in the tokens
            self._release(choice, row)
        piece = choice.finish()
        if piece is not None:
            self._outbox.append(piece)
        finish = "stop" if choice.shown.stopped else str(row.finish)
        self._end(choice, finish, None)

    def _cancel(self, choice: Choice) -> None:
        if choice in self._live:
            if choice.row is not None:
                self._release(choice, choice.row)
            self._end(choice, "cancelled", None)

    def _release(self, choice: Choice, row: Row) -> None:
        """End the row of a choice. After an error its scheduler is replaced: what else it generated is generated again, alone."""
        try:
            self._scheduler_of(choice).cancel(row)
        except Exception as error:
            _logger.exception("patchkit: a row of the server could not be ended")
            self._replace(self._scheduler_of(choice), error)

    def _cancel_live(self) -> None:
        for choice in list(self._live):
            self._cancel(choice)

    def _end(self, choice: Choice, finish: str, error: BaseException | None) -> None:
        self._live.remove(choice)
        self._counted.pop(choice, None)
        with self._condition:
            self._accepted -= 1
        self.metrics.requests.labels(finish=finish).inc()
        self.metrics.prefix_hit_tokens.inc(choice.cached)
        self.metrics.whole.observe(time.perf_counter() - choice.submitted)
        if not self._live:
            self._measure(now=True)
        self._outbox.append(End(choice, finish, error))

    def _deliver(self) -> None:
        """Hand over what the choices have got since the last time."""
        events, self._outbox = self._outbox, []
        deliver(events)

    def _measure(self, now: bool = False) -> None:
        self.running = sum(scheduler.running for scheduler in self._schedulers)
        self.waiting = sum(scheduler.waiting for scheduler in self._schedulers)
        self.metrics.running.set(self.running)
        self.metrics.waiting.set(self.waiting)
        if now or time.monotonic() - self._measured > _BYTES_EVERY:
            self.metrics.kv_bytes.set(cache_bytes([scheduler.caches for scheduler in self._schedulers]))
            self._measured = time.monotonic()
