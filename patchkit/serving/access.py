"""Who may use a server: its API key, and addresses that other machines reach."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

from starlette.requests import Request

from patchkit.errors import PatchError
from patchkit.serving.api_error import ApiError

# The variable that may hold the key.
VARIABLE = "PATCHKIT_API_KEY"
_OWN_MACHINE = ("127.", "::1", "localhost")


def read_key(file: Path | None) -> str | None:
    """Return the API key: that of a file, or of the environment; None if there is none.

    Raises:
        PatchError: the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(VARIABLE, "").strip() or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"the API key in {file} cannot be read ({error}): give a text file with one key") from error
    if not key or len(key.split()) > 1:
        raise PatchError(f"{file} holds no API key: write one key into it, without blanks")
    return key


def check_key(request: Request, key: str | None) -> None:
    """Refuse a request without the key, in a time that does not depend on what it has instead.

    Raises:
        ApiError: 401.
    """
    if key is None:
        return
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are read as Latin-1, which gives their bytes back. Digests have equal length: a comparison of keys would show theirs.
    digests = [hashlib.sha256(each).digest() for each in (given.strip().encode("latin-1"), key.encode("utf-8"))]
    if not hmac.compare_digest(*digests) or kind.lower() != "bearer":
        raise ApiError(401, "the API key is wrong or missing: send Authorization: Bearer KEY", code="invalid_api_key")


def is_open_to_others(host: str) -> bool:
    """Return whether other machines may reach an address."""
    return not host.startswith(_OWN_MACHINE)
