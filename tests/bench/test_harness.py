"""The benchmark harness against small servers in a thread, and against a model here. No assertion about a time but its order."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from patchkit.bench.config import BenchError, Config
from patchkit.bench.harness import load_prompts, run
from patchkit.bench.local import LocalModel
from patchkit.bench.results import FIGURES, Sample, summary
from patchkit.bench.server import RequestFailed, Server
from patchkit.cli import app
from patchkit.models import load_model

CONFIG = Path(__file__).resolve().parents[2] / "evals" / "bench.yaml"


class Handler(BaseHTTPRequestHandler):
    """Answers as `server.script` says: each request is given to it with the handler."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body, dict(self.headers)))  # type: ignore[attr-defined]
        self.server.script(self, body, len(self.server.requests))  # type: ignore[attr-defined]

    def refuse(self, status: int, text: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def stream(self, *events: Any) -> None:
        """Events as lines of an event stream: objects as JSON, texts as they are."""
        self.refuse(200, Content_Type="text/event-stream")
        for event in events:
            self.wfile.write(event if isinstance(event, bytes) else f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()

    def log_message(self, *args: Any) -> None:
        pass


DONE = b"data: [DONE]\n\n"


def text(word: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": word, "delta": {"content": word}, "finish_reason": reason}]}


ANSWER = (b": a comment\n\n", text("a"), text("b"), text("", "length"), {"choices": [], "usage": {"completion_tokens": 7}}, DONE)


def answers(handler: Handler, body: Any, count: int) -> None:
    handler.stream(*ANSWER)


Serve = Callable[[Callable[[Handler, Any, int], object]], ThreadingHTTPServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(script: Callable[[Handler, Any, int], object]) -> ThreadingHTTPServer:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        server.script, server.requests = script, []  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_port}/v1"


def asked(server: ThreadingHTTPServer, **options: Any) -> tuple[Server, list[float]]:
    """A client of that server, and the times it waits."""
    waits: list[float] = []
    return Server(Config(endpoint=address(server), model="m", **options), sleep=waits.append), waits


# -- servers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [False, True])
def test_an_answer_is_measured(serve: Serve, monkeypatch: pytest.MonkeyPatch, chat: bool) -> None:
    monkeypatch.setenv("THE_KEY", "secret")
    server = serve(answers)
    client, _ = asked(server, chat=chat, new_tokens=5, api_key_env="THE_KEY")
    ttft, latency, tokens = client("hello")
    assert 0 < ttft <= latency and tokens == 7
    path, body, headers = server.requests[0]  # type: ignore[attr-defined]
    assert path == ("/v1/chat/completions" if chat else "/v1/completions")
    assert body["stream"] is True and body["max_tokens"] == 5 and body["model"] == "m" and headers["Authorization"] == "Bearer secret"
    assert (body["messages"] == [{"role": "user", "content": "hello"}]) if chat else (body["prompt"] == "hello")


def test_events_are_counted_where_the_server_does_not_count(serve: Serve) -> None:
    def strict(handler: Handler, body: Any, count: int) -> None:
        if "stream_options" in body:
            handler.refuse(422, '{"error": "unexpected field stream_options"}')
        else:
            handler.stream(text("a"), text("b", "stop"), DONE)

    server = serve(strict)
    client, waits = asked(server)
    assert client("x")[2] == client("x")[2] == 2
    assert len(server.requests) == 3 and waits == []  # type: ignore[attr-defined]


def test_the_first_text_is_not_held_back(serve: Serve) -> None:
    """The server ends its answer only when the client's time to first token is taken: a client that waits for more would hang."""
    seen = threading.Event()

    def slow(handler: Handler, body: Any, count: int) -> None:
        handler.stream(text("a"))
        assert seen.wait(5)
        handler.stream_end = handler.wfile.write(f"data: {json.dumps(text('b', 'stop'))}\n\ndata: [DONE]\n\n".encode())

    client, _ = asked(serve(slow), timeout_s=10)
    events = client._events

    def spied(*args: Any) -> Iterator[dict[str, Any]]:
        for event in events(*args):
            seen.set()
            yield event

    client._events = spied  # type: ignore[method-assign]
    assert client("x")[2] == 2 and seen.is_set()


def test_a_server_that_fails_twice_is_asked_again(serve: Serve) -> None:
    def flaky(handler: Handler, body: Any, count: int) -> None:
        if count == 1:
            handler.refuse(503, "loading", Retry_After="4")
        elif count == 2:
            handler.refuse(500)
        else:
            handler.stream(*ANSWER)

    client, waits = asked(serve(flaky))
    assert client("x")[2] == 7 and waits == [4.0, 1.0]
    client, waits = asked(serve(flaky), retries=1)
    with pytest.raises(RequestFailed, match=r"answered 500 .*attempts: 2"):
        client("x")


def test_a_server_that_never_answers_times_out(serve: Serve) -> None:
    release = threading.Event()

    def silent(handler: Handler, body: Any, count: int) -> None:
        release.wait(10)

    client, waits = asked(serve(silent), timeout_s=0.2, retries=2)
    with pytest.raises(RequestFailed, match=r"did not answer within 0.2 s.*attempts: 3"):
        client("x")
    assert waits == [0.5, 1.0]
    release.set()


def test_a_server_that_never_ends_times_out(serve: Serve) -> None:
    stop = threading.Event()

    def dripping(handler: Handler, body: Any, count: int) -> None:
        handler.stream()
        while not stop.wait(0.02):
            handler.wfile.write(b": still here\n\n")

    client, _ = asked(serve(dripping), timeout_s=0.3, retries=0)
    with pytest.raises(RequestFailed, match=r"did not finish within 0.3 s"):
        client("x")
    stop.set()


def test_a_server_that_is_not_there_is_named(serve: Serve) -> None:
    server = serve(answers)
    server.shutdown()
    server.server_close()
    client, waits = asked(server, retries=2)
    with pytest.raises(RequestFailed, match="cannot be reached: is the server running"):
        client("x")
    assert waits == [0.5, 1.0]


@pytest.mark.parametrize(
    "events, says",
    [
        ((b"<html>hello</html>\n",), "no event stream but b'<html>"),
        ((b'{"choices": []}\n',), "no event stream"),
        ((b"data: {broken\n\n",), "broken event"),
        ((b"data: [1]\n\n",), "no object"),
        (({"choices": [1]},), "another form than OpenAI's"),
        ((text("a"), {"choices": [], "usage": 3}), "another form than OpenAI's"),
        ((b"\xff\xfe\x00garbage\n",), "no event stream"),
        ((text("a"), {"error": {"message": "out of memory"}}), "out of memory"),
        ((text("a"),), "cut off"),
        ((DONE,), "sent no text"),
        ((b"",), "sent no text"),
    ],
)
def test_garbage_is_named_and_not_asked_for_again(serve: Serve, events: tuple[Any, ...], says: str) -> None:
    client, waits = asked(serve(lambda handler, body, count: handler.stream(*events)))
    with pytest.raises(RequestFailed) as error:
        client("x")
    assert says in str(error.value) and waits == []


@pytest.mark.parametrize("status, says", [(401, "OPENAI_API_KEY"), (404, "does the address end as it should"), (400, "answered 400")])
def test_refusals_are_not_asked_for_again(serve: Serve, status: int, says: str) -> None:
    client, waits = asked(serve(lambda handler, body, count: handler.refuse(status, "no")))
    with pytest.raises(RequestFailed, match=says):
        client("x")
    assert waits == []


def test_a_key_that_no_header_can_hold_is_refused(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "\u2603")
    with pytest.raises(RequestFailed, match="cannot be asked"):
        asked(serve(answers))[0]("x")


def test_requests_run_at_a_time(serve: Serve) -> None:
    """Three requests are open at once: each waits for the others."""
    together = threading.Barrier(3, timeout=5)

    def meeting(handler: Handler, body: Any, count: int) -> None:
        together.wait()
        handler.stream(*ANSWER)

    config = Config(endpoint=address(serve(meeting)), concurrency=3, iterations=2, warmup=0)
    samples = list(run(config, Server(config), ["a", "b", "c"]))
    assert sorted((sample.prompt, sample.iteration) for sample in samples) == [(p, i) for p in range(3) for i in range(2)]
    assert all(sample.error is None and sample.tokens == 7 for sample in samples)


def test_requests_at_a_time_are_all_asked_again_without_the_option(serve: Serve) -> None:
    """All three are refused before any of them knows that the option is."""
    together = threading.Barrier(3, timeout=5)

    def strict(handler: Handler, body: Any, count: int) -> None:
        if "stream_options" in body:
            together.wait()
            handler.refuse(400, "unexpected stream_options")
        else:
            handler.stream(text("a"), text("b", "stop"), DONE)

    config = Config(endpoint=address(serve(strict)), concurrency=3, iterations=1, warmup=0)
    assert [sample.tokens for sample in run(config, Server(config), ["a", "b", "c"])] == [2, 2, 2]


# -- the run ----------------------------------------------------------------------------------------------------------------


def test_failures_are_samples_once_something_was_answered() -> None:
    calls: list[str] = []

    def generate(prompt: str) -> tuple[float, float, int]:
        calls.append(prompt)
        if len(calls) == 2:
            raise RequestFailed("why")
        return 1.0, 4.0, 2

    samples = list(run(Config(iterations=3), generate, ["a"]))
    assert [sample.error for sample in samples] == [None, "why", None] and samples[0].tokens_per_s == 500
    with pytest.raises(RequestFailed, match="why"):
        calls[:] = ["one"]
        list(run(Config(iterations=3), generate, ["a"]))


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_defect_is_not_taken_for_a_failed_request(concurrency: int) -> None:
    def generate(prompt: str) -> tuple[float, float, int]:
        raise ZeroDivisionError

    config = Config(endpoint="http://127.0.0.1:9", concurrency=concurrency)
    with pytest.raises(ZeroDivisionError):
        list(run(config, generate, ["a"]))


def test_the_summary_is_that_of_the_answers() -> None:
    samples = [Sample(0, i, float(i), 100.0, i) for i in range(1, 102)] + [Sample(0, 0, error="why")]
    figures = summary(samples)
    assert figures["ttft_ms"] == {"mean": 51, "median": 51, "std": pytest.approx(29.30017), "min": 1, "max": 101, "p95": 96}
    assert figures["tokens_per_s"]["max"] == 1010
    assert summary([Sample(0, 0, error="why")]) == {} and summary(samples[:1])["ttft_ms"]["std"] == 0


@pytest.mark.parametrize("spec", ["", "speculative(k=2)", "streaming(sinks=2, window=30)"])
def test_a_local_model_gives_its_own_text(model_dir: Path, spec: str) -> None:
    from patchkit import patch_model

    model, tokenizer = load_model(model_dir)
    if spec:
        patch_model(model, spec, verbose=False)
    ttft, latency, tokens = LocalModel(model, tokenizer, 6)("def main(argv):\n    return")
    assert 0 < ttft <= latency and 1 <= tokens <= 6


def test_prompts(tmp_path: Path) -> None:
    texts = load_prompts("stdlib", 3, 100)
    assert len(set(texts)) == 3 and all(len(each) == 100 for each in texts)
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    assert load_prompts(str(tmp_path / "prompts.txt"), 2, 1) == ["one", "two"]


# -- the configuration and the command ---------------------------------------------------------------------------------------


def test_the_shipped_configuration_reads() -> None:
    assert Config.from_yaml(CONFIG, new_tokens=3).new_tokens == 3


@pytest.mark.parametrize(
    "content, says",
    [
        ("iteratons: 3", "unknown key 'iteratons', did you mean 'iterations'?"),
        ("xyzzy: 3", "unknown key 'xyzzy': available: model, patches"),
        ("iterations: many", "iterations: 'many' is no int"),
        ("iterations: true", "iterations: True is no int"),
        ("iterations: 0", "iterations: 0 is too small"),
        ("timeout_s: -1", "timeout_s: -1"),
        ("timeout_s: .nan", "timeout_s: nan"),
        ("dtype: float8", "dtype: 'float8' is unknown"),
        ("endpoint: localhost:8000", "is no address"),
        ("endpoint: http://x\npatches: mlp_int8", "cannot be patched from here"),
        ("concurrency: 2", "are for a server"),
        ("", "holds no keys"),
        ("- a", "holds no keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_configuration_is_refused_by_name(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "bench.yaml"
    path.write_text(content)
    with pytest.raises(BenchError) as error:
        Config.from_yaml(path)
    assert says in str(error.value)


def test_a_missing_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="cannot be read"):
        Config.from_yaml(tmp_path / "none.yaml")


def bench(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_command_measures_a_server(serve: Serve, tmp_path: Path) -> None:
    server = serve(answers)
    result = bench("m", "--endpoint", address(server), "--n-prompts", "2", "--iterations", "2", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "ttft_ms" in result.stdout and "p95" in result.stdout and "4 answers" in result.stdout
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["answers"] == 4 and found["failures"] == 0 and found["config"]["model"] == "m" and found["environment"]["python"]
    with (tmp_path / "out" / "bench.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens"] for row in rows] == ["7"] * 4 and float(rows[0]["tokens_per_s"]) == pytest.approx(
        found["samples"][0]["tokens_per_s"]
    )
    assert len(server.requests) == 5  # type: ignore[attr-defined]  # one to warm up


def test_the_command_measures_a_patched_model(model_dir: Path, tmp_path: Path) -> None:
    config = tmp_path / "bench.yaml"
    config.write_text("n_prompts: 1\nprompt_chars: 60\nnew_tokens: 4\niterations: 2\npatches: streaming(window=8)\n")
    result = bench(model_dir, "--config", config, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["patches"][0]["hits"]["tokens evicted"] > 0 and found["answers"] == 2 and set(found["figures"]) == set(FIGURES)


def test_the_command_keeps_what_it_has(serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = Server.__call__
    calls: list[str] = []

    def interrupted(self: Server, prompt: str) -> tuple[float, float, int]:
        calls.append(prompt)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return ask(self, prompt)

    monkeypatch.setattr(Server, "__call__", interrupted)
    result = bench("m", "--endpoint", address(serve(answers)), "--n-prompts", "1", "--iterations", "5", "--out", tmp_path)
    assert result.exit_code == 130 and "interrupted" in result.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["interrupted"] and found["answers"] == 2 and len((tmp_path / "bench.csv").read_text().splitlines()) == 3


def test_the_command_says_what_failed(serve: Serve, tmp_path: Path) -> None:
    def worse(handler: Handler, body: Any, count: int) -> None:
        handler.stream(*(ANSWER if count < 3 else (text("a"),)))

    (tmp_path / "prompts.txt").write_text("one\n")
    common = ("--n-prompts", "1", "--iterations", "2", "--out", tmp_path, "--prompts", tmp_path / "prompts.txt")
    result = bench("m", "--endpoint", address(serve(worse)), *common)
    assert result.exit_code == 1 and "1 of 2 requests failed" in result.stderr and "cut off" in result.stderr
    assert json.loads((tmp_path / "bench.json").read_text())["answers"] == 1
    result = bench("m", "--endpoint", "http://127.0.0.1:9/v1", "--retries", "0", *common)
    assert result.exit_code == 1 and "cannot be reached" in result.stderr and "Traceback" not in result.output
