"""The official client of OpenAI's API works with the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from served import NAME, PROMPTS, alone, listening

from patchkit.bench.config import Config
from patchkit.bench.server import Server

openai = pytest.importorskip("openai", reason="the official client is not installed: pip install openai")

KEY = "sk-test"
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
    "required": ["ok", "tags"],
    "additionalProperties": False,
}
USER: Any = [{"role": "user", "content": PROMPTS[0]}]
TOOLS: Any = [{"type": "function", "function": {"name": "note", "parameters": SCHEMA, "strict": True}}]


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    with listening(api_key=KEY) as (url, _), openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_models(api: Any) -> None:
    assert [model.id for model in api.models.list()] == [NAME] and api.models.retrieve(NAME).owned_by == "patchkit"


def test_a_chat_with_log_probabilities(api: Any) -> None:
    answer = api.chat.completions.create(
        model=NAME, messages=USER, temperature=0, max_completion_tokens=12, logprobs=True, top_logprobs=2, n=2
    )
    expected = alone(f"[user] {PROMPTS[0]}\n[assistant] ", max_new_tokens=12)
    assert [choice.message.content for choice in answer.choices] == [expected] * 2 and answer.usage.completion_tokens == 24
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == expected and all(len(entry.top_logprobs) == 2 for entry in entries)


def test_a_stream_with_usage(api: Any) -> None:
    chunks = list(
        api.chat.completions.create(
            model=NAME, messages=USER, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(f"[user] {PROMPTS[0]}\n[assistant] ", max_new_tokens=12)
    assert chunks[-1].usage.completion_tokens == 12 and chunks[-1].usage.prompt_tokens_details.cached_tokens == 0
    completion = api.completions.create(model=NAME, prompt=PROMPTS[1], temperature=0, max_tokens=6, logprobs=1)
    assert completion.choices[0].text == alone(PROMPTS[1], max_new_tokens=6) and len(completion.choices[0].logprobs.tokens) == 6


def test_json_of_a_schema(api: Any) -> None:
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}
    answer = api.chat.completions.create(model=NAME, messages=USER, temperature=1, seed=2, max_tokens=80, response_format=form)
    value = json.loads(answer.choices[0].message.content)
    assert isinstance(value["ok"], bool) and set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 3


def test_tools(api: Any) -> None:
    answer = api.chat.completions.create(model=NAME, messages=USER, temperature=0, max_tokens=80, tools=TOOLS, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "note" and set(json.loads(call.function.arguments)) == {"ok", "tags"}
    again: Any = [
        *USER,
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "done"},
    ]
    assert api.chat.completions.create(model=NAME, messages=again, temperature=0, max_tokens=4, tools=TOOLS).choices[0].message.content
    with api.chat.completions.stream(
        model=NAME, messages=USER, temperature=0, max_tokens=80, tools=TOOLS, tool_choice="required"
    ) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == call.function.arguments


def test_the_client_of_patchkit_bench() -> None:
    with listening() as (url, _):
        ask = Server(Config(model=NAME, endpoint=f"{url}/v1", new_tokens=9, chat=True))
        first, whole, tokens = ask(PROMPTS[0])
        assert 0 < first < whole and tokens == 9


def test_errors(api: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as raised:
        api.chat.completions.create(model=NAME, messages=USER, temperature=9)
    assert raised.value.param == "temperature" and raised.value.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        api.chat.completions.create(model="gpt", messages=USER)
    with pytest.raises(openai.AuthenticationError):
        api.with_options(api_key="wrong").models.list()
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        api.chat.completions.create(model=NAME, messages=USER, reasoning_effort="low")
