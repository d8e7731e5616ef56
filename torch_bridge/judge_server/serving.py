"""Running the server as a process: address, start, drain and end."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn

from cocoedit_jax.errors import UserError
from torch_bridge.judge_server.app import AppSettings, JudgeApp
from torch_bridge.judge_server.chat_model import ChatModel
from torch_bridge.judge_server.connections import ConnectionLimits, guarded_protocol
from torch_bridge.judge_server.metrics import Metrics


@dataclass(frozen=True)
class Address:
    """Where to listen. `port` 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = 8000

    def check(self, token: str) -> None:
        """Raises UserError if others could reach the server without a key."""
        if not token and not is_loopback(self.host):
            raise UserError(
                f"--host={self.host}: other machines could use the server; expected a loopback address such as "
                "127.0.0.1, or a key (--key_env or --key_file)"
            )

    def bind(self) -> socket.socket:
        """A listening socket. Raises UserError."""
        try:
            family, kind, protocol, _, place = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            listener = socket.socket(family, kind, protocol)
            try:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(place)
            except OSError:
                listener.close()
                raise
        except (OSError, OverflowError) as error:
            raise UserError(f"--host={self.host} --port={self.port}: cannot listen there ({error})") from error
        listener.setblocking(False)
        return listener


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name must be localhost."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class ServeOptions:
    address: Address = field(default_factory=Address)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    drain_seconds: int = 60


class JudgeServer:
    """A uvicorn server of a `JudgeApp`; its `url` is known before it runs.

    Raises:
        UserError: the address cannot be used.
    """

    def __init__(
        self, model: ChatModel, settings: AppSettings, options: ServeOptions, say: Callable[[str], None] = print
    ):
        options.address.check(settings.token)
        self._socket = options.address.bind()
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        self._load_error: BaseException | None = None
        self._say = say
        metrics = Metrics()
        self.app = JudgeApp(
            model, settings, metrics, self._on_load_error, lambda: say(f"ready: {settings.name} at {self.url}/v1")
        )
        config = uvicorn.Config(
            self.app.asgi,
            http=guarded_protocol(options.connections, metrics),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=round(options.connections.keep_alive_seconds),
            timeout_graceful_shutdown=options.drain_seconds,
        )
        self._server = uvicorn.Server(config)

    def _on_load_error(self, error: BaseException) -> None:
        self._load_error = error
        self._server.should_exit = True

    def run(self) -> None:
        """Serves until `stop` or SIGTERM; then refuses new connections and finishes what it has begun to receive.

        Raises:
            UserError: the model cannot be loaded.
        """
        self._say(f"listening at {self.url}/v1; loading {self.app.settings.name}")
        self._server.run(sockets=[self._socket])
        if self._load_error is not None:
            raise self._load_error

    def stop(self) -> None:
        self._server.should_exit = True


def serve(model: ChatModel, settings: AppSettings, options: ServeOptions) -> None:
    """Runs a server as the process: SIGTERM or Ctrl-C ends it with code 0 once its queue is empty, with code 1 if that
    takes longer than allowed or a thread is still at work for a request that was given up.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")

    def already_drained(number: int, frame: object) -> None:
        """uvicorn raises the signal again when it has finished."""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, already_drained)
    server = JudgeServer(model, settings, options, lambda text: print(text, flush=True))
    server.run()
    print("stopped", flush=True)
    if server.app.busy:  # a thread cannot be interrupted, and Python would wait for it
        os._exit(int(server.app.loaded))
