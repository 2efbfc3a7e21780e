"""Activity of patches during lm-eval's tasks: a task in which a patch did nothing has no score of that patch."""

from __future__ import annotations

from collections import Counter
from typing import Any

from patchkit.api import report
from patchkit.errors import PatchConflict, PatchError
from patchkit.patch import available_patches
from patchkit.record import Report

Counters = dict[str, Counter[str]]


class NeverActed(PatchError):
    """A patch did nothing in a task, so the measurement is of the model without it, and no score of the patch."""


class Activity:
    """Counters of what the patches of a model did, by task.

    Attributes:
        tasks: by task, the rise of the counters of each patch, and under "scored" the numbers of scored tokens.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tasks: dict[str, Counters] = {}
        self._scored: Counter[str] = Counter()

    def report(self) -> Report:
        """The report of the model; empty if it is not patched."""
        try:
            return report(self.model)
        except PatchConflict:
            return Report([])

    def count(self, first: int, tokens: int) -> None:
        """Count ``tokens`` as scored, the first of them by the query at row position ``first``."""
        self._scored["tokens scored"] += tokens
        for patch in self.report().patches:
            if patch.same_up_to:
                self._scored[_beyond(patch.name)] += max(0, first + tokens - max(first, patch.same_up_to))

    def counters(self) -> Counters:
        """Copies of all counters so far, by patch, and those of scored tokens under "scored"."""
        return {"scored": Counter(self._scored), **{patch.name: Counter(patch.hits) for patch in self.report().patches}}

    def record(self, found: list[dict[str, Counters]]) -> None:
        """Add what each process found to `tasks`.

        Raises:
            NeverActed: a patch did nothing in a task, in all processes together.
        """
        done: dict[str, Counters] = {}
        for each in found:
            _add(done, each)
        # The sums are equal in all processes, so that none of them waits for one that has stopped.
        idle = [reason for task, record in done.items() if (reason := self._idle(task, record))]
        _add(self.tasks, done)
        if idle:
            self.tasks = {}
            why = [text for patch in self.report().patches for text, count in patch.warnings.items() if count]
            remedy = f"the reason: {'; '.join(why)}" if why else "give longer texts or other tasks"
            raise NeverActed(f"{'; '.join(idle)}. What was measured is the model without it: {remedy}")

    def _idle(self, task: str, record: Counters) -> str | None:
        """A message about the first patch that did nothing in a task."""
        for patch in self.report().patches:
            acts = available_patches()[patch.name].acts or tuple(record[patch.name])
            if not any(record[patch.name][counter] for counter in acts):
                return f"{patch.spec} never acted in {task} (no {' or '.join(acts) or 'counter of it rose'})"
            if patch.same_up_to and not record["scored"][_beyond(patch.name)]:
                return f"{patch.spec} never acted in {task} (no token beyond {patch.same_up_to} was scored)"
        return None


def _add(total: dict[str, Counters], more: dict[str, Counters]) -> None:
    for task, record in more.items():
        for name, counts in record.items():
            total.setdefault(task, {}).setdefault(name, Counter()).update(counts)


def _beyond(patch: str) -> str:
    return f"tokens scored beyond the window of {patch}"
