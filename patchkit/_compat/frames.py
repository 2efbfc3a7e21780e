"""The modules that other threads are running."""

from __future__ import annotations

import sys
import threading
from typing import Any

from patchkit._compat.declared import Names

RELIED_ON: Names = {"sys:_current_frames": None, "torch.nn:Module._call_impl": None}


def is_in_call_of(thread: threading.Thread, module: Any) -> bool:
    """Whether ``thread`` is in a call of ``module``, hooks and forward (a frame of torch's ``Module._call_impl``)."""
    frame = None if thread.ident is None else sys._current_frames().get(thread.ident)
    while frame is not None:
        if frame.f_code.co_name == "_call_impl" and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
