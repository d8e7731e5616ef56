"""Connections that cost nothing for long: a bounded number, and a time within which a request must have come."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from torch_bridge.judge_server.metrics import Metrics

_FULL = (
    b"HTTP/1.1 429 Too Many Requests\r\nretry-after: 1\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\nconnection: close\r\n\r\n%s"
)
_FULL_BODY = b'{"error":{"message":"too many connections","type":"rate_limit_error","param":null,"code":"connections"}}'


@dataclass(frozen=True)
class ConnectionLimits:
    """Connections at most, and seconds: for the head of a request; at rest after a reply; from the head of a request
    to the last byte of its reply, whatever the application does.
    """

    connections: int = 512
    head_seconds: float = 10.0
    keep_alive_seconds: float = 30.0
    cycle_seconds: float = 300.0


def guarded_protocol(limits: ConnectionLimits, metrics: Metrics) -> type[H11Protocol]:
    """uvicorn's HTTP protocol within `limits`: a connection too many is answered 429 and closed, a slow one is cut.

    uvicorn itself waits for ever for the head of a request, and for a client that does not read its reply.
    """

    class GuardedProtocol(H11Protocol):
        _refused = False
        _timed: Any = None  # the request whose time is running
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            if len(self.connections) >= limits.connections:
                self._refused = True
                metrics.connections_refused.inc()
                transport.write(_FULL % (len(_FULL_BODY), _FULL_BODY))
                transport.close()
                return
            super().connection_made(transport)
            metrics.connections.set(len(self.connections))
            self._expect_within(limits.head_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            if not self._refused:
                super().connection_lost(exc)
                metrics.connections.set(len(self.connections))

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            super().data_received(data)
            if self.cycle is not None and self.cycle is not self._timed and not self.cycle.response_complete:
                self._timed = self.cycle
                self._expect_within(limits.cycle_seconds)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.cycle.response_complete and not self.transport.is_closing():
                self._expect_within(limits.keep_alive_seconds + limits.head_seconds)

        def _expect_within(self, seconds: float) -> None:
            self._stop_waiting()
            self._deadline = self.loop.call_later(seconds, self._close_slow)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _close_slow(self) -> None:
            metrics.slow_connections.inc()
            self.transport.abort()  # close() would wait for what the client does not read

    return GuardedProtocol
