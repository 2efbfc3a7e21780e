"""Answers of the server: the texts are those of the unpatched model, in OpenAI's form."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from served import NAME, PROMPTS, alone, client, model_and_tokenizer, plain_model
from starlette.testclient import TestClient
from transformers import LogitsProcessor

from patchkit.grammar.matcher import Matcher

PROMPT = PROMPTS[0]


@pytest.fixture(scope="module")
def served() -> Iterator[TestClient]:
    with client() as each:
        yield each


def complete(served: TestClient, **body: Any) -> dict[str, Any]:
    response = served.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0, "max_tokens": 16, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chat(served: TestClient, content: str = PROMPT, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": content}]
    response = served.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 16, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(served: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, the last of which has to be [DONE]."""
    response = served.post(path, json={"temperature": 0, "max_tokens": 16, "stream": True, **body})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream"), response.text
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_a_completion(served: TestClient) -> None:
    answer = complete(served, model=NAME)
    assert answer["object"] == "text_completion" and answer["model"] == NAME and answer["id"].startswith("cmpl-")
    (choice,) = answer["choices"]
    assert choice == {"index": 0, "text": alone(PROMPT, max_new_tokens=16), "logprobs": None, "finish_reason": "length"}
    prompt = len(model_and_tokenizer()[1](PROMPT)["input_ids"])
    assert {name: answer["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")} == {
        "prompt_tokens": prompt,
        "completion_tokens": 16,
        "total_tokens": prompt + 16,
    }
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}


def test_a_chat(served: TestClient) -> None:
    parts = [{"type": "text", "text": PROMPT[:5]}, {"type": "text", "text": PROMPT[5:]}]
    answer = chat(served)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": alone(f"[user] {PROMPT}\n[assistant] ", max_new_tokens=16),
        "refusal": None,
    }
    messages = [{"role": "user", "content": parts}]
    again = served.post("/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_completion_tokens": 16}).json()
    assert again["choices"] == answer["choices"]


def test_a_developer_is_the_system(served: TestClient) -> None:
    texts = []
    for role in ("developer", "system"):
        messages = [{"role": role, "content": "short"}, {"role": "user", "content": "import"}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 8}
        texts.append(served.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"])
    assert texts[0] == texts[1] == alone("[system] short\n[user] import\n[assistant] ", max_new_tokens=8)


def test_a_seed_gives_the_text_of_the_unpatched_model(served: TestClient) -> None:
    answer = complete(served, temperature=0.9, top_p=0.9, seed=11, n=3)
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [alone(PROMPT, seed=11 + i, temperature=0.9, top_p=0.9, max_new_tokens=16) for i in range(3)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 48 and answer["usage"]["prompt_tokens"] == complete(served)["usage"]["prompt_tokens"]
    assert complete(served, temperature=1)["choices"] != complete(served, temperature=1)["choices"]


def test_further_options_are_those_of_transformers(served: TestClient) -> None:
    for options in ({"top_k": 3}, {"min_p": 0.2}, {"repetition_penalty": 1.4}):
        answer = complete(served, temperature=0.8, seed=5, **options)
        tokenizer = model_and_tokenizer()[1]
        inputs = tokenizer(PROMPT, return_tensors="pt")
        torch.manual_seed(5)
        given = {"top_k": 0, **options}
        out = plain_model().generate(**inputs, pad_token_id=0, do_sample=True, temperature=0.8, max_new_tokens=16, **given)
        assert answer["choices"][0]["text"] == tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True), options


def test_several_prompts_and_token_ids(served: TestClient) -> None:
    ids = model_and_tokenizer()[1](PROMPTS[1])["input_ids"]
    answer = complete(served, prompt=[PROMPTS[0], PROMPTS[1]], n=2)
    texts = [choice["text"] for choice in answer["choices"]]
    expected = [alone(prompt, max_new_tokens=16) for prompt in PROMPTS[:2]]
    assert texts == [expected[0], expected[0], expected[1], expected[1]]
    assert complete(served, prompt=ids)["choices"][0]["text"] == complete(served, prompt=[ids])["choices"][0]["text"] == expected[1]


def test_a_stream_adds_up(served: TestClient) -> None:
    whole = chat(served, n=2, seed=3, temperature=1.0)
    parts = events(
        served,
        "/v1/chat/completions",
        messages=[{"role": "user", "content": PROMPT}],
        n=2,
        seed=3,
        temperature=1.0,
        stream_options={"include_usage": True},
    )
    assert {part["object"] for part in parts} == {"chat.completion.chunk"} and len({part["id"] for part in parts}) == 1
    assert parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"] and all(part["usage"] is None for part in parts[:-1])
    for index in range(2):
        own = [part["choices"][0] for part in parts[:-1] if part["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(each["delta"].get("content", "") for each in own)
        assert text == whole["choices"][index]["message"]["content"] and len(own) > 8
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + ["length"]
    parts = events(served, "/v1/completions", prompt=PROMPT)
    assert "".join(part["choices"][0]["text"] for part in parts) == alone(PROMPT, max_new_tokens=16)
    assert "usage" not in parts[0]


def test_a_text_ends_before_a_stop_text(served: TestClient) -> None:
    whole = alone(PROMPT, max_new_tokens=24)
    for stop in (whole[10:13], [whole[20:27], "never"], whole[6]):
        cut = whole[: min(whole.find(each) for each in ([stop] if isinstance(stop, str) else stop) if each in whole)]
        answer = complete(served, stop=stop, max_tokens=24)
        assert answer["choices"][0]["text"] == cut and answer["choices"][0]["finish_reason"] == "stop"
        parts = events(served, "/v1/completions", prompt=PROMPT, stop=stop, max_tokens=24)
        assert "".join(part["choices"][0]["text"] for part in parts) == cut
        assert answer["usage"]["completion_tokens"] < 24
    assert complete(served, stop=["never"])["choices"][0] == complete(served)["choices"][0]


class Penalised(LogitsProcessor):
    """OpenAI's penalties and biases, token by token."""

    def __init__(self, prompt: int, presence: float, frequency: float, bias: dict[int, float]) -> None:
        self.prompt, self.presence, self.frequency, self.bias = prompt, presence, frequency, bias

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores, new = scores.clone(), input_ids[0, self.prompt :].tolist()
        for token in set(new):
            scores[0, token] -= new.count(token) * self.frequency + self.presence
        for token, value in self.bias.items():
            scores[0, token] += value
        return scores


@pytest.mark.parametrize(("presence", "frequency", "bias"), [(1.5, 0.0, {}), (0.0, 1.2, {}), (0.7, -0.4, {" the": 3.0, "#": -100.0})])
def test_penalties_and_biases_are_openais(served: TestClient, presence: float, frequency: float, bias: dict[str, float]) -> None:
    ids = {model_and_tokenizer()[1](token)["input_ids"][0]: value for token, value in bias.items()}
    body = {"presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": {str(token): value for token, value in ids.items()}}
    text = complete(served, max_tokens=20, **body)["choices"][0]["text"]
    prompt = len(model_and_tokenizer()[1](PROMPT)["input_ids"])
    expected = alone(PROMPT, max_new_tokens=20, logits_processor=[Penalised(prompt, presence, frequency, ids)])
    assert text == expected != alone(PROMPT, max_new_tokens=20)


def test_log_probabilities_are_the_models(served: TestClient) -> None:
    model, tokenizer = plain_model(), model_and_tokenizer()[1]
    inputs = tokenizer(PROMPT, return_tensors="pt")
    out = model.generate(**inputs, pad_token_id=0, do_sample=False, max_new_tokens=8, output_logits=True, return_dict_in_generate=True)
    chances = [logits[0].log_softmax(-1) for logits in out.logits]
    new = out.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    found = complete(served, max_tokens=8, logprobs=3)["choices"][0]["logprobs"]
    assert found["tokens"] == [tokenizer.decode([token]) for token in new] and "".join(found["tokens"]) == alone(PROMPT, max_new_tokens=8)
    assert found["token_logprobs"] == pytest.approx([float(each[token]) for each, token in zip(chances, new, strict=True)], abs=1e-4)
    assert [sorted(each.values(), reverse=True) for each in found["top_logprobs"]] == [
        pytest.approx(each.topk(3).values.tolist(), abs=1e-4) for each in chances
    ]
    assert found["text_offset"] == [len("".join(found["tokens"][:i])) for i in range(8)]
    body = {"temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2, "stream": True}
    parts = events(served, "/v1/chat/completions", messages=[{"role": "user", "content": PROMPT}], **body)
    streamed = [entry for part in parts for entry in (part["choices"][0]["logprobs"] or {"content": []})["content"]]
    whole = chat(served, max_tokens=8, logprobs=True, top_logprobs=2)["choices"][0]
    assert streamed == whole["logprobs"]["content"] and "".join(entry["token"] for entry in streamed) == whole["message"]["content"]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] and entry["logprob"] <= 0 for entry in streamed)
    assert all(math.isclose(entry["top_logprobs"][0]["logprob"], entry["logprob"]) for entry in streamed)


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_text_has_the_form_that_was_asked_for(served: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "user", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        answer = chat(served, response_format=form, max_tokens=80, temperature=1.0, seed=seed)["choices"][0]
        value = json.loads(answer["message"]["content"])
        assert list(value) == ["name", "age"] and 0 <= value["age"] <= 150 and answer["finish_reason"] == "stop"
    answer = complete(served, response_format={"type": "regex", "regex": "[a-f]{3}-[0-9]{2}"})["choices"][0]
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", answer["text"]) and answer["finish_reason"] == "stop"
    answer = complete(served, response_format={"type": "lark", "lark": 'start: "a" ("b" | "c")'})["choices"][0]
    assert answer["text"] in ("ab", "ac")
    text = chat(served, response_format={"type": "json_object"}, max_tokens=30)["choices"][0]["message"]["content"]
    assert text.startswith("{")
    assert chat(served, response_format={"type": "text"})["choices"] == chat(served)["choices"]


def test_a_grammar_is_compiled_once(served: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []

    class Counted(Matcher):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self._source is self)

    monkeypatch.setattr("patchkit.grammar.processor.Matcher", Counted)
    monkeypatch.setattr("patchkit.grammar.matcher.Matcher", Counted)
    form = {"type": "json_schema", "json_schema": {"name": "user", "schema": SCHEMA}}
    choices = chat(served, response_format=form, max_tokens=80, temperature=1.0, seed=3, n=3)["choices"]
    assert [list(json.loads(choice["message"]["content"])) for choice in choices] == [["name", "age"]] * 3
    assert sorted(made) == [False] * 3 + [True]
