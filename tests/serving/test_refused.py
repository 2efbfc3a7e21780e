"""What the server refuses: each with an error in OpenAI's form, and it goes on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from served import NAME, PROMPTS, client, listening, model_and_tokenizer
from starlette.testclient import TestClient

from patchkit.serving.body import MOST_BYTES
from patchkit.testing import tiny_model

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    with client(max_rows=2, max_queue=2, max_tokens=64, raising=False) as each:
        yield each


def refusal(response: Any) -> dict[str, Any]:
    """The error of a response, which has to have OpenAI's form."""
    body = response.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"] and isinstance(body["error"]["type"], str)
    return body["error"]


CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "empty"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "give one of"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "not a number"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}, "messages[0].content[0].url", "no such field"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "messages[0].tool_calls[0].function.arguments", "not JSON"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].tool_call_id", "missing"),
    ({}, "messages", "missing"),
    ({"messages": HI, "top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "not from 0 to 20"),
    ({"messages": HI, "max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
    ({"messages": HI, "tools": [TOOL, TOOL]}, "tools", "two functions"),
    ({"messages": HI, "tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice", "none of the tools"),
    ({"messages": HI, "tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "not served"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"messages": HI, "tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format", "does not go with tools"),
    ({"messages": HI, "tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({"messages": HI, "functions": []}, "functions", "no such field"),
    ({"messages": HI, "store": True}, "store", "not served"),
    ({"messages": HI, "prompt": "x"}, "prompt", "no such field"),
]  # fmt: skip
COMPLETIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"max_tokens": 0}, "max_tokens", "not from 1"),
    ({"max_tokens": -4}, "max_tokens", "not from 1"),
    ({"max_tokens": 10**9}, "max_tokens", "too many"),
    ({"max_tokens": 10**30}, "max_tokens", "not from 1"),
    ({"max_tokens": 2.5}, "max_tokens", "whole number"),
    ({"max_tokens": True}, "max_tokens", "whole number"),
    ({"temperature": -1}, "temperature", "not from 0 to 2"),
    ({"temperature": 1e-30}, "temperature", "nearly 0"),
    ({"temperature": "hot"}, "temperature", "not text"),
    ({"n": 1000}, "n", "not from 1 to 128"),
    ({"n": 5}, "n", "at most 4"),
    ({"prompt": ["a"] * 100, "n": 2}, "n", "more than 128"),
    ({"top_p": 1.5}, "top_p", "not from 0 to 1"),
    ({"logit_bias": {"4096": 1}}, "logit_bias", "tokens 0 to 4095"),
    ({"logit_bias": {"-1": 1}}, "logit_bias", "token ids"),
    ({"logit_bias": {"7": 101}}, "logit_bias.7", "not from -100"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "at most 4"),
    ({"stop": ""}, "stop", "empty"),
    ({"stop": ["a", ""]}, "stop[1]", "empty"),
    ({"prompt": ""}, "prompt[0]", "no tokens"),
    ({"prompt": []}, "prompt", "empty"),
    ({"prompt": [4096]}, "prompt[0]", "tokens 0 to 4095"),
    ({"prompt": [1, "a"]}, "prompt[0]", "not a number"),
    ({"prompt": "word " * 9000}, "prompt[0]", "leave no room"),
    ({"prompt": None}, "prompt", "missing"),
    ({"seed": 2**63}, "seed", "not from"),
    ({"echo": True}, "echo", "not served"),
    ({"best_of": 3}, "best_of", "not served"),
    ({"suffix": "x"}, "suffix", "no such field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"stream": "yes"}, "stream", "true or false"),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "give one of"),
    ({"response_format": {"type": "regex", "regex": "(a"}}, "response_format", ""),
    ({"response_format": {"type": "regex", "regex": "(?=a)b"}}, "response_format", "look-around"),
    ({"response_format": {"type": "lark", "lark": "x: y"}}, "response_format", ""),
    ({"response_format": {"type": "lark", "lark": "no rules"}}, "response_format", ""),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"typo": "object"}}}}, "response_format", "unknown keywords"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema", "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "words"), CHATS, ids=lambda value: json.dumps(value)[:60])
def test_a_chat_that_is_not_served(served: TestClient, body: dict[str, Any], param: str, words: str) -> None:
    response = served.post("/v1/chat/completions", json=body)
    error = refusal(response)
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error


@pytest.mark.parametrize(("body", "param", "words"), COMPLETIONS, ids=lambda value: json.dumps(value)[:60])
def test_a_completion_that_is_not_served(served: TestClient, body: dict[str, Any], param: str, words: str) -> None:
    response = served.post("/v1/completions", json={"prompt": "x", **body})
    error = refusal(response)
    assert response.status_code == 400 and error["param"] == param and words in error["message"], error


BODIES: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"hello", "not JSON"),
    (b'{"prompt": "x", "temperature": NaN}', "no number of JSON"),
    (b'{"prompt": "x", "temperature": 1e999}', "not from 0 to 2"),
    (b'{"prompt": "x", "temperature": ' + b"9" * 400 + b"}", "not from 0 to 2"),
    (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"prompt": "\\ud800"}', "surrogate"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b"[" * 100_000, "nested too deeply"),
    (b"[]", "not a JSON object"),
    (b"null", "not a JSON object"),
]


@pytest.mark.parametrize(("data", "words"), BODIES, ids=lambda value: str(value)[:40])
def test_a_body_that_is_no_request(served: TestClient, data: bytes, words: str) -> None:
    response = served.post("/v1/completions", content=data, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and words in refusal(response)["message"]


def test_a_body_that_is_too_large(served: TestClient) -> None:
    schema = {"type": "object", "description": "x" * (5 << 20)}
    body = {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    response = served.post("/v1/completions", json=body)
    assert response.status_code == 413 and "4 MiB" in refusal(response)["message"]

    def pieces() -> Iterator[bytes]:
        for _ in range(2 + MOST_BYTES // 65536):
            yield b" " * 65536

    response = served.post("/v1/completions", content=pieces(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413 and refusal(response)["code"] == "request_too_large"


def test_other_refusals(served: TestClient) -> None:
    response = served.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert response.status_code == 415 and "application/json" in refusal(response)["message"]
    response = served.post("/v1/completions", json={"model": "other", "prompt": "x"})
    assert response.status_code == 404 and refusal(response)["code"] == "model_not_found"
    assert served.get("/v1/models/other").status_code == 404 and served.get(f"/v1/models/{NAME}").json()["id"] == NAME
    assert served.get("/v1/nothing").status_code == 404 and refusal(served.get("/v1/nothing"))
    response = served.get("/v1/completions")
    assert response.status_code == 405 and refusal(response) and response.headers["allow"] == "POST"
    assert (
        served.post("/v1/completions", json={"prompt": "(a+)+", "response_format": {"type": "regex", "regex": "(a+)+b"}}).status_code == 200
    )


def test_a_model_that_changes_its_frequencies_has_no_longer_texts() -> None:
    with client(tiny_model("llama_dynamic")) as served:
        body = {"prompt": [5, 6, 7], "temperature": 0}
        assert served.post("/v1/completions", json={**body, "max_tokens": 60}).json()["usage"]["completion_tokens"] <= 60
        error = refusal(served.post("/v1/completions", json={**body, "max_tokens": 61}))
        assert error["code"] == "context_length_exceeded" and "60 are left after 3 of 63" in error["message"]
        assert "tokens 0 to 127" in refusal(served.post("/v1/completions", json={**body, "logit_bias": {"128": 1}}))["message"]


def test_a_grammar_that_is_too_large_for_its_parser(served: TestClient) -> None:
    # In the parser's row after the first letter, each rule has an item.
    rules = "\n".join(f'r{i}: ("a" "{i}")+ | "b" r{i}' for i in range(2100))
    grammar = f'start: "z" x | "y"\nx: {" | ".join(f"r{i}" for i in range(2100))}\n{rules}'
    (token,) = model_and_tokenizer()[1]("y")["input_ids"]
    body = {"prompt": "x", "temperature": 0, "logit_bias": {str(token): -100}, "response_format": {"type": "lark", "lark": grammar}}
    response = served.post("/v1/completions", json=body)
    error = refusal(response)
    assert response.status_code == 400 and error["code"] == "invalid_grammar" and "llguidance stopped" in error["message"]


def test_a_model_without_a_template_has_no_chats() -> None:
    tokenizer = model_and_tokenizer()[1]
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with client() as served:
            error = refusal(served.post("/v1/chat/completions", json={"messages": HI}))
            assert error["code"] == "no_chat_template" and "/v1/completions" in error["message"]
    finally:
        tokenizer.chat_template = template


def test_tools_that_the_template_does_not_show() -> None:
    tokenizer = model_and_tokenizer()[1]
    template = tokenizer.chat_template
    tokenizer.chat_template = "{% for message in messages %}{{ raise_exception('no such role') if message.role == 'tool' }}x{% endfor %}"
    try:
        with client() as served:
            assert "does not show tools" in refusal(served.post("/v1/chat/completions", json={"messages": HI, "tools": [TOOL]}))["message"]
            asked = {"messages": [{"role": "tool", "content": "4", "tool_call_id": "1"}]}
            assert "no such role" in refusal(served.post("/v1/chat/completions", json=asked))["message"]
    finally:
        tokenizer.chat_template = template


def test_the_key_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with client(api_key="secret-ä") as served:
        body = {"prompt": "x", "max_tokens": 2}
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": b"Bearer \xff\xfe"}):
            response = served.post("/v1/completions", json=body, headers=headers)
            assert response.status_code == 401 and refusal(response)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
        assert served.get("/v1/models").status_code == served.get("/v1/patchkit/report").status_code == 401
        assert all(served.get(path).status_code == 200 for path in ("/health", "/ready", "/metrics", "/", "/openapi.json"))
        right = {"Authorization": "Bearer secret-ä".encode()}
        assert served.post("/v1/completions", json=body, headers=right).status_code == 200


def mutated(value: Any, chance: random.Random) -> Any:
    """A JSON value with a random change somewhere in it."""
    odd = [None, True, -1, 0, 10**12, 1e308, "", "x" * 300, "\ufffd\u0000", [], {}, [[]], {"type": "object"}, [1, "a", None]]
    if isinstance(value, dict) and value and chance.random() < 0.8:
        name = chance.choice(list(value))
        change = chance.random()
        if change < 0.15:
            return {key: each for key, each in value.items() if key != name}
        if change < 0.25:
            return {(key + "s" if key == name else key): each for key, each in value.items()}
        return {**value, name: mutated(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], mutated(value[place], chance), *value[place + 1 :], *(value if chance.random() < 0.1 else [])]
    return chance.choice(odd)


def test_broken_bodies_do_no_harm() -> None:
    chance = random.Random(7)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "seed": 3, "stop": ["e", "f"], "presence_penalty": 1, "n": 1}
    chat = {"messages": [{"role": "system", "content": "a"}, *HI], "logprobs": True, "top_logprobs": 2, "max_tokens": 1, **sampling}
    shaped = {"messages": HI, "max_tokens": 2, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    calling = {"messages": HI, "max_tokens": 2, "tools": [{**TOOL}], "tool_choice": {"type": "function", "function": {"name": "f"}}}
    plain = {"prompt": ["a b", "c"], "logit_bias": {"7": 3}, "logprobs": 2, "max_tokens": 1, "stream": True, **sampling}
    statuses: dict[int, int] = {}
    with client(max_tokens=4, raising=False) as served:
        for number in range(400):
            path, seed = chance.choice(
                [
                    ("/v1/chat/completions", chat),
                    ("/v1/chat/completions", shaped),
                    ("/v1/chat/completions", calling),
                    ("/v1/completions", plain),
                ]
            )
            body = mutated(seed, chance)
            data = json.dumps(body).encode()
            if number % 5 == 0:  # broken as bytes, too
                place = chance.randrange(len(data))
                data = data[:place] + bytes([chance.randrange(256)]) * chance.randrange(3) + data[place + chance.randrange(4) :]
            response = served.post(path, content=data, headers={"Content-Type": "application/json"})
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400, 404), (response.status_code, data, response.text)
            if response.status_code != 200:
                refusal(response)
        assert served.get("/health").status_code == 200
        assert served.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 2}).status_code == 200
    assert statuses[400] > 200 and statuses[200] > 20, statuses


def test_a_connection_that_is_no_http() -> None:
    import socket

    with listening() as (url, _):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as bare:
            bare.sendall(b"\x16\x03\x01 hello\r\n\r\n")
            assert b"400" in bare.recv(200)
        with socket.create_connection((host, int(port)), timeout=10) as bare:
            bare.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        import requests

        assert requests.get(f"{url}/health", timeout=10).json() == {"status": "ok"}


@pytest.mark.parametrize("key", ["", " ", "key "])
def test_a_key_that_no_client_could_send_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="api_key"), client(api_key=key):
        pass


def test_a_completion_without_a_number_of_tokens_fits_the_server() -> None:
    with client(max_tokens=8) as served:
        response = served.post("/v1/completions", json={"model": NAME, "prompt": "def", "temperature": 0})
    assert response.status_code == 200 and response.json()["usage"]["completion_tokens"] <= 8
