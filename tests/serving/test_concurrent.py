"""Many requests at once: each has the text that it has alone; requests that end, leave or fail do not change the others."""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
import torch
from served import PROMPTS, Gate, alone, client, figures, listening, model_and_tokenizer, plain_model, wait_for

from patchkit import patch_model, report, unpatch_model
from patchkit.errors import PatchConflict
from patchkit.serving import app
from patchkit.testing import assert_restored, snapshot


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Any]]:
    with listening(max_rows=4, max_queue=40) as each:
        yield each


def post(url: str, **body: Any) -> requests.Response:
    return requests.post(f"{url}/v1/completions", json={"temperature": 0, **body}, timeout=60)


def lines(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


def test_twenty_requests_have_the_texts_that_they_have_alone(served: tuple[str, Any]) -> None:
    url, application = served
    chance = random.Random(3)
    wanted = []
    for number in range(20):
        body: dict[str, Any] = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 3 + number % 7, "stream": number % 3 == 0}
        if number % 2:
            body |= {"temperature": 0.8, "seed": number}
        wanted.append((body, chance.random() * 0.3))

    def ask(body: dict[str, Any], delay: float) -> str:
        time.sleep(delay)
        response = post(url, **body)
        assert response.status_code == 200
        if body["stream"]:
            return "".join(part["choices"][0]["text"] for part in lines(response))
        return response.json()["choices"][0]["text"]

    with ThreadPoolExecutor(20) as pool:
        texts = list(pool.map(lambda pair: ask(*pair), wanted))
    for text, (body, _) in zip(texts, wanted, strict=True):
        sampling = {"seed": body["seed"], "temperature": 0.8} if "seed" in body else {}
        assert text == alone(body["prompt"], max_new_tokens=body["max_tokens"], **sampling)
    assert application.state.engine.idle


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(stream: bool, served: tuple[str, Any]) -> None:
    url, application = served
    engine = application.state.engine
    body = {"prompt": PROMPTS[2], "max_tokens": 400, "stream": stream, "temperature": 0, "logit_bias": {"0": -100}}
    before = figures(requests.get(f"{url}/metrics", timeout=10).text).get("patchkit_requests_total{finish=cancelled}", 0)
    if stream:
        response = requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=30)
        for _, _part in zip(range(3), lines(response), strict=False):
            pass
        assert engine.running == 1
        response.close()
    else:
        with pytest.raises(requests.exceptions.ReadTimeout):
            requests.post(f"{url}/v1/completions", json=body, timeout=(5, 0.3))
    wait_for(lambda: engine.idle, 10)
    wait_for(lambda: engine.running == 0, 10)
    found = figures(requests.get(f"{url}/metrics", timeout=10).text)
    assert found["patchkit_requests_total{finish=cancelled}"] == before + 1 and found["patchkit_kv_bytes"] == 0
    assert post(url, prompt=PROMPTS[0], max_tokens=8).json()["choices"][0]["text"] == alone(PROMPTS[0], max_new_tokens=8)


def test_many_clients_that_leave_leave_nothing(served: tuple[str, Any]) -> None:
    url, application = served
    engine = application.state.engine
    before = figures(requests.get(f"{url}/metrics", timeout=10).text).get("patchkit_requests_total{finish=cancelled}", 0)
    body = {"max_tokens": 400, "stream": True, "logit_bias": {"0": -100}, "n": 2}

    def ask(number: int) -> None:
        whole = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **body}
        with requests.post(f"{url}/v1/completions", json=whole, stream=True, timeout=30) as response:
            next(lines(response))

    with ThreadPoolExecutor(10) as pool:
        list(pool.map(ask, range(20)))
    wait_for(lambda: engine.idle, 20)
    wait_for(lambda: figures(requests.get(f"{url}/metrics", timeout=10).text)["patchkit_kv_bytes"] == 0, 10)
    found = figures(requests.get(f"{url}/metrics", timeout=10).text)
    assert found["patchkit_requests_total{finish=cancelled}"] == before + 40
    assert found["patchkit_running"] == found["patchkit_waiting"] == 0


def test_a_queue_that_is_full() -> None:
    model, _ = model_and_tokenizer()
    with listening(model, max_rows=1, max_queue=1) as (url, application):
        engine = application.state.engine
        with ThreadPoolExecutor(2) as pool:
            gate = Gate(model, lambda ids: (engine.running, engine.waiting) == (1, 1))
            long = [pool.submit(post, url, prompt=PROMPTS[0], max_tokens=20) for _ in range(2)]
            assert gate.reached.wait(30)
            refused = post(url, prompt=PROMPTS[1], max_tokens=2)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            gate.open()
            assert all(each.result().status_code == 200 for each in long)
        assert post(url, prompt=PROMPTS[1], max_tokens=2).status_code == 200
        assert figures(requests.get(f"{url}/metrics", timeout=10).text)["patchkit_refused_total{status=429}"] == 1


class Failing:
    """A hook that lets forwards of a model fail."""

    def __init__(self, when: Any, error: BaseException) -> None:
        self.when, self.error, self.times = when, error, 0

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.when(kwargs["input_ids"]):
            self.times += 1
            raise self.error


def test_a_request_that_fails_alone_gets_500_and_the_next_is_served() -> None:
    model, _ = model_and_tokenizer()
    with client(model, raising=False) as served:
        failing = Failing(lambda ids: True, RuntimeError("out of luck"))
        hook = model.register_forward_pre_hook(failing, with_kwargs=True)
        for body in ({}, {"stream": True}):
            response = served.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, **body})
            assert response.status_code == 500 and response.json()["error"]["code"] == "generation_failed"
            assert "luck" not in response.text
        hook.remove()
        assert served.get("/health").status_code == 200
        answer = served.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == alone(PROMPTS[0], max_new_tokens=8)
        assert figures(served.get("/metrics").text)["patchkit_requests_total{finish=error}"] == 2


def test_an_error_in_a_shared_round_ends_only_the_request_that_causes_it() -> None:
    """One row writes a token by which every forward fails, those that it shares too."""
    model, _ = model_and_tokenizer()
    bad, widths, live = 4000, list[int](), list[int]()

    def fails(ids: torch.Tensor) -> bool:
        widths.append(len(ids))
        live.append(sum(scheduler.running for scheduler in served.app.state.engine._schedulers))
        return bool((ids == bad).any())

    with client(model, raising=False, max_rows=4) as served, ThreadPoolExecutor(8) as pool:
        failing = Failing(fails, RuntimeError("bad row"))
        hook = model.register_forward_pre_hook(failing, with_kwargs=True)

        def ask(prompt: str, **more: Any) -> Any:
            return served.post("/v1/completions", json={"prompt": prompt, "max_tokens": 12, "temperature": 0, **more})

        gate = Gate(model, lambda ids: len(ids) == 3)

        sampled = {"temperature": 0.9, "seed": 4, "stop": ["never"]}
        innocent = [pool.submit(ask, PROMPTS[0]), pool.submit(ask, PROMPTS[1]), pool.submit(ask, PROMPTS[3], **sampled)]
        assert gate.reached.wait(30)
        guilty = pool.submit(ask, PROMPTS[4], logit_bias={str(bad): 100})
        # These come in when the others have left the batch, and those are still generated again.
        innocent += [pool.submit(ask, PROMPTS[0], max_tokens=8) for _ in range(4)]
        wait_for(lambda: len(served.app.state.engine._commands) == 5)
        gate.open()
        found = [each.result() for each in innocent]
        assert guilty.result().status_code == 500 and guilty.result().json()["error"]["code"] == "generation_failed"
        hook.remove()
    assert failing.times == 2 and 4 in widths  # in the round that was shared, and alone
    assert max(live) == 4
    expected = [alone(prompt, max_new_tokens=12) for prompt in PROMPTS[:2]] + [
        alone(PROMPTS[3], seed=4, temperature=0.9, max_new_tokens=12),
        *[alone(PROMPTS[0], max_new_tokens=8)] * 4,
    ]
    assert [response.json()["choices"][0]["text"] for response in found] == expected


def test_a_scheduler_that_fails_is_replaced() -> None:
    model, _ = model_and_tokenizer()
    with client(model, raising=False) as served:
        engine = served.app.state.engine

        def broken() -> bool:
            raise RuntimeError("a fault of the scheduler")

        engine._schedulers[0].step = broken
        response = served.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 4})
        assert response.status_code == 500 and response.json()["error"]["code"] == "generation_failed"
        answer = served.post("/v1/completions", json={"prompt": PROMPTS[0], "max_tokens": 8, "temperature": 0}).json()
        assert answer["choices"][0]["text"] == alone(PROMPTS[0], max_new_tokens=8) and engine.idle


def test_a_dead_engine_is_not_healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = model_and_tokenizer()
    with client(model, raising=False) as served:
        hook = model.register_forward_pre_hook(Failing(lambda ids: True, SystemExit(3)), with_kwargs=True)
        assert served.get("/health").status_code == served.get("/ready").status_code == 200
        assert served.post("/v1/completions", json={"prompt": "x"}).status_code == 500
        hook.remove()
        wait_for(lambda: not served.app.state.engine.alive)
        assert served.get("/health").status_code == served.get("/ready").status_code == 503
        response = served.post("/v1/completions", json={"prompt": "x"})
        assert response.status_code == 503 and response.json()["error"]["code"] == "engine_dead"


def test_figures_add_up() -> None:
    with client() as served:
        seen = {"prompt": 0, "new": 0}
        before: dict[str, float] = {}
        for number in range(4):
            body = {"prompt": PROMPTS[number], "max_tokens": 6, "temperature": 0, "n": 1 + number % 2}
            usage = served.post("/v1/completions", json=body).json()["usage"]
            seen["prompt"] += usage["prompt_tokens"] * body["n"]
            seen["new"] += usage["completion_tokens"]
            found = figures(served.get("/metrics").text)
            totals = {name: value for name, value in found.items() if "_total" in name or "_count" in name or "_bucket" in name}
            assert all(totals[name] >= value for name, value in before.items())
            before = totals
        assert found["patchkit_prompt_tokens_total"] == seen["prompt"] and found["patchkit_generated_tokens_total"] == seen["new"] == 36
        assert found["patchkit_requests_total{finish=length}"] == found["patchkit_e2e_seconds_count"] == 6
        assert found["patchkit_time_to_first_token_seconds_count"] == 6
        assert found["patchkit_inter_token_seconds_count"] == 36 - 6
        assert found["patchkit_running"] == found["patchkit_waiting"] == found["patchkit_kv_bytes"] == 0
        assert found["patchkit_patch_info{spec=none}"] == 1


def test_drafts_are_counted() -> None:
    model, _ = model_and_tokenizer()
    patch_model(model, "speculative(draft=prompt_lookup(min_ngram=1), k=3)", verbose=False)
    with client(model) as served:
        body = {"prompt": PROMPTS[0] * 3, "max_tokens": 40, "temperature": 0}
        answer = served.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == alone(PROMPTS[0] * 3, max_new_tokens=40)
        found, details = figures(served.get("/metrics").text), answer["usage"]["completion_tokens_details"]
        assert 0 < found["patchkit_accepted_tokens_total"] == details["accepted_prediction_tokens"]
        assert found["patchkit_draft_tokens_total"] == sum(details.values())
        (patch,) = served.get("/v1/patchkit/report").json()["patches"]
        assert patch["name"] == "speculative" and patch["hits"]["accepted"] == details["accepted_prediction_tokens"]
    assert report(model).patches[0].name == "speculative"  # the server has not touched it
    unpatch_model(model)


@pytest.mark.parametrize("spec", [None, "streaming(sinks=1, window=6)", "linear(window=6)"])
def test_a_model_is_after_the_server_what_it_was(spec: str | None) -> None:
    model, tokenizer = model_and_tokenizer()
    before = snapshot(model)
    if spec is not None:
        patch_model(model, spec, verbose=False)
    text = alone(PROMPTS[0], max_new_tokens=16)
    with client(model, max_rows=2) as served:
        names = [patch["name"] for patch in served.get("/v1/patchkit/report").json()["patches"]]
        assert names == (["speculative"] if spec is None else [spec.split("(")[0], "speculative"])
        body = {"prompt": PROMPTS[0], "max_tokens": 16, "temperature": 0, "n": 3}
        choices = served.post("/v1/completions", json=body).json()["choices"]
        if spec is None:
            assert {choice["text"] for choice in choices} == {text}
        with pytest.raises(PatchConflict, match="another server runs this"), client(model):
            pass
    if spec is not None:
        inputs = tokenizer(PROMPTS[0], return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, max_new_tokens=16, pad_token_id=0)
        expected = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert {choice["text"] for choice in choices} == {expected} and expected != text
        assert [patch.name for patch in report(model).patches] == [spec.split("(")[0]]
        unpatch_model(model)
    assert_restored(before, model)


def test_a_server_that_drains_finishes_and_takes_no_more() -> None:
    model, _ = model_and_tokenizer()
    with listening(model, max_rows=1) as (url, application):
        engine, server = application.state.engine, application.state.server
        with ThreadPoolExecutor(2) as pool:
            gate = Gate(model, lambda ids: (engine.running, engine.waiting) == (1, 1))
            running = [pool.submit(post, url, prompt=PROMPTS[0], max_tokens=16) for _ in range(2)]
            assert gate.reached.wait(30)
            server.handle_exit(signal.SIGTERM, None)
            refused = post(url, prompt=PROMPTS[1], max_tokens=2)
            assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down" and "Retry-After" in refused.headers
            assert requests.get(f"{url}/ready", timeout=10).status_code == 503
            assert requests.get(f"{url}/health", timeout=10).status_code == 200
            assert not server.should_exit
            gate.open()
            for each in running:
                assert each.result().json()["choices"][0]["text"] == alone(PROMPTS[0], max_new_tokens=16)
        wait_for(lambda: not server.started or server.should_exit)
        assert engine.idle


def test_numbers_out_of_range() -> None:
    model, tokenizer = model_and_tokenizer()
    for name in ("max_rows", "prefill", "max_tokens"):
        with pytest.raises(ValueError, match=f"{name}=0: give at least 1"):
            app(model, tokenizer, **{name: 0})
    assert threading.active_count() < 50 and plain_model() is not model
