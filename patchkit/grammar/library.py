"""The optional library that parses: llguidance."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from patchkit.errors import GrammarError

# Characters of a message of the library; what follows is its state, of many lines.
_LONGEST_MESSAGE = 400


def is_installed() -> bool:
    """Return whether llguidance can be imported."""
    return importlib.util.find_spec("llguidance") is not None


@functools.cache
def llguidance() -> Any:
    """Return the module llguidance.

    Raises:
        GrammarError: it is not installed.
    """
    try:
        import llguidance
    except ImportError as error:
        raise GrammarError(f"grammars need llguidance, which cannot be imported ({error}): pip install 'patchkit[grammar]'") from error
    return llguidance


def short(message: str) -> str:
    """Return a message of the library in one line, without the dump of its state."""
    message = " ".join(message.split("<state>")[0].split())
    return message if len(message) <= _LONGEST_MESSAGE else message[:_LONGEST_MESSAGE] + " ..."
