"""Errors that a client sees, in OpenAI's form: `ApiError`."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that gets no answer.

    Attributes:
        status: of HTTP.
        message: what is wrong, and what would be right.
        param: name of the field, with its path, such as "messages[0].role"; None for the request as a whole.
        code: a word for programs, such as "model_not_found"; None where OpenAI has none.
        retry_after: seconds after which the same request may succeed; None if waiting does not help.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """Return the error of a field with a bad value, status 400."""
    return ApiError(400, f"{param}: {message}" if param else message, param, code)
