"""Clients that leave at any moment: before their first token, while their prompt is fed, in the queue. Nothing of them is left."""

from __future__ import annotations

import gc
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import torch
from served import PROMPTS, figures, listening, wait_for

from patchkit.serving.choice import Choice, End
from patchkit.serving.engine import Engine
from patchkit.serving.metrics import Metrics
from patchkit.serving.shown import Detokenizer, ShownText
from patchkit.speculation.ragged_cache import RaggedCache
from patchkit.testing import tiny_model


class Numbers:
    """A tokenizer whose tokens are their numbers."""

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(f"{token} " for token in tokens)


class Box:
    """A mailbox that nobody waits at, its queue, and its event loop."""

    def __init__(self) -> None:
        self.ends: list[End] = []
        self.loop = self.queue = self

    def call_soon_threadsafe(self, call: Any, *args: Any) -> None:
        call(*args)

    def put_nowait(self, event: Any) -> None:
        self.ends += [event] if isinstance(event, End) else []


def choice(ids: torch.Tensor, new: int) -> Choice:
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    box: Any = Box()
    return Choice(0, 0, ids, 1, options, (), None, frozenset(), Detokenizer(Numbers()), ShownText(()), None, box)


def finish_of(each: Choice) -> str | None:
    """Why a choice has ended; None while it has not. A choice ends once."""
    ends = each.mailbox.ends  # type: ignore[attr-defined]
    assert len(ends) <= 1
    return ends[0].finish if ends else None


class Running:
    """An engine on a tiny model, with a function that its thread calls before every forward, given the token ids [R, T]."""

    def __init__(self, **options: int) -> None:
        self.model = tiny_model("llama")
        self.metrics = Metrics("none")
        self.engine = Engine(self.model, self.metrics, **options)
        self.before: Any = lambda ids: None

    def __enter__(self) -> Running:
        self.engine.start()
        self.hook = self.model.register_forward_pre_hook(lambda module, args, kwargs: self.before(kwargs["input_ids"]), with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.hook.remove()
        self.engine.close()

    @property
    def counts(self) -> tuple[int, int]:
        """Choices with a slot, and without, at this moment."""
        schedulers = self.engine._schedulers
        return sum(each.running for each in schedulers), sum(each.waiting for each in schedulers)

    def nothing_is_left(self) -> bool:
        found = figures(self.metrics.text().decode())
        names = ("patchkit_running", "patchkit_waiting", "patchkit_kv_bytes")
        gc.collect()
        caches = [each for each in gc.get_objects() if type(each) is RaggedCache]
        return self.counts == (0, 0) and [found[name] for name in names] == [0, 0, 0] and not caches


def prompt(length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(seed))


def test_one_that_leaves_while_its_prompt_is_fed_is_not_fed_any_more() -> None:
    running, leaving, coming = choice(prompt(5, 0), 40), choice(prompt(90, 1), 5), choice(prompt(6, 2), 5)
    pieces: list[list[int]] = []
    known = leaving.ids.tolist()

    def before(ids: torch.Tensor) -> None:
        row = ids[0].tolist()
        if len(ids) == 1 and len(row) > 1 and row == known[sum(map(len, pieces)) :][: len(row)]:
            pieces.append(row)
            if len(pieces) == 3:
                served.engine.cancel([leaving])

    with Running(max_rows=2, prefill=4) as served:
        served.before = before
        served.engine.submit([running])
        served.engine.submit([leaving])
        served.engine.submit([coming])
        wait_for(lambda: served.engine.idle)
        assert list(map(finish_of, (running, leaving, coming))) == ["length", "cancelled", "length"]
        assert len(pieces) == 3 and leaving.row is not None and leaving.row.new == []
        assert served.nothing_is_left()


def test_one_that_leaves_the_queue_leaves_it_before_the_next_round() -> None:
    running, leaving = choice(prompt(5, 0), 30), choice(prompt(9, 1), 5)
    seen: list[tuple[int, int]] = []

    def before(ids: torch.Tensor) -> None:
        seen.append(served.counts)
        if len(seen) == 4:
            served.engine.cancel([leaving])

    with Running(max_rows=1, max_queue=1) as served:
        served.engine.submit([running, leaving])
        served.before = before
        wait_for(lambda: served.engine.idle)
        assert seen[3:6] == [(1, 1), (1, 0), (1, 0)]
        assert list(map(finish_of, (running, leaving))) == ["length", "cancelled"]


def test_two_hundred_leave_at_any_moment() -> None:
    chance, left, others = random.Random(5), list[Choice](), list[Choice]()
    moments = {"waiting": 0, "fed": 0, "generated": 0}

    def before(ids: torch.Tensor) -> None:
        live = [each for each in served.engine._live if each not in left]
        if chance.random() < 0.6 and live and len(left) < 200:
            gone = chance.choice(live)
            left.append(gone)
            row = gone.row
            assert row is not None
            waiting = any(row is each.row for scheduler in served.engine._schedulers for each in scheduler._waiting)
            moments["waiting" if waiting else "generated" if row.new else "fed"] += 1
            served.engine.cancel([gone])
        if len(left) < 200 and len(served.engine._live) < 7:
            new = choice(prompt(chance.randint(3, 40), len(others)), chance.randint(1, 30))
            others.append(new)
            served.engine.submit([new])

    with Running(max_rows=3, max_queue=20, prefill=8) as served:
        others.append(choice(prompt(4, 0), 8))
        served.before = before
        served.engine.submit(others)
        wait_for(lambda: len(left) == 200 and served.engine.idle)
        finishes = [finish_of(each) for each in others]
        assert set(finishes) == {"cancelled", "length"} and min(moments.values()) > 20, moments
        found = figures(served.metrics.text().decode())
        assert found["patchkit_requests_total{finish=cancelled}"] == finishes.count("cancelled") > 150
        assert served.nothing_is_left()
    kept = [each for each, finish in zip(others, finishes, strict=True) if finish == "length"]
    for each in kept:
        assert each.row is not None
        expected = served.model.generate(each.ids[None], attention_mask=torch.ones_like(each.ids[None]), **each.options)
        assert each.tokens == expected[0, len(each.ids) :].tolist()


@pytest.fixture(scope="module")
def full() -> Iterator[tuple[str, Any]]:
    """A server of one row, which is taken."""
    with listening(max_rows=1, max_queue=4) as (url, application):
        body = {"prompt": PROMPTS[0], "max_tokens": 480, "stream": True, "temperature": 0, "logit_bias": {"0": -100}}
        with requests.post(f"{url}/v1/completions", json=body, stream=True, timeout=30):
            yield url, application


@pytest.mark.parametrize("stream", ["true", "false"])
def test_a_connection_that_closes_in_the_queue_gives_its_place_back(full: tuple[str, Any], stream: str) -> None:
    url, application = full
    engine = application.state.engine
    host, port = url.removeprefix("http://").split(":")
    body = f'{{"prompt": "x", "stream": {stream}}}'
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=10) as bare:
        bare.sendall((head + body).encode())
        wait_for(lambda: engine.waiting == 1)
    wait_for(lambda: engine.waiting == 0)
    assert engine.running == 1 and not engine.idle
