"""`Exclusive`: a patched model runs in one thread at a time, and says so instead of mixing two texts up."""

from __future__ import annotations

import threading
from typing import Any

from patchkit._compat.frames import is_in_call_of
from patchkit.errors import StreamError


class Exclusive:
    """Held by the thread in which a patched model runs; the same thread may take it again.

    Nobody waits for it: what a patch keeps while a forward, or a call of generate, is under way belongs to that thread, and a second one
    is better told than slowed down without a word. Copies and pickles are free, and so is what a thread held that has ended.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._owner: threading.Thread | None = None
        self._depth = 0

    def take(self, what: str, module: Any = None, nested: bool = True) -> None:
        """Take it for this thread; ``give_back`` as often.

        Args:
            what: that runs, for the message: "a forward of this LlamaModel".
            module: where its holder is not told of every end (KeyboardInterrupt), the module whose forward must be running in its thread.
            nested: what this thread has taken and not given back is still under way; else it was interrupted, and counts no more.

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
        """Give back what this thread has taken. Returns False, and does nothing, if it has not."""
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
    """Whether a thread is alive and, if a module is given, in a call of it. Looked at only where two threads meet."""
    return thread.is_alive() and (module is None or is_in_call_of(thread, module))
