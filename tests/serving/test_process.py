"""`patchkit serve` as a process: its start, what it refuses, and its end at a signal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
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


def test_it_serves_and_ends_in_order_at_a_signal(tmp_path: Path) -> None:
    key, log = tmp_path / "key", tmp_path / "log"
    key.write_text("sk-1\n")
    options = (
        "--host",
        "0.0.0.0",
        "--api-key-file",
        str(key),
        "--max-rows",
        "2",
        "--name",
        "mine",
        "--patches",
        "speculative(draft=suffix)",
    )
    with process(*options, log=log) as (url, started), ThreadPoolExecutor(3) as pool:
        assert requests.get(f"{url}/v1/models", timeout=10).status_code == 401
        assert requests.get(f"{url}/v1/models", headers=KEY, timeout=10).json()["data"][0]["id"] == "mine"

        def ask(number: int) -> requests.Response:
            body = {"model": "mine", "prompt": PROMPTS[number], "temperature": 0, "max_tokens": 120, "stream": number == 2}
            return requests.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=60)

        running = [pool.submit(ask, number) for number in range(3)]
        wait_for(lambda: requests.get(f"{url}/v1/patchkit/report", headers=KEY, timeout=10).json()["rows"]["running"] == 2)
        started.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        refused = ask(3)
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "shutting_down"
        for number, each in enumerate(running):
            response = each.result()
            assert response.status_code == 200
            if number == 2:
                assert response.text.endswith("data: [DONE]\n\n")
            else:
                assert response.json()["choices"][0]["text"] == alone(PROMPTS[number], max_new_tokens=120)
        assert started.wait(30) == 0
    assert "warning" not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


def test_it_warns_and_ends_at_once_at_a_second_signal(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with process("--host", "0.0.0.0", log=log) as (url, started), ThreadPoolExecutor(1) as pool:
        assert "warning: 0.0.0.0 can be reached by other machines, and there is no API key" in log.read_text()
        body = {"prompt": PROMPTS[0], "temperature": 0, "max_tokens": 480, "logit_bias": {"0": -100}}
        running = pool.submit(requests.post, f"{url}/v1/completions", json=body, timeout=60)
        wait_for(lambda: requests.get(f"{url}/v1/patchkit/report", timeout=10).json()["rows"]["running"] == 1)
        started.send_signal(signal.SIGINT)
        started.send_signal(signal.SIGTERM)
        assert running.result().status_code == 503
        assert started.wait(30) == 0


@pytest.mark.parametrize(("option", "names"), [("", ["streaming", "speculative"]), ("none", ["speculative"])])
def test_an_exported_directory_has_its_patches(option: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = model_and_tokenizer()
    export(model, tokenizer, "streaming(sinks=1, window=6)", tmp_path / "exported")
    found = []

    def run(application: Any, bound: socket.socket, patience: float) -> None:
        bound.close()
        with TestClient(application) as served:
            found.extend(patch["name"] for patch in served.get("/v1/patchkit/report").json()["patches"])
            assert served.get("/v1/models").json()["data"][0]["id"] == "exported" and patience == 7

    monkeypatch.setattr("patchkit.serving.server.run", run)
    result = CliRunner().invoke(
        app, ["serve", str(tmp_path / "exported"), "--port", "0", "--drain", "7"] + (["--patches", option] if option else [])
    )
    assert result.exit_code == 0, result.output
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
