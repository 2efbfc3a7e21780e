"""`patchkit serve` as a process: its start, what it refuses, and its end at a signal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from served import PROMPTS, alone, model_and_tokenizer, wait_for
from starlette.testclient import TestClient
from typer.testing import CliRunner

from patchkit.cli import app
from patchkit.export import export
from patchkit.serving.access import is_open_to_others

ROOT = Path(__file__).resolve().parents[2]
KEY = {"Authorization": "Bearer sk-1"}


@contextlib.contextmanager
def process(*arguments: str, log: Path) -> Iterator[tuple[str, Any]]:
    """Address and process of `patchkit serve`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "patchkit.cli", "serve", "stdlib-7m", "--port", "0", *arguments]
    with log.open("w") as out:
        started = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: re.search(r"http://[\d.]+:\d+/v1", log.read_text()) or started.poll() is not None, 120)
        found = re.search(r"(http://[\d.]+:\d+)/v1", log.read_text())
        assert found is not None, log.read_text()
        url = found.group(1).replace("0.0.0.0", "127.0.0.1")
        wait_for(lambda: _answers(url), 60)
        yield url, started
    finally:
        started.kill()
        started.wait(30)


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/ready", timeout=5).status_code == 200
    except requests.ConnectionError:
        return False


def test_it_serves_drains_at_a_signal_and_ends_at_once_at_a_second_one(tmp_path: Path) -> None:
    key, log = tmp_path / "key", tmp_path / "log"
    key.write_text("sk-1\n")
    options = (
        "--host",
        "0.0.0.0",
        "--api-key-file",
        str(key),
        "--max-rows",
        "3",
        "--name",
        "mine",
        "--patches",
        "speculative(draft=suffix)",
    )
    with process(*options, log=log) as (url, started), ThreadPoolExecutor(3) as pool:
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 401
        assert requests.get(f"{url}/v1/models", headers=KEY, timeout=10).json()["data"][0]["id"] == "mine"

        def ask(number: int, tokens: int = 60) -> requests.Response:
            # The long one is drawn, so that no draft shortens it.
            body = {"model": "mine", "prompt": PROMPTS[number], "max_tokens": tokens, "stream": number == 1}
            body["temperature"] = 2.0 if tokens > 60 else 0
            return requests.post(f"{url}/v1/completions", json={**body, "logit_bias": {"0": -100}}, headers=KEY, timeout=60)

        long = pool.submit(ask, 2, 480)
        short = [pool.submit(ask, number) for number in range(2)]
        wait_for(lambda: requests.get(f"{url}/v1/patchkit/report", headers=KEY, timeout=10).json()["rows"]["running"] == 3)
        started.send_signal(signal.SIGTERM)
        wait_for(lambda: requests.get(f"{url}/ready", timeout=10).status_code == 503)
        refused = ask(3)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        assert short[0].result().json()["choices"][0]["text"] == alone(PROMPTS[0], max_new_tokens=60)
        assert short[1].result().status_code == 200 and short[1].result().text.endswith("data: [DONE]\n\n")
        assert not long.done()
        started.send_signal(signal.SIGINT)
        assert long.result().status_code == 503 and started.wait(30) == 0
    assert "warning" not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


def served_in_this_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[Any, list[Any]]:
    """What `patchkit serve` prints, and the application and the patience with which it would serve."""
    found: list[Any] = []

    def run(application: Any, bound: socket.socket, patience: float) -> None:
        bound.close()
        found.extend((application, patience))

    monkeypatch.setattr("patchkit.serving.server.run", run)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 0, result.output
    return result, found


def test_it_warns_where_others_may_ask_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = served_in_this_process(monkeypatch, "stdlib-7m", "--host", "0.0.0.0", "--port", "0")
    assert "warning: 0.0.0.0 can be reached by other machines, and there is no API key" in result.stderr


@pytest.mark.parametrize(("option", "names"), [("", ["streaming", "speculative"]), ("none", ["speculative"])])
def test_an_exported_directory_has_its_patches(option: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    export(model, tokenizer, "streaming(sinks=1, window=6)", tmp_path / "exported")
    options = ["--patches", option] if option else []
    _, (application, patience) = served_in_this_process(monkeypatch, str(tmp_path / "exported"), "--port", "0", "--drain", "7", *options)
    with TestClient(application) as served:
        found = [patch["name"] for patch in served.get("/v1/patchkit/report").json()["patches"]]
        assert served.get("/v1/models").json()["data"][0]["id"] == "exported" and patience == 7
    assert found == names


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1 and "Traceback" not in result.stderr and result.stderr.startswith("error: "), result.output
    return result.stderr


def test_what_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port}" in refused("stdlib-7m", "--port", port)
    assert "there is no address" in refused("stdlib-7m", "--host", "no.such.host.invalid")
    assert "cannot listen on 192.0.2.1" in refused("stdlib-7m", "--host", "192.0.2.1", "--port", "0")
    assert "no such model directory" in refused(str(tmp_path / "missing"))
    assert "strea" in refused("stdlib-7m", "--patches", "strea(window=4)")
    assert "cannot be read" in refused("stdlib-7m", "--api-key-file", str(tmp_path / "missing"))
    empty = tmp_path / "empty"
    empty.write_text("\n")
    assert "holds no API key" in refused("stdlib-7m", "--api-key-file", str(empty))
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    assert "pip install 'patchkit[serve]'" in refused("stdlib-7m")


def test_addresses_of_this_machine_alone() -> None:
    assert not any(map(is_open_to_others, ("127.0.0.1", "127.0.0.2", "localhost", "::1")))
    assert all(map(is_open_to_others, ("0.0.0.0", "::", "192.168.1.4", "example.com")))
