"""Tokens that a grammar forces: how many of a round, and those that end a text without another forward."""

from __future__ import annotations

from typing import Any

from patchkit.grammar.processor import Grammar
from patchkit.speculation.constraint import Constraint
from patchkit.speculation.judge import Verdict
from patchkit.speculation.rows import Rows
from patchkit.speculation.stops import KEEP_THE_ONLY_ONE

# Tokens of a forced run that ends a text; a longer one is drafted first.
_LONGEST = 128


def forced_tokens(constraint: Constraint, verdict: Verdict) -> int:
    """Return how many new tokens of a round were the only ones allowed."""
    return sum(only[node] is not None for new, only in zip(verdict.tokens, constraint.only, strict=True) for node in range(len(new)))


def grammar_decides(processors: Any) -> bool:
    """Return whether a token that a grammar forces is chosen whatever the other processors do: none of them may forbid it."""
    return all(isinstance(each, Grammar) or type(each).__name__ in KEEP_THE_ONLY_ONE for each in processors)


def append_forced_end(rows: Rows, constraint: Constraint) -> list[list[int]]:
    """Append to each row the forced tokens that end it, if such follow; return them. `Rows.advance` then moves the rows' ends.

    Where forced tokens reach an end token, or the length that a row may have, the model has no say any more.
    """
    constraint.follow(rows.state)
    runs = [[] if rows.done[row] else _run_to_end(rows, constraint, row) for row in range(rows.state.rows)]
    if not any(runs):
        return runs
    counts = constraint.fill(runs)
    rows.reserve(max(map(len, runs)))
    for row, (run, count) in enumerate(zip(runs, counts, strict=True)):
        certain = count == len(run) and None not in constraint.only[row][: len(run)]
        runs[row] = rows.append(row, run) if run and certain else []
    return runs


def _run_to_end(rows: Rows, constraint: Constraint, row: int) -> list[int]:
    room = rows.stops.room(rows.state.lengths[row])
    run = constraint.forced(row, min(room, _LONGEST))
    end = next((i for i, token in enumerate(run) if token in rows.stops.ends), None)
    if end is not None:
        return run[: end + 1]
    return run if len(run) == room else []
