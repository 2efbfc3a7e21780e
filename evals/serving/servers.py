"""Servers as processes: `Server` starts one, lets it run or stops it for a while, and ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from evals.serving.client import get

ROOT = Path(__file__).resolve().parents[2]
VENVS = ROOT / ".venv-peers"
THREADS = "2"


class DidNotStart(Exception):
    """A server is not installed, or has ended before it answered; the text has the reason."""


@dataclass(frozen=True)
class Way:
    """One way to serve a model.

    Attributes:
        name: in tables.
        command: arguments, in which {port} stands for the port.
        ready: path that answers 200 once the model is loaded.
        options: fields that go with every request.
    """

    name: str
    command: tuple[str, ...]
    ready: str = "/health"
    options: tuple[tuple[str, object], ...] = ()


def ours(model: str | Path, patches: str = "", *more: str) -> Way:
    """`patchkit serve`."""
    name = "patchkit" + (f": {patches}" if patches else "")
    command = (sys.executable, "-m", "patchkit.cli", "serve", str(model), "--port", "{port}", "--patches", patches or "none", *more)
    return Way(name, command, "/ready", (("stream_options", {"include_usage": True}),))


def transformers(model: Path, continuous: bool) -> Way:
    """`transformers serve`, with a saved model, in fp32."""
    binary = VENVS / "transformers_serve" / "bin" / "transformers"
    command = (str(binary), "serve", str(model), "--port", "{port}", "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32")
    if continuous:
        # It takes nine tenths of the machine's memory otherwise, whoever else runs; this is room for thousands of tokens.
        more = ("--continuous-batching", "--cb-max-memory-percent", "0.15")
        return Way("transformers serve --continuous-batching", (*command, *more))
    return Way("transformers serve", command)


def llama_cpp(file: Path, slots: int, context: int) -> Way:
    """llama.cpp's own server, with as many slots as there are clients."""
    binary = VENVS / "llama_server" / "bin" / "llama-server"
    sizes = ("--parallel", str(slots), "--ctx-size", str(slots * context), "--threads", THREADS, "--threads-batch", THREADS)
    # Repacked weights are for quantised files, and for AMX, which some virtual machines name and do not allow.
    command = (str(binary), "--model", str(file), "--port", "{port}", "--host", "127.0.0.1", *sizes, "--no-repack", "--no-webui")
    return Way("llama.cpp's llama-server, F32", command, options=(("stream_options", {"include_usage": True}), ("cache_prompt", False)))


class Server:
    """A process that serves, in a process group of its own.

        with Server(way, folder) as server:
            server.run(); ask(server.url, ...); server.stop()

    Args:
        way: what to start.
        folder: for its log.
        patience: seconds that it has to load its model.

    Raises:
        DidNotStart: on entering.
    """

    def __init__(self, way: Way, folder: Path, patience: float = 300.0) -> None:
        self.way, self.patience = way, patience
        self.log = folder / f"{''.join(each if each.isalnum() else '_' for each in way.name)}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Server:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [part.replace("{port}", str(port)) for part in self.way.command]
        threads = {name: THREADS for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        try:
            with self.log.open("wb") as log:
                self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
        except OSError as error:
            raise DidNotStart(f"{command[0]} cannot be started ({error.strerror}): make serving-peers") from error
        try:
            self._wait()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def status(self) -> int | None:
        """Exit status; None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def run(self) -> None:
        """Go on after `stop`."""
        os.killpg(self.pid, signal.SIGCONT)

    def stop(self) -> None:
        """Take no processor time until `run`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def end(self) -> None:
        """Kill it."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGCONT)
            os.killpg(self.pid, signal.SIGKILL)
        assert self.process is not None
        self.process.wait(30)

    def resident(self) -> int:
        """Bytes of its memory that are in use."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return 1024 * int(line.split()[1])
        raise RuntimeError("the server has no VmRSS: it has ended")

    def _wait(self) -> None:
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if self.status is not None:
                tail = " ".join(self.log.read_text(errors="replace").split())[-300:]
                raise DidNotStart(f"it has ended with status {self.status}: {tail}")
            with suppress(OSError):
                if get(self.url, self.way.ready)[0] == 200:
                    return
            time.sleep(0.2)
        raise DidNotStart(f"it does not answer after {self.patience:.0f} s")


def ways_that_start(ways: Sequence[Way], folder: Path, missing: dict[str, str]) -> list[Server]:
    """Start servers one after the other, each stopped once it is ready; those that do not start go into ``missing`` with the reason."""
    servers = []
    for way in ways:
        server = Server(way, folder)
        try:
            server.__enter__()
        except DidNotStart as error:
            missing[way.name] = str(error)
            continue
        server.stop()
        servers.append(server)
    return servers
