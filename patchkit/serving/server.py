"""The process of a server: its socket, and its orderly end at a signal."""

from __future__ import annotations

import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from patchkit.errors import PatchError
from patchkit.serving.engine import Engine


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address; port 0 is any that is free.

    Raises:
        PatchError: the port is taken, or this machine has no such address.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise PatchError(f"there is no address {host!r} ({error}): give --host 127.0.0.1 or another address of this machine") from error
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(1)  # so that a second server fails here, and not when it has loaded its model
    except OSError as error:
        bound.close()
        raise PatchError(f"cannot listen on {host}, port {port} ({error.strerror}): give another --port, or end what uses it") from error
    return bound


class DrainingServer(uvicorn.Server):
    """A server that at SIGTERM or SIGINT takes no more requests, which get 503, and ends when those that it has are answered.

    Args:
        config: of uvicorn.
        engine: of the application.
        patience: seconds after which texts are cut off.

    A second signal cuts them off at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, patience: float) -> None:
        super().__init__(config)
        self.engine, self.patience = engine, patience
        self.deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; at a second signal, end. uvicorn calls it."""
        if self.deadline is None:
            self.deadline = time.monotonic() + self.patience
            self.engine.draining = True
            return
        self.deadline = 0.0

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end; uvicorn asks ten times a second."""
        if self.deadline is not None and not self.should_exit:
            late = time.monotonic() >= self.deadline
            if late:
                self.engine.cancel_all()
            self.should_exit = late or self.engine.idle
        return bool(await super().on_tick(counter))


def run(application: Any, bound: socket.socket, patience: float) -> None:
    """Serve an application until a signal ends it.

    Args:
        application: made by `app`.
        bound: from `listening`.
        patience: seconds that texts have to end after a signal.
    """
    config = uvicorn.Config(application, log_level="warning", access_log=False, timeout_graceful_shutdown=10, server_header=False)
    server = DrainingServer(config, application.state.engine, patience)
    server.run(sockets=[bound])
