"""The body of a request as a JSON object, or an `ApiError`."""

from __future__ import annotations

import json
from typing import Any

from starlette.requests import Request

from patchkit.serving.api_error import ApiError, bad

# Bytes of the largest body.
MOST_BYTES = 4 * 2**20


async def read_body(request: Request) -> Any:
    """Return the JSON value in the body of a request.

    Raises:
        ApiError: 413 for more than `MOST_BYTES`; 415 for a body that is not declared to be JSON, which a page of another site could
            send without asking; 400 for what is not JSON.
    """
    declared = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if declared != "application/json":
        raise ApiError(415, f"the Content-Type is {declared[:60] or 'missing'}: send application/json", code="unsupported_content_type")
    parts, size = [], 0
    if request.headers.get("content-length", "").isdigit() and int(request.headers["content-length"][:20]) > MOST_BYTES:
        raise _too_large()
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > MOST_BYTES:
            raise _too_large()
    return read_json(b"".join(parts))


def read_json(data: bytes) -> Any:
    """Return a JSON value.

    Raises:
        ApiError: not UTF-8, not JSON, numbers that JSON does not have, or half of a surrogate pair, which is no text.
    """
    try:
        value = json.loads(data.decode("utf-8"), parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise bad(None, f"the body is not UTF-8 ({error.reason} at byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise bad(None, "the body has half of a surrogate pair, which is no text: send whole characters") from error
    except RecursionError as error:
        raise bad(None, "the body is nested too deeply") from error
    except ValueError as error:
        raise bad(None, f"the body is not JSON ({str(error)[:200]})") from error
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MOST_BYTES >> 20} MiB", code="request_too_large")
