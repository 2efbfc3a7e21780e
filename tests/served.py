"""What tests of the server share: the bundled model as a server in this process, and the texts of the unpatched model."""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import BEGINNINGS

from patchkit.models import load_model
from patchkit.views import twin

for _module in ("starlette", "uvicorn", "prometheus_client", "httpx2", "llguidance"):
    pytest.importorskip(_module, reason="a server needs patchkit[serve], and its tests httpx2 and llguidance")

NAME = "stdlib"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] not in ('system', 'user', 'assistant', 'tool') %}"
    "{{ raise_exception('no such role') }}{% endif %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if tools %}{% for tool in tools %}[tool] {{ tool['function']['name'] }}\n{% endfor %}{% endif %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PROMPTS = BEGINNINGS


@functools.cache
def _loaded() -> tuple[Any, Any]:
    model, tokenizer = load_model("stdlib-7m")
    tokenizer.chat_template = TEMPLATE
    return model, tokenizer


def plain_model() -> Any:
    """The bundled model, which nobody serves or patches."""
    return _loaded()[0]


def model_and_tokenizer() -> tuple[Any, Any]:
    """A new view of the bundled model, to be served, and its tokenizer with a chat template."""
    model, tokenizer = _loaded()
    return twin(model), tokenizer


def alone(prompt: str, seed: int | None = None, logits_processor: Any = None, **options: Any) -> str:
    """Text of the unpatched model by transformers' own generate."""
    return _written(prompt, seed, None if logits_processor is None else tuple(logits_processor), **options)


@functools.cache
def _written(prompt: str, seed: int | None, logits_processor: Any, **options: Any) -> str:
    if logits_processor is not None:
        options["logits_processor"] = list(logits_processor)
    tokenizer = model_and_tokenizer()[1]
    inputs = tokenizer(prompt, return_tensors="pt")
    if seed is not None:
        torch.manual_seed(seed)
    out = plain_model().generate(
        **inputs, pad_token_id=0, do_sample=seed is not None, **({"top_k": 0} if seed is not None else {}), **options
    )
    return str(tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@contextlib.contextmanager
def client(model: Any = None, raising: bool = True, **options: Any) -> Iterator[Any]:
    """A client of a server in this process. ``client.app.state.engine`` is its engine."""
    from starlette.testclient import TestClient

    from patchkit.serving import app

    loaded, tokenizer = model_and_tokenizer()
    with TestClient(app(model or loaded, tokenizer, name=NAME, **options), raise_server_exceptions=raising) as each:
        yield each


@contextlib.contextmanager
def listening(model: Any = None, **options: Any) -> Iterator[tuple[str, Any]]:
    """Address of a server on a port of this machine, and its application. ``application.state.server`` is what a signal is told."""
    import uvicorn

    from patchkit.serving import app
    from patchkit.serving.server import DrainingServer

    loaded, tokenizer = model_and_tokenizer()
    application = app(model or loaded, tokenizer, name=NAME, **options)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=10)
        server = application.state.server = DrainingServer(config, application.state.engine, 30)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        wait_for(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}", application
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


class Gate:
    """Lets the forwards of a model pass until one for which ``stops`` is true, given the token ids, and then none until it opens."""

    def __init__(self, model: Any, stops: Callable[[Any], bool]) -> None:
        self.stops, self.reached, self._open = stops, threading.Event(), threading.Event()
        self._hook = model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, module: Any, args: Any, kwargs: Any) -> None:
        if self.stops(kwargs["input_ids"]):
            self.reached.set()
            assert self._open.wait(60)

    def open(self) -> None:
        """Let all forwards pass."""
        self._open.set()
        self._hook.remove()


def wait_for(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds.

    Raises:
        AssertionError: it does not in time.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)


def figures(text: str) -> dict[str, float]:
    """Figures of /metrics by name and labels, as Prometheus' own parser reads them."""
    from prometheus_client.parser import text_string_to_metric_families

    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
