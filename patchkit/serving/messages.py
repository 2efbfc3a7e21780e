"""The messages of a chat: their readers, and the form in which chat templates take them."""

from __future__ import annotations

import json
from typing import Any

from patchkit.serving.api_error import bad
from patchkit.serving.readers import Reader, anything, either, is_list, is_text, list_of, one_of, record, text

_PARTS = list_of(record({"type": one_of("text", required=True), "text": text(required=True)}), least=1)
_CONTENT = either((is_text, text()), (is_list, _PARTS), expected="text, or a list of parts of text")
_CALL = record(
    {
        "id": text(1, required=True),
        "type": one_of("function", required=True),
        "function": record({"name": text(1, required=True), "arguments": text(required=True)}, required=True),
    }
)


def _required(reader: Reader) -> Reader:
    return Reader(reader.schema, reader.read, required=True)


def _message(role: str, fields: dict[str, Reader]) -> Reader:
    return record({"role": one_of(role, required=True), "name": text(), **fields})


_ROLES = {
    **{role: _message(role, {"content": _required(_CONTENT)}) for role in ("system", "developer", "user")},
    "assistant": _message("assistant", {"content": _CONTENT, "tool_calls": list_of(_CALL, least=1), "refusal": text()}),
    "tool": _message("tool", {"content": _required(_CONTENT), "tool_call_id": text(1, required=True)}),
}


def _read(value: Any, at: str) -> dict[str, Any]:
    role = anything().read(value, at).get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise bad(f"{at}.role", f"give one of {', '.join(_ROLES)}")
    message: dict[str, Any] = _ROLES[role].read(value, at)
    if role == "assistant" and not {"content", "tool_calls", "refusal"} & set(message):
        raise bad(f"{at}.content", "is missing", "missing_required_parameter")
    return message


MESSAGES = list_of(Reader({"anyOf": [each.schema for each in _ROLES.values()]}, _read), least=1, required=True)


def for_template(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages in the form of transformers' chat templates: content as one text, arguments of calls as objects.

    A developer's message is a system message, which older templates know.

    Raises:
        ApiError: the arguments of a call are not JSON.
    """
    result = []
    for i, message in enumerate(messages):
        content = message.get("content", message.get("refusal", ""))
        if isinstance(content, list):
            content = "".join(part["text"] for part in content)
        role = "system" if message["role"] == "developer" else message["role"]
        each = {name: message[name] for name in ("name", "tool_call_id") if name in message} | {"role": role, "content": content}
        if "tool_calls" in message:
            each["tool_calls"] = [
                {**call, "function": {**call["function"], "arguments": _arguments(call, f"messages[{i}].tool_calls[{number}]")}}
                for number, call in enumerate(message["tool_calls"])
            ]
        result.append(each)
    return result


def _arguments(call: dict[str, Any], at: str) -> Any:
    try:
        return json.loads(call["function"]["arguments"] or "{}")
    except (ValueError, RecursionError) as error:
        raise bad(f"{at}.function.arguments", "is not JSON") from error
