"""`Exclusive`: a patched model runs in one thread at a time, and raises instead of mixing two sequences up."""

from __future__ import annotations

import threading
from typing import Any

from patchkit._compat.frames import is_in_call_of
from patchkit.errors import StreamError


class Exclusive:
    """Re-entrant lock of a patched model that raises instead of waiting.

    The state of a patch during a forward, or during a call of generate, belongs to one thread. A second thread gets an error, because
    waiting would slow it down silently. Copies and pickles are unlocked, and a lock of a thread that has ended is free.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def take(self, what: str, module: Any = None, nested: bool = True) -> None:
        """Take the lock for this thread; ``give_back`` has to be called as often.

        Args:
            what: the work that holds the lock, for the message: "a forward of this LlamaModel".
            module: if the holder is not notified of every end (KeyboardInterrupt), the module whose forward must be running in its thread.
            nested: earlier calls of this thread are still running; else they were interrupted, and no longer count.

        Raises:
            StreamError: another thread has it.
        """
        thread = threading.current_thread()
        with self._guard:
            if self._owner is not None and self._owner is not thread and _is_running(self._owner, module):
                raise StreamError(
                    f"{what} is under way in another thread, and a patched model runs in one thread at a time: put a lock around its "
                    "calls, or give each thread a model of its own (copy.deepcopy before patching; weights may be shared)"
                )
            self._depth = self._depth + 1 if nested and self._owner is thread else 1
            self._owner = thread

    def give_back(self) -> bool:
        """Release the lock once. Returns False, and does nothing, if this thread does not hold it."""
        with self._guard:
            if self._owner is not threading.current_thread():
                return False
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
            return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Exclusive:
        return Exclusive()

    def __reduce__(self) -> Any:
        return Exclusive, ()


def _is_running(thread: threading.Thread, module: Any) -> bool:
    """Whether a thread is alive and, if a module is given, inside a call of it. Only checked when two threads collide."""
    return thread.is_alive() and (module is None or is_in_call_of(thread, module))
