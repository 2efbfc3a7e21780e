"""A time limit for one measurement, by SIGALRM."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class OutOfTime(BaseException):
    """The time for a measurement is over; the message names it.

    Derives from BaseException, so that a library's `except Exception` does not swallow it.
    """


@contextlib.contextmanager
def at_most(seconds: float, message: str) -> Iterator[None]:
    """Raise `OutOfTime` in the block after ``seconds``, where signals can: in the main thread, not on Windows."""
    if seconds <= 0:
        raise OutOfTime(message)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise OutOfTime(message)

    before = signal.signal(signal.SIGALRM, stop)
    try:
        # Repeated every 5 s, because an exception that is raised in a destructor is lost.
        signal.setitimer(signal.ITIMER_REAL, seconds, 5.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # once more: the alarm may have come before the line above
        signal.signal(signal.SIGALRM, before)
