"""Tokens that a grammar forces: how many of a round, and those that end a text without another forward."""

from __future__ import annotations

from patchkit.speculation.constraint import Constraint
from patchkit.speculation.judge import Verdict
from patchkit.speculation.rows import Rows

# Tokens of a forced run that ends a text; a longer one is drafted first.
_LONGEST = 128


def forced_tokens(constraint: Constraint, verdict: Verdict) -> list[int]:
    """Return how many new tokens of each row, in a round, were the only ones allowed."""
    pairs = zip(verdict.tokens, constraint.only, strict=True)
    return [sum(only[node] is not None for node in range(len(new))) for new, only in pairs]


def append_forced_end(rows: Rows, constraint: Constraint) -> list[list[int]]:
    """Append to each row the forced tokens that end it, if such follow; return them. `Rows.advance` then moves the rows' ends.

    Where forced tokens reach an end token, or the length that a row may have, the model has no say any more. Rows of which all forwards
    are needed get none.
    """
    constraint.follow(rows.state)
    runs = [
        [] if row.finish is not None or row.needs_forwards else _run_to_end(rows, constraint, index) for index, row in enumerate(rows.rows)
    ]
    if not any(runs):
        return runs
    counts = constraint.fill(runs)
    rows.reserve(max(map(len, runs)))
    for row, (run, count) in enumerate(zip(runs, counts, strict=True)):
        certain = count == len(run) and None not in constraint.only[row][: len(run)]
        runs[row] = rows.append(row, run) if run and certain else []
    return runs


def _run_to_end(rows: Rows, constraint: Constraint, row: int) -> list[int]:
    stops = rows.rows[row].stops
    room = stops.room(rows.state.lengths[row])
    run = constraint.forced(row, min(room, _LONGEST))
    end = next((i for i, token in enumerate(run) if token in stops.ends), None)
    if end is not None:
        return run[: end + 1]
    return run if len(run) == room else []
