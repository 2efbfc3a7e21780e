"""The two requests of OpenAI's API that are served, as data: `read_chat`, `read_completion`.

Every field has a reader. What has none, or a value that is not served, is an error, and is never ignored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from patchkit.serving.api_error import bad
from patchkit.serving.messages import MESSAGES
from patchkit.serving.readers import (
    Reader,
    anything,
    either,
    flag,
    integer,
    is_list,
    is_object,
    is_text,
    list_of,
    number,
    one_of,
    record,
    text,
)
from patchkit.serving.tools import TOOL_CHOICE, TOOLS

# OpenAI's largest number of choices.
MOST_CHOICES = 128
_LARGEST = 2**63 - 1
_COMPLETION_TOKENS = 16  # what OpenAI's completions give where max_tokens is left out
_SMALLEST_TEMPERATURE = 1e-3


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are OpenAI's.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p: which tokens may be drawn; top_k=0 is all.
        repetition_penalty: of transformers: over the prompt and the new tokens.
        presence_penalty, frequency_penalty: of OpenAI: over the new tokens.
        logit_bias: token id -> what is added to its logit.
        seed: of the first choice; None for one that nobody knows.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        chat: the prompt is messages; otherwise texts or token ids.
        model: name of the model; None if the request has none.
        messages: of a chat.
        prompts: of completions: texts, or lists of token ids.
        n: choices of each prompt.
        max_tokens: most new tokens of a choice; None for as many as the model and the server allow, and at most `default_tokens`.
        default_tokens: most new tokens where the request gives no number; None for no such bound.
        stop: texts before which a choice ends.
        logprobs: number of likeliest tokens to name at each position; 0 for the chosen one alone; None for no log probabilities.
        stream, include_usage: tokens as they come; with a last chunk of counts.
        response_format: the form of the text, as ``{"type": "json_schema", ...}``; None for free text.
        tools, tool_choice, parallel_tool_calls: functions that the model may call, as the request has them.
    """

    chat: bool
    sampling: Sampling
    model: str | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[str | list[int]] = field(default_factory=list)
    n: int = 1
    max_tokens: int | None = None
    default_tokens: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False
    response_format: dict[str, Any] | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True


def _bias() -> Reader:
    value_of = number(-100, 100)

    def read(value: Any, at: str) -> dict[int, float]:
        given = anything().read(value, at)
        if any(not key.isascii() or not key.isdigit() or len(key) > 9 for key in given):
            raise bad(at, "its keys are token ids, such as {'1234': -100}")
        return {int(key): value_of.read(each, f"{at}.{key}") for key, each in given.items()}

    return Reader({"type": "object", "propertyNames": {"pattern": "^[0-9]{1,9}$"}, "additionalProperties": value_of.schema}, read)


def _by_type(**kinds: dict[str, Reader]) -> Reader:
    """Objects whose field "type" tells which other fields they have."""
    records = {name: record({"type": one_of(name, required=True), **fields}) for name, fields in kinds.items()}

    def read(value: Any, at: str) -> dict[str, Any]:
        kind = anything().read(value, at).get("type")
        if not isinstance(kind, str) or kind not in records:
            raise bad(f"{at}.type", f"give one of {', '.join(records)}", "unsupported_value")
        result: dict[str, Any] = records[kind].read(value, at)
        return result

    return Reader({"anyOf": [each.schema for each in records.values()]}, read)


_SCHEMA = {"name": text(1), "description": text(), "strict": flag(), "schema": anything(required=True)}

_COMMON = {
    "model": text(),
    "n": integer(1, MOST_CHOICES),
    "stream": flag(),
    "stream_options": record({"include_usage": flag()}),
    "max_tokens": integer(1, 1 << 30),
    "stop": either((is_text, text(1)), (is_list, list_of(text(1), most=4)), expected="a text, or a list of up to 4"),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(0, 1 << 30),
    "min_p": number(0, 1),
    "repetition_penalty": number(0.01, 100),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": _bias(),
    "seed": integer(-_LARGEST - 1, _LARGEST),
    "response_format": _by_type(
        text={},
        json_object={},
        json_schema={"json_schema": record(_SCHEMA, required=True)},
        regex={"regex": text(1, required=True)},
        lark={"lark": text(1, required=True)},
    ),
    "user": text(),  # names whom the client asks for, and has no effect in OpenAI's API either
}

CHAT = record(
    {
        **_COMMON,
        "messages": MESSAGES,
        "max_completion_tokens": integer(1, 1 << 30),
        "logprobs": flag(),
        "top_logprobs": integer(0, 20),
        "tools": TOOLS,
        "tool_choice": TOOL_CHOICE,
        "parallel_tool_calls": flag(),
        "modalities": one_of(["text"]),
        "service_tier": one_of("auto", "default"),
        "store": one_of(False),
    }
)

_PROMPT_IDS = list_of(integer(0, 1 << 30), least=1)
COMPLETION = record(
    {
        **_COMMON,
        "prompt": either(
            (is_text, text()),
            (lambda value: is_list(value) and bool(value) and all(type(each) is int for each in value), _PROMPT_IDS),
            (
                is_list,
                list_of(
                    either((is_text, text()), (is_list, _PROMPT_IDS), expected="texts, or lists of token ids"), least=1, most=MOST_CHOICES
                ),
            ),
            expected="a text, token ids, or a list of these",
            required=True,
        ),
        "logprobs": integer(0, 20),
        "best_of": one_of(1),
        "echo": one_of(False),
    }
)


def read_chat(body: Any) -> Asked:
    """Return the request in the body of /v1/chat/completions.

    Raises:
        ApiError: what is not served.
    """
    given = CHAT.read(_object(body), "")
    limits = {given[name] for name in ("max_tokens", "max_completion_tokens") if name in given}
    if len(limits) > 1:
        raise bad("max_tokens", "differs from max_completion_tokens: give one of them")
    if "top_logprobs" in given and not given.get("logprobs"):
        raise bad("top_logprobs", "needs logprobs: true")
    logprobs = given.get("top_logprobs", 0) if given.get("logprobs") else None
    for name in ("tool_choice", "parallel_tool_calls"):
        if name in given and not given.get("tools"):
            if given[name] == "none":
                continue
            raise bad(name, "needs tools")
    return Asked(
        chat=True,
        max_tokens=next(iter(limits), None),
        logprobs=logprobs,
        messages=given["messages"],
        tools=given.get("tools", []),
        tool_choice=given.get("tool_choice", "auto"),
        parallel_tool_calls=given.get("parallel_tool_calls", True),
        **_common(given),
    )


def read_completion(body: Any) -> Asked:
    """Return the request in the body of /v1/completions.

    Raises:
        ApiError: what is not served.
    """
    given = COMPLETION.read(_object(body), "")
    prompt = given["prompt"]
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    limits = {"max_tokens": given.get("max_tokens"), "default_tokens": _COMPLETION_TOKENS}
    return Asked(chat=False, logprobs=given.get("logprobs"), prompts=prompts, **limits, **_common(given))


def _object(body: Any) -> Any:
    if not is_object(body):
        raise bad(None, "the body is not a JSON object")
    return body


def _common(given: dict[str, Any]) -> dict[str, Any]:
    if "stream_options" in given and not given.get("stream"):
        raise bad("stream_options", "needs stream: true")
    if 0 < given.get("temperature", 1.0) < _SMALLEST_TEMPERATURE:
        raise bad(
            "temperature", f"{given['temperature']} is nearly 0: give 0 for the likeliest tokens, or at least {_SMALLEST_TEMPERATURE}"
        )
    stop = given.get("stop", [])
    form = given.get("response_format")
    names = Sampling.__dataclass_fields__
    return {
        "sampling": Sampling(**{name: given[name] for name in names if name in given}),
        "model": given.get("model"),
        "n": given.get("n", 1),
        "stop": (stop,) if isinstance(stop, str) else tuple(stop),
        "stream": given.get("stream", False),
        "include_usage": given.get("stream_options", {}).get("include_usage", False),
        "response_format": None if form is None or form["type"] == "text" else form,
    }
