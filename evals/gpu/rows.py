"""A row of the result: one case with its status, run within the time of its section."""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

PASSED, FAILED, NOT_MEASURED, NO_TIME = "passed", "failed", "not measured", "no time"

Row = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Row]]]


class NotMeasured(Exception):
    """A case cannot run on this machine; the message is the reason."""


class TimedOut(BaseException):
    """The time of a section is used up; derived from BaseException, so that no library handler swallows it."""


def run_section(cases: Cases, until: float, done: Callable[[list[Row]], object] = lambda rows: None) -> list[Row]:
    """Rows with a status, one per case, whatever happens in it; ``done`` is called after each with all rows so far."""
    rows: list[Row] = []
    try:
        for name, case in cases:
            rows.append({"name": name, **outcome(case, until)})
            done(rows)
    except Exception as error:  # of the generator, between two cases
        rows.append({"name": "cases", **failure(error)})
        done(rows)
    return rows


def outcome(case: Callable[[], Row], until: float) -> Row:
    """Row of one case with its status; the case is stopped at ``until`` (time.monotonic)."""
    seconds = until - time.monotonic()
    if seconds <= 0:
        return {"status": NO_TIME, "message": "no time was left"}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        figures = case()
        return {"status": FAILED if "message" in figures else PASSED, **figures}
    except NotMeasured as reason:
        return {"status": NOT_MEASURED, "message": str(reason)}
    except TimedOut:
        return {"status": NO_TIME, "message": f"stopped after {seconds:.0f} s"}
    except Exception as error:
        return failure(error)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def failure(error: Exception) -> Row:
    """Row of an exception, which is printed with its traceback."""
    traceback.print_exception(error)
    return {"status": FAILED, "message": f"{type(error).__name__}: {error}"}


def out_of_time(number: int, frame: Any) -> None:
    """Signal handler of SIGALRM."""
    raise TimedOut
