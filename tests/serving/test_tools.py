"""Functions that a model calls: demanded ones by a grammar, free ones read from the text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from served import alone, client
from starlette.testclient import TestClient

from patchkit.serving.api_error import ApiError
from patchkit.serving.messages import for_template
from patchkit.serving.tools import tool_use

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather at a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Rome", "Oslo"]}, "days": {"$ref": "#/$defs/days"}},
            "required": ["place", "days"],
            "additionalProperties": False,
            "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    with client() as each:
        yield each


def body(**more: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": "Will it rain?"}],
        "tools": [WEATHER, TIME],
        "max_tokens": 80,
        "temperature": 0,
        **more,
    }


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    found = choice["message"]["tool_calls"]
    assert len({call["id"] for call in found}) == len(found) and all(call["type"] == "function" for call in found)
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in found]


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_demanded_call_has_the_form_of_its_schema(served: TestClient, choice: Any) -> None:
    names = set()
    for seed in range(4):
        response = served.post("/v1/chat/completions", json=body(tool_choice=choice, temperature=1.5, seed=seed))
        assert response.status_code == 200, response.text
        ((name, arguments),) = calls(response.json()["choices"][0])
        names.add(name)
        if name == "weather":
            assert set(arguments) == {"place", "days"} and arguments["place"] in ("Rome", "Oslo") and 1 <= arguments["days"] <= 9
        else:
            assert arguments == {}
    assert names <= {"weather", "time"} and (choice == "required" or names == {"weather"})


def test_a_demanded_call_as_a_stream(served: TestClient) -> None:
    whole = served.post("/v1/chat/completions", json=body(tool_choice=NAMED, n=2)).json()
    response = served.post("/v1/chat/completions", json=body(tool_choice=NAMED, n=2, stream=True))
    parts = [json.loads(line[6:])["choices"][0] for line in response.text.split("\n\n") if line.startswith("data: {")]
    for index in range(2):
        own = [part for part in parts if part["index"] == index]
        (call,) = [call for part in own for call in part["delta"].get("tool_calls", [])]
        assert call["index"] == 0 and call["function"] == whole["choices"][index]["message"]["tool_calls"][0]["function"]
        assert own[-1]["finish_reason"] == "tool_calls"


def test_a_call_that_is_cut_off(served: TestClient) -> None:
    choice = served.post("/v1/chat/completions", json=body(tool_choice=NAMED, max_tokens=3)).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["arguments"].startswith("{")
    choice = served.post("/v1/chat/completions", json=body(tool_choice="required", max_tokens=3)).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{") and "tool_calls" not in choice["message"]


def test_tools_that_the_model_may_use_or_not(served: TestClient) -> None:
    prompt = "[user] Will it rain?\n[tool] weather\n[tool] time\n[assistant] "
    for stream in (False, True):
        response = served.post("/v1/chat/completions", json=body(max_tokens=8, stream=stream))
        if stream:
            parts = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
            text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
        else:
            text = response.json()["choices"][0]["message"]["content"]
        assert text == alone(prompt, max_new_tokens=8)
    text = served.post("/v1/chat/completions", json=body(max_tokens=8, tool_choice="none")).json()["choices"][0]["message"]["content"]
    assert text == alone("[user] Will it rain?\n[assistant] ", max_new_tokens=8)


def test_an_answer_of_a_tool_goes_into_the_prompt(served: TestClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
    messages = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
    ]
    assert for_template(messages)[1]["tool_calls"][0]["function"]["arguments"] == {"zone": "UTC"}
    answer = served.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 6, "temperature": 0}).json()
    expected = alone("[user] When?\n[assistant] \n[tool] noon\n[assistant] ", max_new_tokens=6)
    assert answer["choices"][0]["message"]["content"] == expected


def read(text: str, tokenizer: Any = None, several: bool = True) -> tuple[str | None, list[tuple[str, str]]]:
    use = tool_use([WEATHER, TIME], "auto", several)
    assert use is not None
    said, found = use.message(text, [1], [2], tokenizer or SimpleNamespace())
    return said, [(call["function"]["name"], call["function"]["arguments"]) for call in found]


def test_calls_are_read_from_marks() -> None:
    one = '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
    assert read(f"Let me see.\n{one}") == ("Let me see.", [("time", "{}")])
    two = one + '<tool_call>{"name": "weather", "arguments": {"place": "Rome"}}</tool_call>'
    assert read(two) == (None, [("time", "{}"), ("weather", '{"place": "Rome"}')])
    assert read(two, several=False) == (None, [("time", "{}")])
    assert read("<tool_call>nonsense</tool_call>") == ("<tool_call>nonsense</tool_call>", [])
    assert read('<tool_call>[{"name": "time"}]') == (None, [("time", "{}")])  # cut off before its end


class Templated:
    """A tokenizer with a response template."""

    response_template = response_schema = "a template"

    def __init__(self, result: Any) -> None:
        self.result = result

    def parse_response(self, response: Any, schema: Any = None, *, prefix: Any = None, tools: Any = None) -> Any:
        assert response == [2] and prefix == [1] and tools == [WEATHER, TIME]
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def test_calls_are_read_by_the_tokenizers_template() -> None:
    parsed = {"content": "Now.", "tool_calls": [{"type": "function", "function": {"name": "time", "arguments": {"a": 1}}}]}
    assert read("raw", Templated(parsed)) == ("Now.", [("time", '{"a": 1}')])
    assert read("raw", Templated({"content": "No."})) == ("No.", [])
    assert read("raw", Templated(ValueError("unexpected"))) == ("raw", [])


def test_definitions_of_several_functions() -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": {"$defs": {"days": {"type": "string"}}}}}
    use = tool_use([WEATHER, other], "required", True)
    assert use is not None
    with pytest.raises(ApiError, match="'days' under"):
        use.schema()
    use = tool_use([WEATHER, TIME], "required", True)
    assert use is not None and use.schema()["$defs"] == WEATHER["function"]["parameters"]["$defs"]  # type: ignore[index]


class Told:
    """A tokenizer with a response template that gives what it is told."""

    response_template = "of some model"

    def __init__(self, parsed: Any) -> None:
        self.parsed = parsed

    def parse_response(self, tokens: list[int]) -> Any:
        return self.parsed


def test_what_a_response_template_gives() -> None:
    use = tool_use([WEATHER, TIME], "auto", several=True)
    assert use is not None
    call = {"type": "function", "function": {"name": "time", "arguments": '{"a": 1}'}}
    said, calls = use.message("text", [], [1], Told({"content": "", "tool_calls": [call]}))
    assert said is None and calls[0]["function"] == {"name": "time", "arguments": '{"a": 1}'}
    # A form that is not known is sent as text, and no text is lost.
    assert use.message("text", [], [1], Told({"tool_calls": [{"name": "time", "arguments": {}}]})) == ("text", [])
    # Tokens have the stop text too, so nothing is read from them.
    assert use.message("te", [], [1], Told({"content": "text"}), stopped=True) == ("te", [])


def test_a_call_that_a_stop_text_cuts_is_text() -> None:
    use = tool_use([WEATHER], NAMED, several=False)
    assert use is not None
    assert use.message('{"pl', [], [], object(), stopped=True) == ('{"pl', [])
    assert use.message('{"place": "Rome"}', [], [], object(), stopped=True)[1]


def test_a_block_that_is_no_call_stays_in_the_text() -> None:
    use = tool_use([WEATHER, TIME], "auto", several=True)
    assert use is not None
    good, bad = '<tool_call>{"name": "time", "arguments": {}}</tool_call>', "<tool_call>what?</tool_call>"
    said, calls = use.message(f"hi {good} and {bad}", [], [], object())
    assert said == f"hi  and {bad}" and [each["function"]["name"] for each in calls] == ["time"]
