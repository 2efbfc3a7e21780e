"""Functions that a model may call: their readers, the schema of a call that is demanded, and calls read back from a text."""

from __future__ import annotations

import inspect
import json
import logging
import re
import uuid
from dataclasses import dataclass
from typing import Any

from patchkit.serving.api_error import bad
from patchkit.serving.readers import Reader, anything, either, flag, is_object, is_text, list_of, one_of, record, text

_logger = logging.getLogger("patchkit")

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)


def _name() -> Reader:
    def read(value: Any, at: str) -> str:
        name: str = text(1).read(value, at)
        if not _NAME.fullmatch(name):
            raise bad(at, "use 1 to 64 letters, digits, points, dashes and underscores")
        return name

    return Reader({"type": "string", "pattern": f"^{_NAME.pattern}$"}, read, required=True)


_FUNCTION = record({"name": _name(), "description": text(), "parameters": anything(), "strict": flag()}, required=True)
TOOLS = list_of(record({"type": one_of("function", required=True), "function": _FUNCTION}), most=128)
TOOL_CHOICE = either(
    (is_text, one_of("auto", "none", "required")),
    (is_object, record({"type": one_of("function", required=True), "function": record({"name": _name()}, required=True)})),
    expected="auto, none, required, or an object that names a function",
)


@dataclass(frozen=True)
class ToolUse:
    """How the text of a choice becomes calls of functions.

    Attributes:
        tools: those that the model may call.
        named: the one that has to be called, so that the text is its arguments; None if the model chooses.
        demanded: the text is a call, by a grammar; otherwise it may hold calls.
        several: more than one call is allowed.
    """

    tools: list[dict[str, Any]]
    named: str | None
    demanded: bool
    several: bool

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a demanded call.

        Raises:
            ApiError: two functions have different definitions of one name.
        """
        parameters = {each["function"]["name"]: dict(each["function"].get("parameters") or {}) for each in self.tools}
        shared: dict[str, dict[str, Any]] = {}
        for schema in parameters.values():
            for key in ("$defs", "definitions"):
                for name, definition in (schema.pop(key, None) or {}).items():
                    if shared.setdefault(key, {}).setdefault(name, definition) != definition:
                        raise bad("tools", f"two functions define {name!r} under {key} differently: rename one")
        for schema in parameters.values():
            schema.setdefault("type", "object")
        if self.named is not None:
            return {**parameters[self.named], **shared}
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": schema},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for name, schema in parameters.items()
        ]
        return {"anyOf": calls, **shared}

    def message(
        self, content: str, prompt: list[int], tokens: list[int], tokenizer: Any, stopped: bool = False
    ) -> tuple[str | None, list[dict[str, Any]]]:
        """Return what is said and what is called: text or None, and calls in OpenAI's form.

        Args:
            content: text of the choice.
            prompt: tokens of the prompt, which a model's own form of calls may begin in.
            tokens: those of the choice, from which a tokenizer with a response template reads calls in its model's own form.
            stopped: a stop text has ended the text, and may have cut a call, which then is text.
        """
        if self.named is not None:
            return (content, []) if stopped and not _is_json(content) else (None, [_call(self.named, content)])
        if self.demanded:
            found = _calls_in(content)
            return (None, found) if found else (content, [])
        if stopped and template_of(tokenizer) is not None:  # the tokens have the stop text, and what may have come after it
            return content, []
        said, found = _parsed(content, prompt, tokens, tokenizer, self.tools)
        return said or None, found if self.several else found[:1]


def tool_use(tools: list[dict[str, Any]], choice: Any, several: bool) -> ToolUse | None:
    """Return how calls are read; None without tools, or where the request forbids their use.

    Raises:
        ApiError: a function is there twice, or the choice names none of them.
    """
    names = [each["function"]["name"] for each in tools]
    if len(set(names)) < len(names):
        raise bad("tools", f"two functions are called {next(name for name in names if names.count(name) > 1)!r}")
    if not tools or choice == "none":
        return None
    named = None if isinstance(choice, str) else choice["function"]["name"]
    if named is not None and named not in names:
        raise bad("tool_choice", f"{named!r} is none of the tools")
    return ToolUse(tools, named, demanded=choice != "auto", several=several)


def template_of(tokenizer: Any) -> Any:
    """Return the tokenizer's response template, by which it reads calls; None if it has none. Older transformers call it a schema."""
    return getattr(tokenizer, "response_template", None) or getattr(tokenizer, "response_schema", None)


def _parsed(
    content: str, prompt: list[int], tokens: list[int], tokenizer: Any, tools: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Text and calls, by the tokenizer's response template; without one, by the marks <tool_call> of many models."""
    if template_of(tokenizer) is None:
        calls = [call for block in _MARKED.findall(content) for call in _calls_in(block)]
        rest = _MARKED.sub(lambda block: "" if _calls_in(block[1]) else block[0], content)
        return (rest.strip() if calls else content), calls
    takes = inspect.signature(tokenizer.parse_response).parameters
    more = {name: value for name, value in (("prefix", prompt), ("tools", tools)) if name in takes}
    try:
        parsed = tokenizer.parse_response(tokens, **more)
        said = str(parsed.get("content") or "")
        calls = [_call(each["function"]["name"], _as_text(each["function"].get("arguments"))) for each in parsed.get("tool_calls") or []]
    except Exception as error:  # a template meets a text that it does not expect; the client gets the text as it is
        _logger.warning("patchkit: the tokenizer's response template did not read an answer (%s): sent as text", error)
        return content, []
    return said, calls


def _as_text(arguments: Any) -> str:
    """The arguments of a call as JSON text, which some templates give already."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)


def _is_json(content: str) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def _calls_in(block: str) -> list[dict[str, Any]]:
    """Calls in a JSON text: an object with name and arguments, or a list of these; none if it is something else."""
    try:
        value = json.loads(block)
    except ValueError:
        return []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, dict) and isinstance(each.get("name"), str) for each in values):
        return []
    return [_call(each["name"], json.dumps(each.get("arguments", each.get("parameters", {})), ensure_ascii=False)) for each in values]


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": {"name": name, "arguments": arguments}}
